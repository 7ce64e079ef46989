"""How far each optimizer step moves the log-probs of annotated tokens, with and without a method that uses them.

`SpanProbe` annotates rollouts as TRACE does and carries spans and teacher prompts along, but changes nothing: a run
with it is plain TRL. `Lift` measures before and after each optimizer step, on rows of the rollout that the step learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from trl_ext.forward import evaluating
from trl_ext.method import Method
from trl_ext.methods.grpo.trace import ERROR, KEY, Trace

ROWS = 64  # at most, of each micro-batch: three forwards without gradient per step must stay cheap (rows are shuffled)
NAMES = {ERROR: "error", KEY: "key"}


@dataclass(frozen=True)
class SpanProbe(Trace):
    """Both kinds of span at every step; no loss, no weights, no teacher snapshot."""

    name = "span_probe"
    owns = ()  # type: ignore[assignment]

    token_weights = Method.token_weights
    aux_loss = Method.aux_loss
    sync_teacher = Method.sync_teacher

    def needs(self) -> frozenset[str]:
        return frozenset()

    def _lambda(self, step: int) -> float:
        return self.weight


def lift(before: Tensor, after: Tensor, teacher: Tensor, kinds: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Changes of the sampled tokens' log-probs by an update; all arguments (B, T), `teacher` under its private note.

    For each kind k: `k_lift` mean(after - before), `k_lift_supported` the same where teacher > before, `k_mass`
    mean |after - before|; `outside_mass` the latter on tokens in no span. (sum, count) each, to be added up over
    micro-batches; nats per token.
    """
    change = after - before
    valid = mask.bool()
    places = {"outside_mass": valid & (kinds == 0)}
    for kind, name in NAMES.items():
        here = valid & (kinds == kind)
        places |= {f"{name}_lift": here, f"{name}_lift_supported": here & (teacher > before), f"{name}_mass": here}
    return {
        name: torch.stack([(change.abs() if name.endswith("mass") else change)[at].sum(), at.sum()])
        for name, at in places.items()
    }


class Lift(TrainerCallback):
    """Measures `lift` of every optimizer step over the rows with a span; `steps` holds one dictionary for each."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.steps: list[dict[str, float]] = []
        self._before: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = [_rows_with_span(batch) for batch in self.trainer._buffered_inputs]
        batches = [batch for batch in batches if batch["kind"].size(0)]
        teacher = [self._logps(batch, batch["teacher_ids"], batch["teacher_mask"]) for batch in batches]
        before = [self._logps(batch, batch["prompt_ids"], batch["prompt_mask"]) for batch in batches]
        self._before = list(zip(batches, before, teacher, strict=True))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        totals: dict[str, Tensor] = {}
        for batch, before, teacher in self._before:
            after = self._logps(batch, batch["prompt_ids"], batch["prompt_mask"])
            for name, pair in lift(before, after, teacher, batch["kind"], batch["mask"]).items():
                totals[name] = totals.get(name, torch.zeros(2)) + pair.cpu()
        self.steps.append({name: float(total / n) for name, (total, n) in totals.items() if n > 0})

    def _logps(self, batch: dict[str, Tensor], prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B, T) of the current weights, without gradient, dropout off."""
        ids = torch.cat([prompt, batch["completion_ids"]], dim=1)
        mask = torch.cat([prompt_mask, batch["completion_mask"]], dim=1)
        trainer, length = self.trainer, batch["completion_ids"].size(1)
        with torch.no_grad(), evaluating(trainer.model):
            return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]


def _rows_with_span(batch: dict[str, Any]) -> dict[str, Tensor]:
    kinds = batch[f"{SpanProbe.name}/kind"]
    rows = (kinds > 0).any(1).nonzero().squeeze(1)[:ROWS]
    own = {"kind": "kind", "teacher_ids": "prompt_ids", "teacher_mask": "prompt_mask"}
    found = {name: batch[f"{SpanProbe.name}/{key}"][rows] for name, key in own.items()}
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    found |= {name: batch[name][rows] for name in names}
    tools = batch.get("tool_mask")
    found["mask"] = found["completion_mask"] if tools is None else found["completion_mask"] * tools[rows]
    return found
