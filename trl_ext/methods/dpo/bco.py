"""BCO: the implicit reward of DPO as the logit of a binary classifier.

Paper: "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656. Card: bco.

    r_i = beta (log pi_theta(y_i | x_i) - log pi_ref(y_i | x_i))
    L_i = -log sigmoid(r_i - delta)             thumbs up
    L_i = -w(x_i) log sigmoid(-(r_i - delta))   thumbs down

For any delta, -log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta)) > -log sigmoid(r_w - r_l): an upper bound of DPO
whose error exp(-(r_w - delta)) + exp(r_l - delta) is smallest at delta = (r_w + r_l) / 2. Hence the reward shift

    delta = (m+ + m-) / 2,   m <- a m + (1 - a) mean of the class in this batch   (class_ema)

moved by a batch before that batch uses it, in training only. Thumbs-down prompts that come from elsewhere are weighed
by the density ratio of a classifier on prompt embeddings, p = P(thumbs up | x) (underlying distribution matching, UDM):

    w(x) = clip(p / (1 - p + 1e-8), min_density_ratio, max_density_ratio)

A batch is an optimizer step: while its micro-batches come in, the class means are those of its micro-batches so far.
So m after a step does not depend on how the step was cut, and the memory a counts steps; the delta that the first
micro-batches use does depend on it. Pairs: the loss of a pair is the sum of its two terms, as TRL's `bco_pair`.

The card has not seen the paper's EMA decay, beta and learning rate (decisions: 0.9, 0.1 and 5e-7, the last two old
TRL's). The first batch starts an average, without bias correction; a class not seen yet counts as 0, its reward at the
reference. `running_mean`, UDM and its clips are those of TRL's BCOTrainer, which 1.16 no longer has. On pairs, shift
none is TRL's `bco_pair`.

Rewards that are not finite enter no average and no delta; they stay in the loss, and `rewards_not_finite` counts them.
A prompt without a token has no embedding: its row is not drawn for the classifier and weighs 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_ext.checks import unread
from trl_ext.method import REFERENCE, LabelInput, LabelSet, Method, PairInput, Setup, param
from trl_ext.plan import PlanError

SHIFTS = ("class_ema", "running_mean", "none")
REFERENCE_EMBEDDING = "reference"


def classifier_losses(rewards: Tensor, label: Tensor, delta: Tensor | float, weight: Tensor | float = 1.0) -> Tensor:
    """(B,) rewards and bool labels -> (B,) binary cross-entropy at the shifted rewards; `weight` is for label 0."""
    signed = torch.where(label, rewards - delta, delta - rewards)
    return -logsigmoid(signed) * torch.where(label, torch.ones_like(rewards), weight * torch.ones_like(rewards))


def density_ratio(p: Tensor, low: float, high: float) -> Tensor:
    """w = clip(p / (1 - p + 1e-8), low, high) for p = P(thumbs up | prompt), any shape."""
    return (p / (1 - p + 1e-8)).clamp(low, high)


@torch.no_grad()
def class_ema(state: Mapping[str, Any], rewards: Tensor, label: Tensor, step: int, decay: float) -> dict[str, Any]:
    """The averages of both classes after a (micro-)batch of optimizer step `step`; `state` is left as it is.

    Tensors of two entries, thumbs down then up: `before` the averages before this step and `known` (bool) which classes
    had one, `sum` and `count` of this step's finite rewards so far, `mean` the averages now and `seen` (bool) which
    classes have one, 0 elsewhere. The first batch with a class starts its average.
    """
    nothing, none = rewards.new_zeros(2), torch.zeros(2, dtype=torch.bool, device=rewards.device)
    if state.get("step") == step:
        before, known, total, count = (state[key].to(rewards.device) for key in ("before", "known", "sum", "count"))
    else:
        before, known = state.get("mean", nothing).to(rewards.device), state.get("seen", none).to(rewards.device)
        total, count = nothing, nothing
    finite = rewards.isfinite()
    classes = (torch.stack([~label, label]) & finite).to(rewards.dtype)
    total, count = total + classes @ torch.where(finite, rewards, 0.0), count + classes.sum(1)
    batch = total / count.clamp(min=1)
    moved = torch.where(known, decay * before + (1 - decay) * batch, batch)
    mean = torch.where(count > 0, moved, before)
    now = {"mean": mean, "seen": known | (count > 0)}
    return {"step": step, "before": before, "known": known, "sum": total, "count": count, **now}


@torch.no_grad()
def running_mean(state: Mapping[str, Any], rewards: Tensor) -> dict[str, Any]:
    """Mean and number of all finite rewards seen: mean <- mean + (batch_mean - mean) n_batch / (n + n_batch)."""
    finite, old = rewards.isfinite(), state.get("mean", rewards.new_zeros(())).to(rewards.device)
    seen = finite.sum() + state.get("seen", 0)
    return {"mean": old + torch.where(finite, rewards - old, 0.0).sum() / seen.clamp(min=1), "seen": seen}


def delta_of(shift: str, state: Mapping[str, Any], like: Tensor) -> Tensor:
    """The reward shift, a scalar. A class that was never seen counts as 0, its reward at the reference."""
    if shift == "none" or "mean" not in state:
        return like.new_zeros(())
    mean = state["mean"].to(like.device)
    return mean.mean() if shift == "class_ema" else mean


def fit_classifier(embeddings: Tensor, label: Tensor) -> dict[str, Any]:
    """Class-balanced logistic regression (n, E) -> label (n,): its weights, and the share right in each class."""
    from sklearn.linear_model import LogisticRegression

    x, y = embeddings.double().numpy(), label.numpy()
    fitted = LogisticRegression(class_weight="balanced", max_iter=1000).fit(x, y)
    right = torch.from_numpy(fitted.predict(x) == y)
    return {
        "coef": torch.tensor(fitted.coef_[0], dtype=torch.float32),
        "intercept": float(fitted.intercept_[0]),
        "right_up": float(right[label].double().mean()),
        "right_down": float(right[~label].double().mean()),
    }


def desirable_probability(classifier: Mapping[str, Any], embeddings: Tensor) -> Tensor:
    """(n, E) -> (n,) P(thumbs up | prompt)."""
    return torch.sigmoid(embeddings.float() @ classifier["coef"].to(embeddings.device) + classifier["intercept"])


def draw_prompts(label: Tensor, count: int, seed: int) -> Tensor:
    """Up to `count` random rows of each class of `label` (N,), thumbs up first."""
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.nonzero(wanted).squeeze(1) for wanted in (label, ~label)]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in classes])


@dataclass(frozen=True)
class Bco(Method):
    """A binary classifier of good and bad answers, with a reward shift between the classes.

    In the dpo trainer on pairs, under the name `bco` in `loss_type` beside TRL's losses; in the kto trainer on labelled
    completions, with `loss_type: bco`.
    """

    name = "bco"
    title = "Binary Classifier Optimization for Large Language Model Alignment"
    paper = "2404.04656"
    trainer = "dpo"
    also_in = ("kto",)
    headline = ("delta",)

    shift: str = param(
        "class_ema",
        "How delta is made: class_ema, running_mean (of all rewards, as TRL's removed BCOTrainer), or none (0)",
        source="card: paper (the EMA of both classes); the default is the card's decision",
        choices=SHIFTS,
    )
    shift_decay: float = param(
        0.9, "Memory a of class_ema, per optimizer step", source="card: decision, paper value not seen", ge=0.0, lt=1.0
    )
    udm: bool = param(
        False, "Weigh thumbs-down prompts by a density ratio (kto trainer)", source="card: paper v1 abstract, old TRL"
    )
    embedding: str = param(
        REFERENCE_EMBEDDING,
        "Of prompts: `reference`, the mean hidden state of the frozen model; or folder or name of a sentence encoder",
        source="card: decision, a frozen embedding function that the user chooses",
    )
    prompt_sample_size: int = param(
        1024, "Prompts of each class for the classifier", source="card: released code, old TRL", gt=0
    )
    min_density_ratio: float = param(0.5, "Lower clip of w", source="card: released code, old TRL", gt=0.0)
    max_density_ratio: float = param(10.0, "Upper clip of w", source="card: released code, old TRL", gt=0.0)

    @property
    def idle(self) -> frozenset[str]:
        hooks = {"start_labels"} if not self.udm else set()
        return frozenset(hooks | ({"observe_pairs", "observe_labels"} if self.shift == "none" else set()))

    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE} if self.udm and self.embedding == REFERENCE_EMBEDDING else ())

    def sentence_encoders(self) -> tuple[str, ...]:
        return (self.embedding,) if self.udm and self._encoder is not None else ()

    def cost(self) -> str:
        if not self.udm:
            return "no extra forward"
        drawn = f"once a forward of up to {2 * self.prompt_sample_size} prompts"
        encoder = f"; the sentence encoder {self._encoder} in memory on each process" if self._encoder else ""
        return f"{drawn}; each step one of its thumbs-down prompts{encoder}"

    def check(self, setup: Setup) -> list[str]:
        udm = ("embedding", "prompt_sample_size", "min_density_ratio", "max_density_ratio")
        problems = unread(
            self, {"shift: class_ema": (self.shift == "class_ema", ["shift_decay"]), "udm: true": (self.udm, udm)}
        )
        if self.min_density_ratio > self.max_density_ratio:
            problems.append(
                f"min_density_ratio {self.min_density_ratio} is above max_density_ratio {self.max_density_ratio}"
            )
        if self.udm and isinstance(setup.args, trl.DPOConfig):
            problems.append(
                "udm has nothing to match on pairs: chosen and rejected answer the same prompts; set udm: false, or use "
                "`trainer: kto` with labelled completions"
            )
        if self.udm and self._encoder is None and getattr(setup.args, "sync_ref_model", False):
            problems.append(
                "sync_ref_model moves the reference, whose embeddings the prompt classifier was fitted to; set "
                "sync_ref_model: false, or name a sentence encoder in `embedding`"
            )
        return problems

    def state_problem(self, state: Mapping[str, Any]) -> str | None:
        """A checkpoint's averages are of one rule for delta and one memory, its classifier is of one embedding."""
        average = state.get("shift", {"rule": "none"})
        if average["rule"] != self.shift:
            return f"its averages are those of shift: {average['rule']}, this run has shift: {self.shift}; set that to resume"
        decay = average.get("decay", self.shift_decay)
        if decay != self.shift_decay:
            return f"its averages are those of shift_decay: {decay}, this run has shift_decay: {self.shift_decay}; set that to resume"
        then, now = (str(on).lower() for on in ("udm" in state, self.udm))
        if then != now:
            return f"it was trained with udm: {then}, this run has udm: {now}; set that to resume"
        embedding = state["udm"]["embedding"] if self.udm else self.embedding
        if embedding != self.embedding:
            return (
                f"its prompt classifier was fitted to embedding: {embedding}, this run has embedding: {self.embedding}; "
                "set that to resume"
            )
        return None

    def start_training(self) -> None:
        """Averages of an earlier call of `train` stay; its last optimizer step is over."""
        if "step" in self.state.get("shift", {}):
            self.state["shift"] = {**self.state["shift"], "step": None}

    def summary(self, decode_one: Any) -> list[str]:
        found = self.state.get("udm")
        if found is None:
            return []
        return [
            f"bco: the prompt classifier tells {100 * found['right_up']:.0f}% of thumbs-up and "
            f"{100 * found['right_down']:.0f}% of thumbs-down prompts that it was fitted to (50% is chance)"
        ]

    # Pairs

    def pair_loss(self, x: PairInput) -> Tensor:
        good, bad = x.beta * (x.chosen - x.ref_chosen), x.beta * (x.rejected - x.ref_rejected)
        rewards, label = torch.cat([good, bad]), torch.arange(2 * len(good), device=good.device) < len(good)
        delta = self._shifted(x, rewards, label)
        return classifier_losses(rewards, label, delta).view(2, -1).sum(0)

    def observe_pairs(self, x: PairInput) -> None:
        self.state["shift"] = x.scratch["shift"]

    # Labelled completions

    def start_labels(self, data: LabelSet) -> None:
        """Fits the prompt classifier; one that a checkpoint brought back stays."""
        if "udm" in self.state:
            return
        (known,) = torch.nonzero(data.has_prompt, as_tuple=True)
        rows = known[draw_prompts(data.label[known], self.prompt_sample_size, data.seed)]
        label = data.label[rows]
        if label.all() or not label.any():
            problem = f"all {len(known)} labels are the same (of rows that have a prompt)"
            raise PlanError([f"bco: udm compares two classes of prompts, and {problem}"])
        fitted = fit_classifier(data.embed_prompts(rows, self._encoder), label)
        self.state["udm"] = {**fitted, "embedding": self.embedding}

    def label_loss(self, x: LabelInput) -> Tensor:
        rewards = x.beta * (x.logps - x.ref_logps)
        delta = self._shifted(x, rewards, x.label)
        return classifier_losses(rewards, x.label, delta, self._weights(x))

    def observe_labels(self, x: LabelInput) -> None:
        self.state["shift"] = x.scratch["shift"]

    @property
    def _encoder(self) -> str | None:
        return None if self.embedding == REFERENCE_EMBEDDING else self.embedding

    def _shifted(self, x: PairInput | LabelInput, rewards: Tensor, label: Tensor) -> Tensor:
        """delta, moved by this batch first; `observe_*` keeps what is in the scratch. Evaluation moves nothing."""
        state, rewards = self.state.get("shift", {}), rewards.detach()
        if x.training and self.shift != "none":
            (everyone, _), (labels, _) = x.gather(rewards), x.gather(label.to(rewards.dtype))
            if self.shift == "class_ema":
                state = class_ema(state, everyone, labels > 0.5, x.step, self.shift_decay)
            else:
                state = running_mean(state, everyone)
            decay = {"decay": self.shift_decay} if self.shift == "class_ema" else {}
            x.scratch["shift"] = {**state, "rule": self.shift, **decay}
        delta, finite = delta_of(self.shift, state, rewards), rewards.isfinite()
        x.metrics.mean("delta", delta)
        x.metrics.mean("chosen_above_delta", (rewards > delta).float(), (label & finite).float())
        x.metrics.mean("rejected_below_delta", (rewards < delta).float(), (~label & finite).float())
        bad = (~finite).sum()
        x.metrics.mean("rewards_not_finite", bad, (bad > 0).float())  # per micro-batch that has any
        return delta

    def _weights(self, x: LabelInput) -> Tensor:
        """(B,) weights w of the thumbs-down rows that have a prompt, 1 elsewhere and without UDM."""
        weights = torch.ones_like(x.ref_logps)
        rows = torch.nonzero(~x.label & x.has_prompt).squeeze(1)
        if not self.udm or len(rows) == 0:
            return weights
        if not x.training and "udm" not in self.state:
            warnings.warn("bco: evaluated before training, without a prompt classifier: every w is 1", stacklevel=2)
            return weights
        classifier = self.state["udm"]
        p = desirable_probability(classifier, x.embed_prompts(rows, self._encoder))
        weights = weights.index_copy(
            0, rows, density_ratio(p, self.min_density_ratio, self.max_density_ratio).to(weights)
        )
        x.metrics.mean("udm_weight_mean", weights[rows])
        x.metrics.mean("udm_accuracy_chosen", classifier["right_up"])
        x.metrics.mean("udm_accuracy_rejected", classifier["right_down"])
        return weights
