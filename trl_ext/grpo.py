"""GRPOConfig and GRPOTrainer: TRL's, with methods. Change one import and name the papers.

TRL's own code computes every loss type, clip, correction and metric. The trainer runs TRL's forward once, lets the
methods make token advantages, a mask and weights from it, and calls TRL's loss on a copy of the batch while that
forward is remembered. Without a method each override hands straight through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from trl_ext import checkpoints, ops
from trl_ext.base import MethodTrainer
from trl_ext.compat import check_trl, multimodal_names
from trl_ext.forward import Features, captured_hidden
from trl_ext.method import HIDDEN, REFERENCE, TEACHER, Group, LossInput, Metrics, Rollout, Setup
from trl_ext.plan import PlanError, make_plan, normalise

check_trl()
_MULTIMODAL = multimodal_names()
_CHOICES = {
    "loss_type": ops.LOSS_TYPES,
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
}

METHODS_HELP = (
    "Papers to switch on: a name, a list of names, or a mapping of name to settings, e.g. "
    "`{trace: {action: rkl_error}, high_entropy: {quantile: 0.8}}`. `trl-ext methods` lists them."
)


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's GRPOConfig with `methods`. Names and values are checked here, all problems at once (PlanError)."""

    _VALID_DICT_FIELDS = trl.GRPOConfig._VALID_DICT_FIELDS + ["methods"]

    methods: dict[str, Any] | str | None = field(default=None, metadata={"help": METHODS_HELP})

    def __post_init__(self) -> None:
        self.methods = normalise(self.methods)
        super().__post_init__()
        wrong = [
            f"{name}: {getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}"
            for name, allowed in _CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        if wrong:
            raise PlanError(wrong, "The configuration has values that TRL would refuse only at the first loss")
        make_plan(self.methods, "grpo", Setup(self))


@dataclass(frozen=True)
class _Scored:
    """What reward functions saw and gave: local rows, and rewards (world * rows, F) before shaping."""

    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completion_ids: Sequence[list[int]]
    rewards: Tensor


class GRPOTrainer(MethodTrainer, trl.GRPOTrainer):  # type: ignore[misc]
    """Drop-in for `trl.GRPOTrainer`; `args.methods` names the papers. See `trl_ext.method` for what they may change.

    Raises PlanError before the model is loaded when the methods cannot run as configured.
    """

    _tag_names = [*trl.GRPOTrainer._tag_names, "trl-ext"]
    _scored: _Scored | None = None
    _remembered: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        self._make_plan("grpo", args)
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if self._is_vlm and (users := [m.name for m in self.plan.methods if m.needs() & {TEACHER, REFERENCE}]):
            raise PlanError([f"{name}: runs a second forward, which is text-only so far" for name in users])
        self._start_methods(Setup(self.args, self.reward_func_names, self._columns(), self._engine()))

    @functools.cached_property
    def decode_one(self) -> Callable[[int], str]:
        """Text of one token id, remembered: rollouts ask for the same few thousand ids over and over."""
        return functools.cache(lambda token: self._tokenizer.decode([token], skip_special_tokens=True))

    def _columns(self) -> list[str] | None:
        return getattr(self.train_dataset, "column_names", None)

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.plan.methods and self.model.training):
            return super()._generate_and_score_completions(inputs)
        for method in self.plan.using("edit_prompts"):
            inputs = method.edit_prompts(inputs)
        batch = super()._generate_and_score_completions(inputs)
        scored, self._scored = self._scored, None
        assert scored is not None  # TRL always calls _calculate_rewards
        if self.plan.on_groups:
            self._use_groups(batch, scored)
        if self.plan.using("streams"):
            self._add_streams(batch, scored)
        return batch

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not (self.plan.methods and self.model.training):
            return rewards
        self._scored = _Scored(inputs, prompts, completion_ids_list, rewards)
        if not self.plan.using("shape_rewards"):
            return rewards
        group = self._group(self._scored, torch.zeros_like(rewards[:, 0]))
        for i, name in enumerate(self.reward_func_names):
            group.metrics.mean(f"rewards/{name}/unshaped", rewards[:, i].nan_to_num(), ~rewards[:, i].isnan())
        return self.plan.fold("shape_rewards", group.rewards, group).flatten(0, 1)

    def _group(self, scored: _Scored, advantages: Tensor) -> Group:
        """`advantages` (world * rows,) -> the view in whole groups; lengths are gathered once."""
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)  # TRL counts padding as an end too
        device = scored.rewards.device
        local = [[len(ids), int(not ids or ids[-1] not in ends)] for ids in scored.completion_ids]
        lengths, cut = self.accelerator.gather(torch.tensor(local, device=device)).unbind(1)
        size = self.args.num_generations
        return Group(
            rewards=scored.rewards.view(-1, size, len(self.reward_func_names)),
            advantages=advantages.view(-1, size),
            lengths=lengths.view(-1, size),
            truncated=cut.view(-1, size).bool(),
            reward_names=self.reward_func_names,
            step=self.state.global_step,
            metrics=self._metrics_store(),
        )

    def _metrics_store(self) -> Metrics:
        if self._method_metrics is None:
            self._method_metrics = Metrics()
        return self._method_metrics

    def _use_groups(self, batch: dict[str, Any], scored: _Scored) -> None:
        group = self._group(scored, self.accelerator.gather(batch["advantages"]))
        advantages = self.plan.fold("group_advantages", group.advantages, group)
        if advantages is not group.advantages:
            rows = len(scored.rows)
            everyone = advantages.flatten()
            batch["advantages"] = everyone[self.accelerator.process_index * rows :][:rows]
            shown: Any = self._logs["advantages"]  # the completions table holds TRL's values for these rows
            for _ in range(everyone.numel()):
                shown.pop()
            shown.extend(everyone.tolist())
        for method in self.plan.using("observe"):
            method.observe(group.for_method(method.name))

    def _add_streams(self, batch: dict[str, Any], scored: _Scored) -> None:
        rollout = self._rollout(batch, scored)
        for method in self.plan.using("streams"):
            for key, value in method.streams(rollout.for_method(method.name)).items():
                if value.size(0) != len(scored.rows):
                    raise ValueError(f"{method.name}: stream '{key}' has {value.size(0)} rows, not {len(scored.rows)}")
                batch[f"{method.name}/{key}"] = value

    def _rollout(self, batch: dict[str, Any], scored: _Scored) -> Rollout:
        rows, start = len(scored.rows), self.accelerator.process_index * len(scored.rows)
        return Rollout(
            rows=scored.rows,
            prompts=scored.prompts,
            completions=self._tokenizer.batch_decode(scored.completion_ids, skip_special_tokens=True),
            completion_ids=batch["completion_ids"],
            mask=_loss_mask(batch),
            rewards=scored.rewards[start : start + rows],
            advantages=batch["advantages"],
            reward_names=self.reward_func_names,
            step=self.state.global_step,
            pad_token_id=self._tokenizer.pad_token_id,
            metrics=self._metrics_store(),
            decode_one=self.decode_one,
            encode_prompts=lambda prompts: self._tokenize_prompts(list(prompts))[0],
            generate=self._answer,
            entropies=lambda: self._entropies(batch),
            gather=self._gather_values,
        )

    def _entropies(self, batch: dict[str, Any]) -> Tensor:
        ids, mask = _whole(batch)
        size = self.args.per_device_train_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            _, entropies, _ = super()._get_per_token_logps_and_entropies(
                self.model, ids, mask, batch["completion_ids"].size(1), size, compute_entropy=True, **_images(batch)
            )
        return entropies

    def _answer(self, prompts: Sequence[Any], max_new_tokens: int) -> list[str]:
        """Greedy answers of the current policy, thinking off, through TRL's own generation."""
        ids = [
            self._tokenizer.apply_chat_template(
                p, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
            )
            for p in prompts
        ]
        with self._greedy(max_new_tokens):
            completion_ids, _ = self._generate_single_turn(ids, None, {}, num_generations=1)
        return self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)

    def _greedy(self, max_new_tokens: int) -> contextlib.AbstractContextManager[None]:
        """TRL's generation, answering greedily inside the block."""
        if self.use_vllm:
            return replaced(self.vllm_generation, max_completion_length=max_new_tokens, temperature=0.0)
        sampling = dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))  # would only draw warnings
        greedy = {**self.generation_kwargs, **sampling, "max_new_tokens": max_new_tokens, "do_sample": False}
        config = type(self.generation_config)(**greedy, disable_compile=True)
        return replaced(self, generation_config=config, generation_kwargs=greedy)

    # Loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._remembered is not None:
            return self._remembered
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's step; a loss that is not finite is counted, since the logged average would hide it."""
        loss = super().training_step(*args, **kwargs)
        self._note_loss(loss)
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not (self.model.training and self.plan.in_loss):
            return super()._compute_loss(model, inputs)
        forward, features = self._forward(model, inputs)
        x = self._loss_input(inputs, forward, features)
        view, surrogate = self._transformed(inputs, x)
        beta = self.beta
        for method in self.plan.using("kl_coef"):
            beta = method.kl_coef(beta, x.step)
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
        ids, mask = _whole(inputs)
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
                **_images(inputs),
            )
        return forward, self._policy_features(torch.cat(seen)) if wanted else None

    def _loss_input(self, inputs: dict[str, Any], forward: Any, features: Features | None) -> LossInput:
        mask = _loss_mask(inputs)

        def other(
            which: str, rows: Tensor | None = None, prompt_ids: Tensor | None = None, prompt_mask: Tensor | None = None
        ) -> Features:
            return self._other(inputs, which, rows, prompt_ids, prompt_mask)

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
            loss_type=self.loss_type,
            metrics=self._metrics_store(),
            policy=features,
            other=other,
            aggregate=lambda per_token: self._aggregate(per_token, mask, inputs, accumulation=1),
            gather=self._gather_values,
            scratch={},
        )

    def _other(
        self, inputs: dict[str, Any], which: str, rows: Tensor | None, prompt_ids: Any, prompt_mask: Any
    ) -> Features:
        """`rows` (R,) indices; `prompt_ids`, `prompt_mask` (R, L) replace those rows' prompts."""
        if rows is None:
            rows = torch.arange(inputs["completion_ids"].size(0), device=inputs["completion_ids"].device)
        prompt_ids = inputs["prompt_ids"][rows] if prompt_ids is None else prompt_ids
        prompt_mask = inputs["prompt_mask"][rows] if prompt_mask is None else prompt_mask
        ids = torch.cat([prompt_ids, inputs["completion_ids"][rows]], dim=1)
        mask = torch.cat([prompt_mask, inputs["completion_mask"][rows]], dim=1)
        return self._other_features(which, ids, mask, inputs["completion_ids"].size(1))

    def _transformed(self, inputs: dict[str, Any], x: LossInput) -> tuple[dict[str, Any], Tensor | None]:
        """A copy of the batch as the methods want TRL to see it, and a replaced policy term if there is one.

        The buffered slice is used again when `num_iterations > 1`, so it is never written to; what no method changed
        stays the same object, which keeps TRL's path bit for bit.
        """
        view = dict(inputs)
        advantages = self.plan.fold("token_advantages", x.advantages, x)
        mask = self.plan.fold("loss_mask", x.mask, x)
        if mask is not x.mask:
            view["tool_mask"] = mask.to(inputs["completion_mask"].dtype)
        ones = torch.ones_like(x.logps, requires_grad=False)
        weights = self.plan.fold("token_weights", ones, x)
        if weights is not ones:
            advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages) * weights
        view["advantages"] = advantages
        surrogate = None
        x = dataclasses.replace(x, advantages=advantages, mask=mask)
        for method in self.plan.using("surrogate"):
            surrogate = method.surrogate(x.for_method(method.name))
        if surrogate is not None:
            view["advantages"] = torch.zeros_like(advantages)
            steps = self.current_gradient_accumulation_steps
            per_token = surrogate.dim() == 2
            surrogate = self._aggregate(surrogate, mask, inputs, steps) if per_token else surrogate / steps
        return view, surrogate

    def _aggregate(self, per_token: Tensor, mask: Tensor, inputs: dict[str, Any], accumulation: int) -> Tensor:
        return ops.aggregate(
            per_token,
            mask,
            self.loss_type,
            num_items=inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes,
            steps_per_generation=self.args.steps_per_generation,
            max_completion_length=self.args.max_completion_length,
            accumulation=accumulation,
        )

    # Checkpoints: TRL forgets where in a generation window it stopped

    def _save_method_files(self, folder: str) -> None:
        super()._save_method_files(folder)
        window = self.args.steps_per_generation * self.num_iterations
        inside = self._step % window != 0
        content = {"step": self._step, "buffer": self._buffered_inputs if inside else None}
        checkpoints.save(os.path.join(folder, checkpoints.rollout_file(self.accelerator.process_index)), content)

    def _load_method_files(self, checkpoint: str) -> None:
        super()._load_method_files(checkpoint)
        path = os.path.join(checkpoint, checkpoints.rollout_file(self.accelerator.process_index))
        if os.path.exists(path):
            content = checkpoints.load(path)
            self._step = content["step"]
            if content["buffer"] is not None:
                device = self.accelerator.device
                self._buffered_inputs = [_to(batch, device) for batch in content["buffer"]]  # type: ignore[assignment]


@contextlib.contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    """`target` has these attribute values inside the block and its own again afterwards, also after an error."""
    own = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(target, name, value)


def _whole(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompt and completion joined: ids and attention mask (B, L + T)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _images(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs.get(name) for name in _MULTIMODAL}


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
