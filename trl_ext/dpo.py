"""DPOConfig and DPOTrainer: TRL's, with methods for preference pairs. Change one import and name the papers.

TRL runs policy and reference and computes its own losses and metrics, through two callables that keep what they return.
Methods then see both forwards as a `PairInput`, and their losses are added: by name in `loss_type`, weighted by
`loss_weights`, or as auxiliaries. Without a method each override hands straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor

from trl_ext.batch import replaced
from trl_ext.compat import check_trl
from trl_ext.frozen import FrozenModels
from trl_ext.grpo import METHODS_HELP
from trl_ext.method import FROZEN, HIDDEN, REF_LOGPS, Metrics, PairInput, ReferenceInput, Setup
from trl_ext.plan import Plan, PlanError, did_you_mean, make_plan, normalise
from trl_ext.recording import Forwards, RecordingTrainer

check_trl()
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""TRL's names in `loss_type`."""
READ_BY = {
    "label_smoothing": ("exo_pair", "robust", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}
"""Setting of TRL -> its losses that read it."""
F_ALPHA = trl.DPOConfig.f_alpha_divergence_coef
"""TRL's default, which nothing reads without `f_divergence_type: alpha_divergence`."""
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's DPOConfig with `methods`. Names and values are checked here (PlanError).

    `loss_type` may name TRL's losses and those methods of `methods` that bring a loss for pairs.
    """

    _VALID_DICT_FIELDS = trl.DPOConfig._VALID_DICT_FIELDS + ["methods"]

    methods: dict[str, Any] | str | None = field(default=None, metadata={"help": METHODS_HELP})

    def __post_init__(self) -> None:
        self.methods = normalise(self.methods)
        super().__post_init__()
        check_losses(self, make_plan(self.methods, "dpo", Setup(self)))


def check_losses(args: trl.DPOConfig, plan: Plan) -> None:
    """Raises PlanError when `loss_type` and the methods of `plan` do not fit, with every reason."""
    own = [method.name for method in plan.using("pair_loss")]
    known = [*LOSS_TYPES, *own]
    problems = [
        f"loss_type: '{name}' is neither a loss of TRL nor a method under `methods` that brings one"
        f"{did_you_mean(name, known)} (known here: {', '.join(known)})"
        for name in args.loss_type
        if name not in known
    ]
    problems += _unread_settings(args, own)
    for name in own:
        if name not in args.loss_type:
            listed = ", ".join([*args.loss_type, name])
            problems.append(f"{name}: replaces or joins TRL's loss, so name it: `loss_type: [{name}]` or [{listed}]")
        if args.use_weighting:
            problems.append(f"{name}: use_weighting reaches TRL's losses only; set `use_weighting: false`")
        if args.f_divergence_type != "reverse_kl":
            problems.append(f"{name}: f_divergence_type reaches TRL's losses only; set it to reverse_kl")
        if args.f_alpha_divergence_coef != F_ALPHA:
            problems.append(
                f"{name}: f_alpha_divergence_coef is read by TRL's alpha_divergence only; leave it at {F_ALPHA}"
            )
    if args.f_divergence_type not in F_DIVERGENCES:
        near = did_you_mean(args.f_divergence_type, F_DIVERGENCES)
        problems.append(
            f"f_divergence_type: '{args.f_divergence_type}' is not one of {', '.join(F_DIVERGENCES)}{near}"
        )
    for method in plan.methods:
        if foreign := sorted(method.needs() - {FROZEN, HIDDEN, REF_LOGPS}):
            problems.append(f"{method.name}: the dpo trainer does not provide {', '.join(foreign)}")
        if REF_LOGPS in method.needs() and args.precompute_ref_log_probs:
            problems.append(
                f"{method.name}: needs the reference per token, which `precompute_ref_log_probs: true` does not keep"
            )
    if problems:
        raise PlanError(problems)


def _unread_settings(args: trl.DPOConfig, own: Sequence[str]) -> list[str]:
    """Settings of TRL's losses that are not at their defaults beside methods' losses, where no loss reads them."""
    defaults = {f.name: f.default for f in fields(trl.DPOConfig)}
    return [
        f"{' and '.join(own)}: {key}: {getattr(args, key)} reaches none of loss_type; leave it at {defaults[key]}, or add "
        f"a loss that reads it ({', '.join(readers)})"
        for key, readers in READ_BY.items()
        if own and getattr(args, key) != defaults[key] and not set(readers) & set(args.loss_type)
    ]


@dataclass(frozen=True)
class _WithColumns:
    """A collator that adds the numbers of some columns, which TRL's own drops, as (B,) float32."""

    collate: Callable[[Any], dict[str, Any]]
    columns: tuple[str, ...]
    plan: Plan

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if problems := [p for name in self.columns for p in _bad_numbers(self.plan, name, [r[name] for r in rows])]:
            raise PlanError([f"{problem} (row of this batch)" for problem in problems])  # a stream has no other row
        found = {name: torch.tensor([float(row[name]) for row in rows]) for name in self.columns}
        return {**self.collate(rows), **found}


def check_columns(plan: Plan, *data: Any) -> None:
    """Raises PlanError for a column that a method of `plan` reads and a data set (None: there is none) lacks."""
    problems = []
    for each in (d for one in data for d in (one.values() if isinstance(one, dict) else [one]) if d is not None):
        known = each.column_names or list(next(iter(each)))  # a stream may not know its columns
        problems += [
            f"{method.name}: reads the column '{name}', the data set has: {', '.join(known)}{did_you_mean(name, known)}"
            for method in plan.methods
            for name in method.pair_columns()
            if name not in known
        ]
        for name in dict.fromkeys(n for m in plan.methods for n in m.pair_columns() if n in known):
            problems += _bad_numbers(plan, name, each[name]) if isinstance(each, Dataset) else []
    if problems:
        raise PlanError(dict.fromkeys(problems))


def _bad_numbers(plan: Plan, name: str, values: Iterable[Any]) -> list[str]:
    """The first value of a column that is no finite number, or out of the range of a method that reads it."""
    for method in (m for m in plan.methods if name in m.pair_columns()):
        low, high = method.column_ranges.get(name, (-math.inf, math.inf))
        for row, value in enumerate(values):
            if not (isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high):
                return [
                    f"{method.name}: column '{name}', row {row} (from 0): {value!r} is not a finite number in "
                    f"[{low:g}, {high:g}]; mend or leave out such rows"
                ]
    return []


class DPOTrainer(RecordingTrainer, trl.DPOTrainer):  # type: ignore[misc]
    """Drop-in for `trl.DPOTrainer`; `args.methods` names the papers. See `trl_ext.method` for what they may add.

    Raises PlanError before the model is loaded when the methods cannot run as configured.
    """

    _tag_names = [*trl.DPOTrainer._tag_names, "trl-ext"]
    _frozen: FrozenModels | None = None
    _built: bool = False

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        self._make_plan("dpo", args)
        if args is not None:
            check_losses(args, self.plan)
        own = dict(zip(("data_collator", "train_dataset", "eval_dataset"), rest, strict=False)) | kwargs
        check_columns(self.plan, own.get("train_dataset"), own.get("eval_dataset"))
        super().__init__(model, ref_model, args, *rest, **kwargs)
        if columns := self._pair_columns():
            self.data_collator = _WithColumns(self.data_collator, columns, self.plan)
        self._start_methods(Setup(self.args, engine=self._engine()))
        if self.precompute_ref_logps:
            self._frozen = None  # has done its part
        elif FROZEN in self.plan.needs():
            self._frozen_models()
        self._built = True

    def _pair_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for method in self.plan.methods for name in method.pair_columns()))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's; other data than the trainer was made with must have the methods' columns too (PlanError)."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            check_columns(self.plan, eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: Any = self._signature_columns
        known.extend(name for name in self._pair_columns() if name not in known)

    def _without_columns(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What TRL may hand to the model."""
        own = self._pair_columns()
        return {key: value for key, value in inputs.items() if key not in own} if own else inputs

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """TRL's, without the methods' columns and with the methods' reference."""
        return super().compute_ref_log_probs(self._changed(model, False), self._without_columns(inputs))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's. Its cache knows data and reference; what methods make of the reference goes into the key as well, and
        columns that an earlier reference left are made anew."""
        changing = self.plan.using("reference_logps")
        if not changing or not isinstance(dataset, Dataset):  # TRL says what is wrong with a stream
            return super()._precompute_ref_logps(dataset, name, batch_size)
        old = [column for column in ("ref_chosen_logps", "ref_rejected_logps") if column in dataset.column_names]
        others = [self._frozen_models().key(method.frozen_models()) for method in changing]
        with replaced(self, _precompute_model_hash=repr((self._precompute_model_hash, changing, others))):
            found = super()._precompute_ref_logps(dataset.remove_columns(old), name, batch_size)
        if self._built:  # a data set to evaluate on, later
            self._frozen = None
        return found

    def _frozen_models(self) -> FrozenModels:
        """The models that the methods name, loaded at the first call."""
        if self._frozen is None:
            device, autocast = self.accelerator.device, self.accelerator.autocast
            self._frozen = FrozenModels(self._unwrapped(), self.args, device, autocast)
            for method in self.plan.methods:
                self._frozen.load(method.frozen_models())
        return self._frozen

    def _changed(self, model: Any, training: bool) -> Any:
        """The reference as TRL calls it, with the log-probs that the methods make of its own."""
        if not self.plan.using("reference_logps"):
            return model

        def reference(**kwargs: Any) -> Any:
            output, labels = model(**kwargs), kwargs["labels"][:, 1:]
            x = ReferenceInput(
                mask=labels != -100,
                training=training,
                metrics=(training and self._method_metrics) or Metrics(),
                other=lambda path: self._frozen_models().log_probs(path, kwargs),
            )
            own = output.log_probs[:, -labels.size(1) :]  # without the virtual tokens of a prompt adapter
            output.log_probs = self.plan.fold("reference_logps", own, x)
            return output

        return reference

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        training, columns = self.model.training, {name: inputs[name] for name in self._pair_columns()}
        inputs = self._without_columns(inputs)
        # In evaluation a method's reference and loss are still needed for `eval_loss`; nothing else runs there.
        hooks = ("reference_logps", "pair_loss", *(("pair_aux_loss", "observe_pairs") if training else ()))
        if not self.plan.using(*hooks):
            return super()._compute_loss(model, inputs, return_outputs)
        losses = list(zip(self.loss_types, self.loss_weights, strict=True))
        theirs = [(name, weight) for name, weight in losses if name in LOSS_TYPES]
        seen = Forwards()
        with replaced(
            self,
            ref_model=self._changed(self._reference_into(seen, self.ref_model), training),
            loss_types=[name for name, _ in theirs],
            loss_weights=[weight for _, weight in theirs],
        ):
            result = super()._compute_loss(self._policy_into(seen, model, inputs), inputs, return_outputs)
            x = self._pair_input(seen, inputs, columns, training)
        loss, outputs = result if return_outputs else (result, None)
        for name, weight in losses:
            if name not in LOSS_TYPES:
                loss = loss + self._own_loss(name, x).mean() * weight
        if training:
            for method in self.plan.using("pair_aux_loss"):
                aux = method.pair_aux_loss(x.for_method(method.name))
                loss = loss if aux is None else loss + aux
            for method in self.plan.using("observe_pairs"):
                method.observe_pairs(x.for_method(method.name))
        return (loss, outputs) if return_outputs else loss

    def _own_loss(self, name: str, x: PairInput) -> Tensor:
        method = next(m for m in self.plan.methods if m.name == name)
        loss = method.pair_loss(x.for_method(name))
        if loss is None or loss.shape != x.chosen.shape:
            got = None if loss is None else tuple(loss.shape)
            raise ValueError(f"{name}: pair_loss must return one loss per pair, {tuple(x.chosen.shape)}, got {got}")
        return loss

    def _pair_input(
        self, seen: Forwards, inputs: dict[str, Any], columns: dict[str, Tensor], training: bool
    ) -> PairInput:
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = self._sums(seen.policy, inputs)
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self._sums(seen.reference, inputs)
        return PairInput(
            logps=seen.policy.log_probs[:, -mask.size(1) :],
            ref_logps=None if seen.reference is None else seen.reference.log_probs[:, -mask.size(1) :],
            mask=mask,
            chosen=chosen,
            rejected=rejected,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            beta=self.beta,
            step=self.state.global_step,
            metrics=(training and self._method_metrics) or Metrics(),  # evaluation leaves no trace in training's
            policy=None if seen.hidden is None else self._policy_features(seen.hidden),
            gather=self._gather_values,
            columns=columns,
            training=training,
        )

    def _sums(self, forward: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """TRL's sums over a sequence, (B,) chosen and rejected, from a forward that has run; with its gradient.

        `compute_ref_log_probs` runs a model without gradient and sums outside that block; here its model answers with
        the finished forward. Call it while `ref_model` is set, since it would switch a PEFT adapter otherwise.
        """
        return super().compute_ref_log_probs(lambda **kwargs: forward, inputs)
