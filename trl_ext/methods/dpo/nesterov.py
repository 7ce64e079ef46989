"""Nesterov-accelerated preference optimization (the paper's name for it is APO). An anchor ahead of the last policy.

Paper: "Accelerated Preference Optimization for Large Language Model Alignment", arXiv 2410.06293. Card: apo. Nothing to
do with TRL's losses apo_zero and apo_down, which are Anchored Preference Optimization.

Iterated DPO is a proximal point method: every round moves away from an anchor, the policy of the round before. Here the
anchor of round t + 1 is pushed on along the last change, with pi'_t the policy that came out of round t:

    pi_t+1(y|x) = pi'_t+1(y|x) (pi'_t+1(y|x) / pi'_t(y|x))^alpha / Z_t(x),
    log pi_t+1  = log pi'_t+1 + alpha (log pi'_t+1 - log pi'_t) - log Z_t(x)

and a step of exact rounds grows towards 1 / (1 - alpha) times that of the plain iteration. This method is one round in
the mode "logps": the reference of every loss is the first two terms, per token, from two frozen models. pi'_t+1 is TRL's
own reference (the model that training starts from), pi'_t is `previous`. alpha = 0 is TRL. The mode "weights", an anchor
with extrapolated weights that is trained from, is `trl_ext.merging.extrapolated` between rounds; it needs no method.

log Z_t(x) is not known, so only losses are allowed in which it cancels, those of chosen minus rejected log-ratios:
sigmoid, hinge, robust, exo_pair, discopop, aot (it sorts reference differences of whole pairs), and sft, which reads no
reference. `DEPENDS_ON_Z` says why not for the others. ipo is among them: the paper's form takes sums, in which log Z
cancels, but TRL divides each log-ratio by the length of its completion, and so does sigmoid_norm. f-divergences other
than reverse_kl bend each log-ratio before the difference. `ld_alpha` weighs tokens, and Z belongs to none.

Decisions (the card leaves them open): the policy starts from pi'_t+1, since the anchor has no weights to start from;
alpha is 0.3, the factor recommended for extrapolating weights, as the paper's was not seen. The card's `skip_first` is a
setting of the loop `iterative`; here a round is a run, and one without extrapolation is a recipe with alpha 0. What comes
out of it is the trained policy; the card's other output, an anchor with weights, takes the mode "weights".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trl_ext.method import FROZEN, Method, PairInput, ReferenceInput, Setup, param

_ALONE = "reads the chosen and the rejected log-ratio on their own"
_LENGTH = "divides each log-ratio by its completion's length, and the two differ"
DEPENDS_ON_Z = {
    "ipo": _LENGTH,
    "sigmoid_norm": _LENGTH,
    "aot_unpaired": "sorts chosen and rejected log-ratios apart, so those of two prompts meet",
    **dict.fromkeys(("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"), _ALONE),
}
"""TRL's losses in which the anchor's log Z(x) does not cancel, and why."""
CANCELS_Z = ("sigmoid", "hinge", "robust", "exo_pair", "discopop", "aot")
"""TRL's losses of chosen minus rejected log-ratios."""


def anchor_logps(new: Tensor, previous: Tensor, alpha: float) -> Tensor:
    """log pi'_t+1 + alpha (log pi'_t+1 - log pi'_t), of any shape: the anchor's log-probs up to -log Z(x)."""
    return new + alpha * (new - previous)


@dataclass(frozen=True)
class Nesterov(Method):
    """The reference of preference losses is pushed on along the change that the last round made."""

    name = "nesterov"
    title = "Accelerated Preference Optimization for Large Language Model Alignment"
    paper = "2410.06293"
    trainer = "dpo"
    headline = ("alpha", "push_margin", "push_chosen", "push_rejected")
    conflicts = {
        "bco": "bco reads each completion's log-ratio on its own, where the anchor's log Z(x) does not cancel; name one "
        "of them",
    }

    alpha: float = param(
        0.3,
        "momentum; 0 is plain iterated DPO",
        source="card: decision (the paper's value was not seen; 0.3 is recommended for weights)",
        ge=0,
        lt=1,
    )
    previous: str | None = param(
        None,
        "the policy of the round before: folder or Hub name of a model, or folder of an adapter; not read with alpha 0",
        source="card: paper",
    )

    # What it declares

    @property
    def idle(self) -> frozenset[str]:
        """With alpha 0 the reference is TRL's."""
        return frozenset() if self.alpha else frozenset({"reference_logps"})

    def needs(self) -> frozenset[str]:
        """The policy of the round before."""
        return frozenset({FROZEN}) if self.alpha else frozenset()

    def frozen_models(self) -> tuple[str, ...]:
        """`previous`, where it counts."""
        return (self.previous,) if self.alpha and self.previous else ()

    def cost(self) -> str:
        """For the plan."""
        if not self.alpha:
            return "no extra forward"
        return (
            "one more frozen model in memory and one forward of it per step; with precompute_ref_log_probs both are over "
            "before training starts"
        )

    def check(self, setup: Setup) -> list[str]:
        """Losses that need log Z(x), references that move, and no policy to look back on."""
        if not self.alpha:
            return []
        args, problems = setup.args, []
        if not self.previous:
            problems.append(
                "previous: name the policy of the round before (a model, or the folder of an adapter); the first round "
                "has none: set alpha: 0"
            )
        losses = list(getattr(args, "loss_type", None) or [])
        problems += [
            f"loss_type {name} {DEPENDS_ON_Z[name]}: the anchor's log Z(x), which is not known, stays in it; take one "
            f"of {', '.join(CANCELS_Z)}"
            for name in losses
            if name in DEPENDS_ON_Z
        ]
        if losses and set(losses) == {"sft"}:
            problems.append(f"loss_type sft reads no reference; add one of {', '.join(CANCELS_Z)}")
        divergence = getattr(args, "f_divergence_type", "reverse_kl")
        if divergence != "reverse_kl":
            problems.append(
                f"f_divergence_type {divergence} bends each log-ratio on its own, so log Z(x) does not cancel; set it to "
                "reverse_kl"
            )
        if getattr(args, "sync_ref_model", False):
            problems.append("sync_ref_model moves the reference inside the round; set sync_ref_model: false")
        return problems

    # Loss

    def reference_logps(self, logps: Tensor, x: ReferenceInput) -> Tensor:
        """(2B, S) of TRL's reference -> of the anchor, up to log Z(x)."""
        previous = x.other(str(self.previous))
        if x.training:
            self._log(self.alpha * (logps - previous), x)
        return anchor_logps(logps, previous, self.alpha)

    def _log(self, push: Tensor, x: ReferenceInput) -> None:
        """`push_chosen`, `push_rejected`: change of the reference's sums, in nats; `push_margin`: of their difference."""
        chosen, rejected = push.sum(1).chunk(2)
        x.metrics.mean("push_chosen", chosen)
        x.metrics.mean("push_rejected", rejected)
        x.metrics.mean("push_margin", chosen - rejected)

    def observe_pairs(self, x: PairInput) -> None:
        """`alpha` in the log."""
        x.metrics.mean("alpha", self.alpha)
