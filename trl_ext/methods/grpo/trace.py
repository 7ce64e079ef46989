"""TRACE: a token-routed pull towards the same model with a private note, on a few annotated spans, early in training.

Paper: "Distilling Where It Matters via Token-Routed Self On-Policy Alignment", arXiv 2605.10194. Card: trace.
For a rollout of T tokens with error span E (wrong rollouts) or key span K (right ones), S = E u K, |S| <= alpha T:

    L_k   = 1/T sum_{t not in S} l_t + rho_k 1/T sum_{t in S} l_t + lambda_k/T sum_t [mu_E 1_E RKL_t + mu_K 1_K FKL_t]
    FKL_t = sum_v q_t (log q_t - log p_t)     RKL_t = sum_v p_t (log p_t - log q_t)
    rho_k = 1 - lambda_k / w0;  lambda_k = w0 for k < t_start, then linear to 0 over T_decay steps

p_t is the policy (gradient flows), q_t the teacher: the same weights, refreshed every `sync_every` steps, with a note
in the prompt that names the type of the span and nothing else; no gradient. l_t is TRL's per-token policy loss. The KL
uses the denominators of `loss_type`, so its ratio to the policy term is kept; "grpo" gives the equation above. A weight
per row from other methods (`x.distill_weights`) multiplies the row's KL, not its l_t.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.annotate import (
    Annotator,
    AnnotatorError,
    Request,
    Span,
    make_annotator,
    segment,
    span_token_mask,
    teacher_messages,
    teacher_note,
    token_offsets,
)
from trl_ext.checks import reward_named
from trl_ext.forward import Features, per_position
from trl_ext.method import HIDDEN, POLICY, TEACHER, LossInput, Method, Rollout, RunShape, Setup, param
from trl_ext.together import on_all

ERROR, KEY = 1, 2
"""Kinds of a span token: in a wrong rollout (reverse KL), in a right one (forward KL)."""


def schedule(step: int, weight: float, hold_steps: int, decay_steps: int) -> float:
    """lambda_k: `weight` for k < hold, then linear to 0 at k = hold + decay, 0 afterwards."""
    if step < hold_steps:
        return weight
    if step >= hold_steps + decay_steps:
        return 0.0
    return weight * (1 - (step - hold_steps) / decay_steps)


def routed_kl(
    log_p: Tensor,
    log_q: Tensor,
    kind: int,
    top_k: int | None = None,
    clip: float | None = None,
    clip_mode: str = "entry",
) -> tuple[Tensor, Tensor, Tensor]:
    """KL per position between student log_p and teacher log_q, (N, V) each -> three tensors (N,).

    kind ERROR: RKL = sum_v p (log p - log q); KEY: FKL = sum_v q (log q - log p). Only the `top_k` largest entries of
    the distribution under the expectation count, both sides renormalised on them. clip_mode "entry" takes
    min(term_v, clip) before the sum; "position" scales the position's KL by the detached factor min(1, clip / KL).

    Returns the KL, the share of clipped entries (or positions), and 1 where the gradient on the student's logits still
    points the way of the unclipped one (card: a clipped sum may reverse it), else 0. The last two carry no gradient.
    """
    if top_k is not None and top_k < log_p.size(-1):
        support = (log_p if kind == ERROR else log_q).detach().topk(top_k, dim=-1).indices
        log_p = log_p.gather(-1, support).log_softmax(-1)
        log_q = log_q.gather(-1, support).log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q) if kind == ERROR else log_q.exp() * (log_q - log_p)
    full = terms.sum(-1)
    if clip is None or clip_mode == "none":
        return full, torch.zeros_like(full).detach(), torch.ones_like(full).detach()
    if clip_mode == "position":
        factor = (clip / full.detach().clamp(min=1e-12)).clamp(max=1.0)
        return full * factor, (factor < 1).float(), torch.ones_like(full).detach()
    with torch.no_grad():
        open_entries = (terms < clip).float()
        agrees = (_logit_grad(log_p, log_q, kind) * _logit_grad(log_p, log_q, kind, open_entries)).sum(-1) > 0
    return terms.clamp(max=clip).sum(-1), (1 - open_entries).mean(-1), agrees.float()


def _logit_grad(log_p: Tensor, log_q: Tensor, kind: int, open_entries: Tensor | None = None) -> Tensor:
    """d KL / d student logits (N, V), closed form; entries that the clip holds fixed pass no gradient."""
    p = log_p.exp()
    pull = p * (log_p - log_q + 1) if kind == ERROR else -log_q.exp()
    pull = pull if open_entries is None else pull * open_entries
    return pull - p * pull.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Trace(Method):
    """Routes a private-note self-distillation to annotated spans, then hands over to plain GRPO.

    action "none", weight 0, or a step past the window: TRL bit for bit, without annotator or teacher forward.
    """

    name = "trace"
    title = "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment"
    paper = "2605.10194"
    owns = ("teacher",)
    headline = ("lambda", "rkl_on_spans", "fkl_on_spans", "span_coverage")

    action: str = param(
        "fkl_key",
        "fkl_key: forward KL on key spans of right rollouts; rkl_error: reverse KL on error spans of wrong ones",
        source="card: paper default for 8B; rkl_error is its best for 1.7B",
        choices=("fkl_key", "rkl_error", "both", "none"),
    )
    weight: float = param(0.5, "w0, initial weight of the KL", source="card: paper", ge=0)
    hold_steps: int = param(10, "t_start, optimizer steps at w0", source="card: paper", ge=0)
    decay_steps: int = param(30, "T_decay, steps of the linear decay to 0", source="card: paper", ge=0)
    coverage: float = param(
        0.25, "alpha, at most this share of a completion's tokens", source="card: paper", gt=0, le=1
    )
    clip: float | None = param(0.05, "tau, see clip_mode; none switches it off", source="card: paper", gt=0)
    clip_mode: str = param(
        "entry",
        "entry: each vocabulary term at most tau; position: a position's KL at most tau; none",
        source="card: paper; position is inferred, it keeps the gradient's direction",
        choices=("entry", "position", "none"),
    )
    top_k: int | None = param(100, "K_v, vocabulary entries in the KL; none takes all", source="card: paper", ge=1)
    sync_every: int = param(
        10, "N, optimizer steps between copies of the policy into the teacher", source="card: paper", ge=1
    )
    annotator: str | dict = param(
        "policy",
        "policy (the current model, greedy), sandbox (rules), module.function, or the fields of an OpenAI-compatible "
        "endpoint {base_url: ..., model: ...}",
        source="card: the online self-annotation variant; the paper's default is an API model",
    )
    max_annotation_tokens: int = param(256, "length of the policy annotator's answer", source="ours", ge=1)
    verifier: str | None = param(
        None, "reward function that decides right or wrong; needed if there are several", source="ours"
    )
    threshold: float = param(0.5, "a rollout is right when the verifier gives at least this", source="ours")
    mask_inactive: bool = param(
        False,
        "also drop the policy loss on spans whose class has no KL (the literal formula)",
        source="card: open question 3",
    )
    spans: str = param(
        "annotated",
        "ablations: random puts the span's tokens at random places, all takes every token",
        source="card: ablations",
        choices=("annotated", "random", "all"),
    )

    # What it declares

    @property
    def active(self) -> tuple[int, ...]:
        """Kinds of span that get their KL."""
        kinds = {"rkl_error": (ERROR,), "fkl_key": (KEY,), "both": (ERROR, KEY), "none": ()}[self.action]
        return kinds if self.weight > 0 else ()

    def needs(self) -> frozenset[str]:
        if not self.active:
            return frozenset()
        return frozenset({HIDDEN} if self.sync_every == 1 else {HIDDEN, TEACHER})

    def cost(self) -> str:
        if not self.active:
            return "nothing: no class is active"
        last = self.hold_steps + self.decay_steps
        return f"steps 0 to {last - 1}: annotation, and one teacher forward for rows with a span; then nothing"

    def check(self, setup: Setup) -> list[str]:
        problems = []
        if getattr(setup.args, "importance_sampling_level", "token") == "sequence":
            problems.append("dropping the policy loss on span tokens needs importance_sampling_level: token")
        problems += reward_named(setup, self.verifier, "verifier", "tells right from wrong")
        if self.annotator != "policy":
            try:
                self._outside_annotator  # noqa: B018
            except (ValueError, ImportError, AttributeError, TypeError) as error:
                problems.append(f"annotator: {error}")
        return problems

    def sync_teacher(self, step: int, run: RunShape) -> bool:
        return bool(self.active) and self._lambda(step) > 0 and step % self.sync_every == 0 and self.sync_every > 1

    def _lambda(self, step: int) -> float:
        return schedule(step, self.weight, self.hold_steps, self.decay_steps)

    # Rollout: annotate, mask, teacher prompt

    @functools.cached_property
    def _outside_annotator(self) -> Annotator:
        return make_annotator(self.annotator)

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        if not self.active or self._lambda(rollout.step) == 0:
            return {}
        right = self._verdicts(rollout)
        texts = [segment(text) for text in rollout.completions]
        spans = self._annotate(rollout, right, texts)
        kinds = torch.zeros_like(rollout.mask)
        prompts = list(rollout.prompts)
        for i, found in enumerate(spans):
            if found:
                verdict = bool(right[i])
                kinds[i] = self._token_kinds(rollout, i, found, texts[i], _kind(verdict))
                note = teacher_note([span.label for span in found], verdict)
                prompts[i] = teacher_messages(prompts[i], note)
        ids, mask = _left_padded(rollout.encode_prompts(prompts), rollout.pad_token_id, kinds.device)
        self._log_spans(rollout, kinds)
        return {"kind": kinds, "prompt_ids": ids, "prompt_mask": mask}

    def _verdicts(self, rollout: Rollout) -> list[bool | None]:
        """Right, wrong, or None where the verifier does not apply."""
        column = rollout.reward_names.index(self.verifier) if self.verifier else 0
        return [None if math.isnan(r) else r >= self.threshold for r in rollout.rewards[:, column].tolist()]

    def _annotate(
        self, rollout: Rollout, right: Sequence[bool | None], segments: Sequence[list[tuple[int, int]]]
    ) -> list[list[Span]]:
        """Spans per row; rows of a class that is not routed, or without text, are not sent."""
        routed = {KEY, ERROR} if self.mask_inactive else set(self.active)
        sent = [i for i, ok in enumerate(right) if ok is not None and _kind(ok) in routed and segments[i]]
        requests = [
            Request(
                problem=_problem(rollout.prompts[i]),
                segments=tuple(rollout.completions[i][a:b] for a, b in segments[i]),
                correct=bool(right[i]),
                row=rollout.rows[i],
            )
            for i in sent
        ]
        started = time.perf_counter()
        annotator: Any = self._outside_annotator if self.annotator != "policy" else self._policy(rollout)
        failed_before = annotator.stats["parse_failures"] if hasattr(annotator, "stats") else 0
        answers = on_all(lambda: annotator(requests) if requests else [], "annotator: it", AnnotatorError)
        rollout.metrics.mean("annotate_seconds", time.perf_counter() - started)
        if requests and hasattr(annotator, "stats"):
            failed = annotator.stats["parse_failures"] - failed_before
            rollout.metrics.mean("parse_failure_rate", failed / len(requests), len(requests))
        spans: list[list[Span]] = [[] for _ in right]
        for i, found in zip(sent, answers, strict=True):
            spans[i] = found
        return spans

    def _policy(self, rollout: Rollout) -> Annotator:
        return make_annotator("policy", generate=lambda prompts: rollout.generate(prompts, self.max_annotation_tokens))

    def _token_kinds(
        self, rollout: Rollout, i: int, found: list[Span], segments: list[tuple[int, int]], kind: int
    ) -> Tensor:
        """(T,) of 0 and `kind`: at most floor(alpha |y|) tokens that the loss trains on."""
        valid = rollout.mask[i].bool()
        if self.spans == "all":
            return valid.to(rollout.mask.dtype) * kind
        ids = rollout.completion_ids[i][: int(valid.nonzero().max()) + 1].tolist() if valid.any() else []
        offsets = token_offsets(ids, rollout.decode_one, rollout.completions[i])
        trained = valid[: len(ids)].tolist()
        cap = int(self.coverage * sum(trained))
        chosen = span_token_mask(found, segments, offsets, len(ids), cap)
        chosen = [c and t for c, t in zip(chosen, trained, strict=True)]
        if self.spans == "random":
            places = [t for t, ok in enumerate(trained) if ok]
            drawn = set(random.Random(f"{rollout.step}/{i}").sample(places, sum(chosen)))
            chosen = [t in drawn for t in range(len(ids))]
        row = torch.zeros_like(rollout.mask[i])
        row[: len(ids)] = torch.tensor(chosen, dtype=row.dtype, device=row.device) * kind
        return row

    def _log_spans(self, rollout: Rollout, kinds: Tensor) -> None:
        tokens, in_span = rollout.mask.sum(1), (kinds > 0).sum(1)
        rollout.metrics.mean("span_coverage", in_span / tokens.clamp(min=1))
        rollout.metrics.mean("rows_with_span", (in_span > 0).float())

    # Loss

    def token_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        strength = self._lambda(x.step)
        if not x.streams or strength == 0:
            return weights
        rho = 1 - strength / self.weight
        return weights * torch.where(x.streams["kind"] > 0, rho, 1.0)

    def aux_loss(self, x: LossInput) -> Tensor | None:
        strength = self._lambda(x.step)
        if self.active:
            x.metrics.mean("lambda", strength)
            x.metrics.mean("rho", 1 - strength / self.weight)
        if not x.streams or strength == 0:
            return None
        kinds = x.streams["kind"]
        wanted = torch.isin(kinds, torch.tensor(self.active, device=kinds.device))
        if x.distill_weights is not None:  # a row of weight 0 needs no teacher
            wanted = wanted & (x.distill_weights > 0).unsqueeze(1)
        rows = wanted.any(1).nonzero().squeeze(1)
        if rows.numel() == 0:
            return None
        started = time.perf_counter()
        which = POLICY if self.sync_every == 1 else TEACHER
        teacher = x.other(which, rows, x.streams["prompt_ids"][rows], x.streams["prompt_mask"][rows])
        per_token = torch.zeros_like(x.logps)
        for kind in self.active:
            per_token = self._add_kl(per_token, x, teacher, rows, wanted & (kinds == kind), kind)
        if x.distill_weights is not None:
            per_token = per_token * x.distill_weights.unsqueeze(1)
        x.metrics.mean("teacher_seconds", time.perf_counter() - started)
        return strength * x.aggregate(per_token)

    def _add_kl(
        self, per_token: Tensor, x: LossInput, teacher: Features, rows: Tensor, here: Tensor, kind: int
    ) -> Tensor:
        """Puts the KL of span tokens of one kind at their places `here` (B, T) bool, all of them in `rows`."""
        assert x.policy is not None  # HIDDEN is declared
        student = (x.policy.head, x.policy.at(here))
        if student[1].size(0) == 0:
            return per_token
        kl, clipped, agrees = per_position(
            lambda p, q: routed_kl(p, q, kind, self.top_k, self.clip, self.clip_mode),
            student,
            (teacher.head, teacher.at(here[rows])),
        )
        name = "rkl" if kind == ERROR else "fkl"
        x.metrics.mean(f"{name}_on_spans", kl)
        x.metrics.mean("clipped_share", clipped)
        x.metrics.mean("gradient_agrees", agrees)
        return per_token.masked_scatter(here, kl.to(per_token.dtype))


def _kind(right: bool) -> int:
    return KEY if right else ERROR


def _problem(prompt: Any) -> str:
    """The text of the last user turn of a prompt."""
    if isinstance(prompt, str):
        return prompt
    content = next(m["content"] for m in reversed(prompt) if m["role"] == "user")
    return content if isinstance(content, str) else "\n".join(b["text"] for b in content if b.get("type") == "text")


def _left_padded(ids: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and mask (rows, L), padded on the left as TRL pads prompts."""
    width = max(len(row) for row in ids)
    padded = [[pad] * (width - len(row)) + list(row) for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)
