"""GRPOConfig and GRPOTrainer: TRL's, with methods. Change one import and name the papers.

TRL's own code computes every loss type, clip, correction and metric. The trainer runs TRL's forward once, lets the
methods make token advantages, a mask and weights from it, and calls TRL's loss on a copy of the batch while that
forward is remembered. Without a method each override hands straight through.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from accelerate.logging import get_logger
from datasets import IterableDataset
from torch import Tensor

from trl_ext import checkpoints, kept_rows, ops, whole_groups
from trl_ext.batch import images_of, loss_mask_of, model_images, replaced, whole
from trl_ext.checks import groups_too_small, needs_groups
from trl_ext.compat import check_trl
from trl_ext.coupled import CoupledRows
from trl_ext.forward import Features, captured_hidden
from trl_ext.hidden_prompt import cannot_hide, image_tokens, without
from trl_ext.last_step import KeepsLastStep
from trl_ext.method import HIDDEN, HIDE_PROMPT, LossInput, Setup
from trl_ext.plan import PlanError, make_plan, normalise
from trl_ext.revision import Revisions
from trl_ext.reward_calls import RewardCalls
from trl_ext.rewards import stateful

check_trl()
logger = get_logger(__name__)
_CHOICES = {
    "loss_type": ops.LOSS_TYPES,
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
}

METHODS_HELP = (
    "Papers to switch on: a name, a list of names, or a mapping of name to settings, e.g. "
    "`{trace: {action: rkl_error}, high_entropy: {quantile: 0.8}}`. `trl-ext methods` lists them."
)

SECONDS_HELP = (
    "Bound on one call of one reward function: the run then ends with a message and a checkpoint. null: no bound. With "
    "several processes keep it below `ddp_timeout`, after which those that wait give up."
)


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's GRPOConfig with `methods` and `reward_seconds`. Names and values are checked here, all problems at once (PlanError)."""

    _VALID_DICT_FIELDS = trl.GRPOConfig._VALID_DICT_FIELDS + ["methods"]

    methods: dict[str, Any] | str | None = field(default=None, metadata={"help": METHODS_HELP})
    reward_seconds: float | None = field(default=1200.0, metadata={"help": SECONDS_HELP})

    def __post_init__(self) -> None:
        self.methods = normalise(self.methods)
        super().__post_init__()
        wrong = [
            f"{name}: {getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}"
            for name, allowed in _CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        if self.reward_seconds is not None and not self.reward_seconds > 0:
            wrong.append(f"reward_seconds: {self.reward_seconds} must be above 0; null sets no bound")
        if wrong:
            raise PlanError(wrong, "The configuration has values that TRL would refuse only at the first loss")
        make_plan(self.methods, "grpo", Setup(self))


class GRPOTrainer(KeepsLastStep, CoupledRows, Revisions, RewardCalls, trl.GRPOTrainer):  # type: ignore[misc]
    """Drop-in for `trl.GRPOTrainer`; `args.methods` names the papers. See `trl_ext.method` for what they may change.

    Raises PlanError before the model is loaded when the methods cannot run as configured.
    """

    _tag_names = [*trl.GRPOTrainer._tag_names, "trl-ext"]
    _remembered: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        self._make_plan("grpo", args, model)
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if reason := cannot_hide(self.model.config):
            users = [m.name for m in self.plan.methods if HIDE_PROMPT in m.needs()]
            if users:
                raise PlanError(
                    [f"{name}: no part of the prompt can be hidden from this model: {reason}" for name in users]
                )
        drawing = [*self.plan.using("choose_prompts"), *(m for m in self.plan.methods if m.asks_fresh)]
        if drawing and isinstance(self.train_dataset, IterableDataset):
            raise PlanError(
                [
                    f"{method.name}: draws rows by number, which a stream has not; load the data set (dataset_streaming: "
                    "false), or leave the method out"
                    for method in drawing
                ]
            )
        if reason := self._cannot_revise():
            names = [method.name for method in self.plan.using("revise")]
            raise PlanError([f"{name}: no second attempts {reason}" for name in names])
        group_rewards = needs_groups(zip(self.reward_func_names, self.reward_funcs, strict=True))
        setup = Setup(
            self.args, self.reward_func_names, self._engine(), images=self._is_vlm, group_rewards=group_rewards
        )
        if problems := groups_too_small(setup):
            raise PlanError(problems, "The rewards cannot run as configured")
        self._start_methods(setup)

    def _cannot_revise(self) -> str | None:
        """Why no completion of this run can be replaced once it is generated; None if it can, or need not."""
        if not self.plan.using("revise"):
            return None
        if self._is_vlm:
            return "with images: they are bound to the rows before the rollout; train a text model"
        if self.environment_factories is not None:
            return "with environments, which are bound to their rows; pass tools instead of environment_factory"
        return "with a rollout_func, which owns generation; leave it out" if self.rollout_func is not None else None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; what is evaluated does not move the state of a reward function."""
        with stateful.resting(self.reward_funcs):
            return super().evaluation_loop(*args, **kwargs)

    # Loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._remembered is not None:
            return self._remembered
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not (self.model.training and self.plan.in_loss):
            return super()._compute_loss(model, inputs)
        forward, features = self._forward(model, inputs)
        if self._couples() == whole_groups.MICRO_BATCH:
            inputs = inputs | self._coupled_values([inputs], forward[0].detach())[0]
        x = self._loss_input(inputs, forward, features)
        if self.plan.using("distill_weights"):
            ones = x.advantages.new_ones(x.mask.size(0))
            weights = self.plan.fold("distill_weights", ones, x)
            x = dataclasses.replace(x, distill_weights=None if weights is ones else weights)
        view, surrogate = self._transformed(inputs, x)
        beta = self.beta
        for method in self.plan.using("kl_coef"):
            beta = method.kl_coef(beta, x.step)
        beta *= kept_rows.factor(inputs, self.loss_type)
        with replaced(self, _remembered=forward, beta=beta):
            loss = super()._compute_loss(model, view)
        loss = loss if surrogate is None else loss + surrogate
        for method in self.plan.using("aux_loss"):
            aux = method.aux_loss(x.for_method(method.name))
            loss = loss if aux is None else loss + aux / self.current_gradient_accumulation_steps
        for method in self.plan.using("observe_loss"):
            method.observe_loss(x.for_method(method.name))
        return loss

    def _forward(self, model: Any, inputs: dict[str, Any]) -> tuple[tuple[Tensor, Any, Any], Features | None]:
        """TRL's forward, once; its hidden states are kept when a method needs them."""
        ids, mask = whole(inputs)
        length = inputs["completion_ids"].size(1)
        wanted = HIDDEN in self.plan.needs()
        with captured_hidden(self._unwrapped(), length, wanted) as seen:
            forward = super()._get_per_token_logps_and_entropies(
                model,
                ids,
                mask,
                length,
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **images_of(inputs),
            )
        return forward, self._policy_features(seen[0]) if wanted else None

    def _loss_input(self, inputs: dict[str, Any], forward: Any, features: Features | None) -> LossInput:
        mask = loss_mask_of(inputs)

        return LossInput(
            completion_ids=inputs["completion_ids"],
            mask=mask,
            logps=forward[0],
            entropy=forward[1],
            advantages=inputs["advantages"],
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs.get("ref_per_token_logps"),
            streams=inputs,
            step=self.state.global_step,
            run=self._run_shape(),
            first_pass=self._step // self.args.steps_per_generation % self.num_iterations == 0,
            row_scale=kept_rows.scale_of(inputs),
            optimizer=self._optimizer_step(),
            loss_type=self.loss_type,
            metrics=self._metrics_store(),
            policy=features,
            other=functools.partial(self._other, inputs),
            aggregate=lambda per_token: self._aggregate(per_token, mask, inputs, accumulation=1),
            gather=self._gather_values,
            scratch={},
        )

    def _other(
        self,
        inputs: dict[str, Any],
        which: str,
        rows: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        hide: Tensor | None = None,
    ) -> Features:
        """`rows` (R,) indices; `prompt_ids`, `prompt_mask` (R, L) replace those rows' prompts, their images stay;
        nothing attends to the prompt tokens that `hide` (R, L) bool marks."""
        if rows is None:
            rows = torch.arange(inputs["completion_ids"].size(0), device=inputs["completion_ids"].device)
        images = model_images(inputs, rows)
        if prompt_ids is not None:
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in images:
                    own = images[name][:, inputs["prompt_ids"].size(1) :]
                    images[name] = torch.cat([image_tokens(prompt_ids, self.model.config).to(own.dtype), own], dim=1)
        prompt_ids = inputs["prompt_ids"][rows] if prompt_ids is None else prompt_ids
        prompt_mask = inputs["prompt_mask"][rows] if prompt_mask is None else prompt_mask
        ids = torch.cat([prompt_ids, inputs["completion_ids"][rows]], dim=1)
        mask = torch.cat([prompt_mask, inputs["completion_mask"][rows]], dim=1)
        attended = None if hide is None else without(mask, hide)
        return self._other_features(which, ids, mask, inputs["completion_ids"].size(1), images, attended)

    def _transformed(self, inputs: dict[str, Any], x: LossInput) -> tuple[dict[str, Any], Tensor | None]:
        """A copy of the batch as the methods want TRL to see it, and a replaced policy term if there is one.

        The buffered slice is used again when `num_iterations > 1`, so it is never written to; what no method changed
        stays the same object, which keeps TRL's path bit for bit. Each stage sees the result of those before it.
        """
        view = dict(inputs)
        advantages = self.plan.fold("token_advantages", x.advantages, x)
        x = dataclasses.replace(x, advantages=advantages)
        mask = self.plan.fold("loss_mask", x.mask, x)
        if mask is not x.mask:
            view["tool_mask"] = mask.to(inputs["completion_mask"].dtype)
        x = dataclasses.replace(x, mask=mask)
        ones = torch.ones_like(x.logps, requires_grad=False)
        weights = self.plan.fold("token_weights", ones, x)
        if weights is not ones:
            advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages) * weights
        scale = kept_rows.factor(inputs, self.loss_type)
        view["advantages"] = advantages if scale == 1 else advantages * scale
        surrogate = None
        x = dataclasses.replace(x, advantages=advantages)
        for method in self.plan.using("surrogate"):
            surrogate = method.surrogate(x.for_method(method.name))
        if surrogate is not None:
            view["advantages"] = torch.zeros_like(advantages)
            steps = self.current_gradient_accumulation_steps
            per_token = surrogate.dim() == 2
            surrogate = self._aggregate(surrogate, mask, inputs, steps) if per_token else surrogate / steps
        return view, surrogate

    def _aggregate(self, per_token: Tensor, mask: Tensor, inputs: dict[str, Any], accumulation: int) -> Tensor:
        loss = ops.aggregate(
            per_token,
            mask,
            self.loss_type,
            num_items=inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes,
            steps_per_generation=self.args.steps_per_generation,
            max_completion_length=self.args.max_completion_length,
            accumulation=accumulation,
        )
        scale = kept_rows.factor(inputs, self.loss_type)
        return loss if scale == 1 else loss * scale

    # Checkpoints: TRL forgets where in a generation window it stopped

    def _save_method_files(self, folder: str) -> None:
        super()._save_method_files(folder)
        window = self.args.steps_per_generation * self.num_iterations
        inside = self._step % window != 0
        content = {
            "step": self._step,
            "buffer": self._buffered_inputs if inside else None,
            "rewards": stateful.states_of(self.reward_funcs),
        }
        if self._missed_evaluation:
            content["evaluate"] = True
        checkpoints.save(os.path.join(folder, checkpoints.rollout_file(self.accelerator.process_index)), content)

    def _load_method_files(self, checkpoint: str) -> None:
        super()._load_method_files(checkpoint)
        path = os.path.join(checkpoint, checkpoints.rollout_file(self.accelerator.process_index))
        content = checkpoints.load(path) if os.path.exists(path) else {}
        self._load_rewards(checkpoint, content.get("rewards"))
        if content:
            self._missed_evaluation = content.get("evaluate", False)
            self._step = content["step"]
            if content["buffer"] is not None:
                device = self.accelerator.device
                self._buffered_inputs = [_to(batch, device) for batch in content["buffer"]]  # type: ignore[assignment]

    def _load_rewards(self, checkpoint: str, saved: list[dict[str, Any]] | None) -> None:
        if saved is not None:
            try:
                stateful.load_states(self.reward_funcs, saved)
            except ValueError as error:
                raise checkpoints.CheckpointError(
                    f"{checkpoint} does not fit this run: {error}. Name the same rewards with the same settings to resume, "
                    "or start a new run from its weights (model_name_or_path)."
                ) from error
        elif found := stateful.stateful(self.reward_funcs):
            names = ", ".join(name for name, _ in found)
            logger.warning(f"{checkpoint} holds no state of reward functions, so that of {names} begins anew")


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
