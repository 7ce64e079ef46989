"""DPOConfig and DPOTrainer: TRL's, with methods for preference pairs. Change one import and name the papers.

TRL runs policy and reference and computes its own losses and metrics, through two callables that keep what they return.
Methods then see both forwards as a `PairInput`, and their losses are added: by name in `loss_type`, weighted by
`loss_weights`, or as auxiliaries. Without a method each override hands straight through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trl
from torch import Tensor

from trl_ext.base import MethodTrainer
from trl_ext.batch import replaced
from trl_ext.compat import check_trl
from trl_ext.forward import captured_hidden, weights_of
from trl_ext.grpo import METHODS_HELP
from trl_ext.method import HIDDEN, REF_LOGPS, REFERENCE, Metrics, PairInput, Setup
from trl_ext.plan import Plan, PlanError, did_you_mean, make_plan, normalise

check_trl()
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""TRL's names in `loss_type`."""
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
    for name in own:
        if name not in args.loss_type:
            listed = ", ".join([*args.loss_type, name])
            problems.append(f"{name}: replaces or joins TRL's loss, so name it: `loss_type: [{name}]` or [{listed}]")
        if args.use_weighting:
            problems.append(f"{name}: use_weighting reaches TRL's losses only; set `use_weighting: false`")
        if args.f_divergence_type != "reverse_kl":
            problems.append(f"{name}: f_divergence_type reaches TRL's losses only; set it to reverse_kl")
    if args.f_divergence_type not in F_DIVERGENCES:
        near = did_you_mean(args.f_divergence_type, F_DIVERGENCES)
        problems.append(
            f"f_divergence_type: '{args.f_divergence_type}' is not one of {', '.join(F_DIVERGENCES)}{near}"
        )
    for method in plan.methods:
        if foreign := sorted(method.needs() - {HIDDEN, REF_LOGPS}):
            problems.append(f"{method.name}: the dpo trainer does not provide {', '.join(foreign)}")
        if REF_LOGPS in method.needs() and args.precompute_ref_log_probs:
            problems.append(
                f"{method.name}: needs the reference per token, which `precompute_ref_log_probs: true` does not keep"
            )
    if problems:
        raise PlanError(problems)


class _Forwards:
    """What policy and reference returned in one call of TRL's loss."""

    policy: Any = None
    reference: Any = None
    hidden: Tensor | None = None


class DPOTrainer(MethodTrainer, trl.DPOTrainer):  # type: ignore[misc]
    """Drop-in for `trl.DPOTrainer`; `args.methods` names the papers. See `trl_ext.method` for what they may add.

    Raises PlanError before the model is loaded when the methods cannot run as configured.
    """

    _tag_names = [*trl.DPOTrainer._tag_names, "trl-ext"]

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        self._make_plan("dpo", args)
        if args is not None:
            check_losses(args, self.plan)
        super().__init__(model, ref_model, args, *rest, **kwargs)
        self._start_methods(Setup(self.args, engine=self._engine()))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        training = self.model.training
        # In evaluation a method's own loss is still needed, or `eval_loss` would lack it; nothing else runs there.
        hooks = ("pair_loss", "pair_aux_loss", "observe_pairs") if training else ("pair_loss",)
        if not self.plan.using(*hooks):
            return super()._compute_loss(model, inputs, return_outputs)
        losses = list(zip(self.loss_types, self.loss_weights, strict=True))
        theirs = [(name, weight) for name, weight in losses if name in LOSS_TYPES]
        seen = _Forwards()
        with replaced(
            self,
            ref_model=self._reference_into(seen, self.ref_model),
            loss_types=[name for name, _ in theirs],
            loss_weights=[weight for _, weight in theirs],
        ):
            result = super()._compute_loss(self._policy_into(seen, model, inputs), inputs, return_outputs)
            x = self._pair_input(seen, inputs, training)
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

    def _policy_into(self, seen: _Forwards, model: Any, inputs: dict[str, Any]) -> Any:
        """The policy as TRL calls it; log-probs and, if a method needs them, hidden states are kept in `seen`."""
        wanted = HIDDEN in self.plan.needs()

        def policy(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):  # TRL recomputes the logits for `compute_metrics`
                return model(**kwargs)
            length = inputs["completion_mask"].size(1) - 1
            with captured_hidden(self._unwrapped(), length, wanted) as hidden:
                seen.policy = model(**kwargs)
            seen.hidden = hidden[0] if wanted else None
            return seen.policy

        return policy

    def _reference_into(self, seen: _Forwards, ref_model: Any) -> Any:
        """The reference as TRL calls `ref_model`; under PEFT that is the policy with the adapter off, or "ref"."""

        def reference(**kwargs: Any) -> Any:
            if ref_model is not None:
                seen.reference = ref_model(**kwargs)
            else:
                with weights_of(REFERENCE, self._unwrapped(), None):
                    seen.reference = self.model(**kwargs)
            return seen.reference

        return reference

    def _pair_input(self, seen: _Forwards, inputs: dict[str, Any], training: bool) -> PairInput:
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
        )

    def _sums(self, forward: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """TRL's sums over a sequence, (B,) chosen and rejected, from a forward that has run; with its gradient.

        `compute_ref_log_probs` runs a model without gradient and sums outside that block; here its model answers with
        the finished forward. Call it while `ref_model` is set, since it would switch a PEFT adapter otherwise.
        """
        return self.compute_ref_log_probs(lambda **kwargs: forward, inputs)
