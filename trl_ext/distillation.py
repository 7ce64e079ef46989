"""PACED on TRL's DistillationTrainer: prompts weighted by w(p), and forward KL first, reverse KL second.

Paper: arXiv 2603.11178. Card: paced; the weight itself is `trl_ext.methods.grpo.paced`. For a batch of n prompts, all that
lead to one optimizer step, on all processes:

    L = (1/n) sum_x wbar_x (1/T_x) sum_t D_t      wbar: w / mean w ("batch"), w / max w ("max"), or w ("none")
    D = forward KL for step < switch_step, then TRL's divergence `beta` (1.0, the reverse KL, unless set)

p is static, from a column that `trl_ext.rollouts.scoring.with_pass_rates` makes. Prompts of weight 0 leave the data before
training. While D is the forward KL, responses come from the teacher; else from the student.

TRL sums D over all tokens inside `_compute_loss` and has no seam for a weight per row. Its code is not copied: for the
length of that call the name `ChunkedDivergenceFunction` in TRL's module stands for TRL's own function with its result
(N,) multiplied by the weights. One forward of student and teacher as before; the weights cost nothing.
A teacher with a private prompt (the paper's self-distillation) is not possible here, since TRL shows both models the same
prompt: that is `trace` with `paced` in a GRPO run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer import distillation_trainer as trls

from trl_ext.base import MethodTrainer, logger
from trl_ext.batch import loss_mask_of, replaced
from trl_ext.method import Metrics
from trl_ext.methods.grpo.paced import BINS, kernel, log_weights, normalise, rate_in
from trl_ext.plan import PlanError

FORWARD, REVERSE = 0.0, 1.0
"""TRL's `beta`."""
P, SCALE = "paced/p", "paced/scale"
"""Keys of a micro-batch: pass rate of each row, and what each of its tokens' divergence is multiplied by."""
_CHOICES = {
    "paced_normalize": ("batch", "none", "max"),
    "loss_mean": ("sequence", "token"),
    "forward_responses": ("teacher", "student", "reference"),
}


@dataclass
class PacedDistillationConfig(trl.DistillationConfig):
    """TRL's DistillationConfig with the weight and the two stages.

    With both exponents 0, `loss_mean: token` and `forward_responses: student` it trains as TRL does, bit for bit.
    Raises PlanError with every problem found.
    """

    pass_rate_column: str = field(
        default="pass_rate", metadata={"help": "Column of the training data with each prompt's pass rate in [0, 1]."}
    )
    paced_a: float = field(default=1.0, metadata={"help": "a of w = p^a (1 - p)^b."})
    paced_b: float = field(default=1.0, metadata={"help": "b of w = p^a (1 - p)^b."})
    paced_normalize: str = field(
        default="batch", metadata={"help": "Scale of the weights in an optimizer step: batch (mean 1), max, none."}
    )
    loss_mean: str = field(
        default="sequence",
        metadata={"help": "sequence: mean over rows of token means (the paper); token: over all tokens (TRL)."},
    )
    switch_step: int | None = field(
        default=None,
        metadata={"help": "S1: forward KL before this optimizer step, `beta` from it on. None: `beta` throughout."},
    )
    forward_responses: str = field(
        default="teacher",
        metadata={
            "help": "Who answers while the divergence is the forward KL: teacher, student, or reference (the column "
            "`reference_column`). Otherwise the student does."
        },
    )
    reference_column: str = field(default="completion", metadata={"help": "Column with the reference responses."})
    log_both_kl: bool = field(
        default=True, metadata={"help": "Log both KLs: one more projection of both heads in the loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}"
            for name, allowed in _CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        problems += [f"{n}: {getattr(self, n)} must be >= 0" for n in ("paced_a", "paced_b") if getattr(self, n) < 0]
        if self.switch_step is not None and self.switch_step < 0:
            problems.append(f"switch_step: {self.switch_step} must be >= 0")
        if self.switch_step is not None and self.beta == FORWARD:
            problems.append(
                "switch_step leads from the forward KL to beta, which is the forward KL too; set beta: 1.0"
            )
        if self.use_vllm and self.forward_responses == "teacher" and self.divergence_at(0) == FORWARD:
            problems.append(
                "vLLM holds the student's weights, so the teacher cannot answer; set use_vllm: false, or "
                "forward_responses: reference or student"
            )
        if problems:
            raise PlanError(problems, "The distillation cannot run as configured")

    def divergence_at(self, step: int) -> float:
        """TRL's `beta` in optimizer step `step` (0, 1, ...): forward KL 0, reverse KL 1."""
        return FORWARD if self.switch_step is not None and step < self.switch_step else self.beta


class PacedDistillationTrainer(MethodTrainer, trl.DistillationTrainer):  # type: ignore[misc]
    """Drop-in for `trl.DistillationTrainer` with a PacedDistillationConfig. Evaluation is TRL's, without weights.

    `dropped` is the number of prompts that left the training data for weight 0. PlanError if none is left; ValueError
    for a row without a pass rate.
    """

    args: PacedDistillationConfig
    dropped: int = 0
    beta: float
    tools: Any
    teacher_model: Any
    _tokenizer: Any
    _references: list[list[int]] | None = None
    _watch: Any = None

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: PacedDistillationConfig | None = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = PacedDistillationConfig() if args is None else args
        if kwargs.get("tools") and args.forward_responses == "reference" and args.divergence_at(0) == FORWARD:
            raise PlanError(["reference responses hold no tool outputs; set forward_responses: teacher or student"])
        kept = with_weight(train_dataset, args)
        if isinstance(kept, Dataset):
            self.dropped = len(train_dataset) - len(kept)
            logger.info(f"{self.dropped} of {len(train_dataset)} prompts have weight 0 and are left out")
        super().__init__(model, teacher_model, args, kept, *rest, **kwargs)

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        forward = self.args.divergence_at(self.state.global_step) == FORWARD
        source = self.args.forward_responses if forward else "student"
        own: dict[str, Any] = {"_references": None}
        if source == "teacher":
            own["model_wrapped"] = self.teacher_model
        elif source == "reference":
            own["_references"] = self._reference_ids(inputs)
        with replaced(self, **own):
            batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        p = torch.tensor([rate_in(row, self.args.pass_rate_column) for row in inputs], device=self.accelerator.device)
        return batch | {P: p, SCALE: self._scale(p, batch)}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        if self._references is not None:
            return self._references
        return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    def _reference_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Token ids of the reference responses, with their end, cut to `max_completion_length`."""
        column, end = self.args.reference_column, self._tokenizer.eos_token
        found = []
        for row in rows:
            if row.get(column) is None:
                raise ValueError(
                    f"row {str(row)[:200]} has no '{column}': name the responses' column (reference_column)"
                )
            text = row[column] + end if isinstance(row[column], str) else row[column]
            if is_conversational(row):
                said = [{"role": "assistant", "content": row[column]}] if isinstance(row[column], str) else row[column]
                example = {"prompt": row["prompt"], "completion": said}
                text = apply_chat_template(example, self._tokenizer)["completion"]
            found.append(self._tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_completion_length])
        return found

    def _scale(self, p: Tensor, batch: dict[str, Any]) -> Tensor:
        """(rows,): TRL divides the sum over tokens by all tokens; this factor makes it the batch's weighted mean."""
        everyone, mine = self._gather_values(p)
        raw = kernel(everyone, self.args.paced_a, self.args.paced_b)
        log_weights(self._metrics_store().under("paced"), everyone, raw)
        weights = normalise(raw, self.args.paced_normalize)[mine]
        if self.args.loss_mean == "token":
            return weights
        return weights * batch["num_items_in_batch"] / (everyone.numel() * loss_mask_of(batch).sum(1).clamp(min=1))

    # Loss

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        if SCALE not in inputs:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)  # type: ignore[misc]
        beta, metrics = self.args.divergence_at(self.state.global_step), self._metrics_store().under("paced")
        metrics.mean("beta", beta)
        weighted = Weighted(inputs[SCALE], loss_mask_of(inputs), beta, self.args.log_both_kl, metrics)
        watch = functools.partial(self._log_gradient, inputs, num_items_in_batch)
        with replaced(trls, ChunkedDivergenceFunction=weighted), replaced(self, beta=beta, _watch=watch):
            found = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)  # type: ignore[misc]
        if not weighted.used:
            raise RuntimeError(f"trl {trl.__version__} computed the loss elsewhere: the weights were not applied")
        return found

    def _get_last_hidden_state(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = super()._get_last_hidden_state(*args, **kwargs)  # type: ignore[misc]
        if self._watch is not None and hidden.requires_grad:  # the student's
            hidden.register_hook(self._watch)
        return hidden

    def _log_gradient(self, inputs: dict[str, Any], num_items: Any, gradient: Tensor) -> None:
        """Norm of the gradient of each unweighted L_distill(x) on the last hidden states, in bins of p."""
        scale, p = inputs[SCALE], inputs[P]
        lengths = loss_mask_of(inputs).sum(1).clamp(min=1)
        norms = gradient.float().flatten(1).norm(dim=1) * num_items / (scale * lengths).clamp(min=1e-30)
        bins = (p * BINS).long().clamp(max=BINS - 1)
        for i in range(BINS):
            own = (bins == i) & (scale > 0)
            self._metrics_store().mean(f"paced/gradient_p_{i / BINS:.1f}", norms, own)


class Weighted:
    """Stands for TRL's `ChunkedDivergenceFunction` in one loss: its divergences (N,) times `scale` (B,) of their rows.

    N counts all B T positions, or on Triton devices the valid ones alone; `mask` (B, T) says which these are.
    """

    def __init__(self, scale: Tensor, mask: Tensor, beta: float, both: bool, metrics: Metrics) -> None:
        self.mask, self.beta, self.both, self.metrics = mask, beta, both, metrics
        self.scale = scale.unsqueeze(1).expand(mask.shape)
        self.used = False

    def apply(self, *args: Any) -> tuple[Tensor, Tensor]:
        """As TRL calls it; `beta` is the seventh argument."""
        divergence, entropy = _TRLS_DIVERGENCE.apply(*args)
        self.used, valid = True, self.mask != 0
        compact = divergence.numel() != self.mask.numel()
        scale = self.scale[valid] if compact else self.scale.flatten()
        counted = torch.ones_like(divergence) if compact else valid.flatten()
        for name, beta in (("forward_kl", FORWARD), ("reverse_kl", REVERSE)):
            if beta == self.beta:
                self.metrics.mean(name, divergence, counted)
            elif self.both:
                with torch.no_grad():
                    self.metrics.mean(name, _TRLS_DIVERGENCE.apply(*args[:6], beta, *args[7:])[0], counted)
        return divergence * scale.to(divergence), entropy


_TRLS_DIVERGENCE = trls.ChunkedDivergenceFunction


def with_weight(data: Any, args: PacedDistillationConfig) -> Any:
    """The rows whose weight is not 0. PlanError if there are none, ValueError for a row without a pass rate."""
    if data is None:
        return None

    column, a, b = args.pass_rate_column, args.paced_a, args.paced_b

    def counts(row: dict[str, Any]) -> bool:
        return bool(kernel(torch.tensor(rate_in(row, column), dtype=torch.float64), a, b) > 0)

    kept = data.filter(counts)
    if isinstance(kept, Dataset) and len(kept) == 0:
        raise PlanError(
            [
                f"all {len(data)} prompts have weight 0: each is always or never solved; score with more samples, or set "
                "smoothing in with_pass_rates"
            ],
            "The distillation cannot run as configured",
        )
    return kept
