"""The GRPO trainer's side of losses that couple a group's rows (`Method.coupled`); see `trl_ext.whole_groups`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from trl_ext import whole_groups
from trl_ext.batch import images_of, loss_mask_of, whole
from trl_ext.method import StepRows
from trl_ext.rollout_hooks import RolloutHooks


class CoupledRows(RolloutHooks):
    """Mixin in front of TRL's GRPOTrainer: keeps groups together and works out coupled values before a step."""

    _coupled: dict[int, dict[str, Tensor]] = {}
    _coupled_at: int | None = None

    # Set by TRL's trainer
    _buffered_inputs: Any
    _is_vlm: bool
    _step: int
    num_iterations: int

    def _couples(self) -> str | None:
        """Where whole groups are found if a method's loss needs them; see `whole_groups.scope_of`."""
        if not self.plan.using("coupled"):
            return None
        args = self.args
        sizes = (args.num_generations, args.per_device_train_batch_size, args.steps_per_generation)
        return whole_groups.scope_of(*sizes, args.gradient_accumulation_steps, can_move=not self._is_vlm)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        scope = self._couples() if self.model.training else None
        window = self.args.steps_per_generation * self.num_iterations
        fresh = self._step % window == 0 or self._buffered_inputs is None
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        if scope is None:
            return inputs
        slot = self._step % self.args.steps_per_generation
        if fresh and scope != whole_groups.ROLLOUT:
            self._buffered_inputs = whole_groups.together(self._buffered_inputs)
            inputs = self._buffered_inputs[slot]
        if scope == whole_groups.MICRO_BATCH:
            return inputs  # the loss's own forward will do
        if fresh or self._coupled_at != self.state.global_step:
            in_step = slice(slot, slot + self.args.gradient_accumulation_steps)
            slots = range(len(self._buffered_inputs))[in_step if scope == whole_groups.STEP else slice(None)]
            values = self._coupled_values([self._buffered_inputs[i] for i in slots])
            self._coupled, self._coupled_at = dict(zip(slots, values, strict=True)), self.state.global_step
        return inputs | self._coupled[slot]

    def _coupled_values(
        self, batches: Sequence[dict[str, Any]], logps: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """What the methods' `coupled` return for the rows of these micro-batches, one mapping for each of them.

        `logps` (rows, T) under the current weights, if a forward has them already.
        """
        rows = self._step_rows(batches, logps)
        found = {
            f"{method.name}/{key}": value
            for method in self.plan.using("coupled")
            for key, value in method.coupled(rows.for_method(method.name)).items()
        }
        split = {key: value.split(len(batches[0][whole_groups.ID])) for key, value in found.items()}
        return [{key: parts[i] for key, parts in split.items()} for i in range(len(batches))]

    def _step_rows(self, batches: Sequence[dict[str, Any]], logps: Tensor | None) -> StepRows:
        everywhere = self._couples() == whole_groups.ROLLOUT
        gather = self._gather_values if everywhere else None
        by_group, own = whole_groups.arranged(batches, self.args.num_generations, gather)
        joined = {
            key: torch.cat([batch[key] for batch in batches])
            for key, value in batches[0].items()
            if isinstance(value, Tensor) and value.dim() > 0 and not key.startswith(("prompt", "pixel"))
        }
        now = functools.cache(lambda: self._current_logps(batches) if logps is None else logps)
        old = joined.get("old_per_token_logps")
        # Without old log-probs TRL takes the current ones for them; before the first update the two are the same.
        sampled_now = logps is None and all(
            int(batch[whole_groups.MADE_AT]) == self.state.global_step for batch in batches
        )
        mask = loss_mask_of(joined)

        def drift() -> Tensor:
            if old is None or sampled_now:
                return torch.zeros(mask.shape, device=mask.device)
            return now() - old

        return StepRows(
            mask=mask,
            drift=drift,
            logps=lambda: old if sampled_now and old is not None else now(),
            ref_logps=joined.get("ref_per_token_logps"),
            streams=joined,
            by_group=by_group,
            own=own,
            step=self.state.global_step,
            run=self._run_shape(),
            metrics=self._metrics_store(),
        )

    def _current_logps(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """(rows, T) of the sampled tokens, one forward without gradient for each micro-batch."""
        found = []
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for batch in batches:
                ids, mask = whole(batch)
                logps, _, _ = super()._get_per_token_logps_and_entropies(
                    self.model, ids, mask, batch["completion_ids"].size(1), **images_of(batch)
                )
                found.append(logps)
        return torch.cat(found)
