"""PGPO: tokens that depend on the evidence (the image, or a span of the prompt) get more of the advantage.

Paper: "Not All Tokens See Equally", arXiv 2604.01840. Card: pgpo. For each response, over its T loss tokens:

    S_t  = (r_t - 1) - log r_t    r_t = pi(x_t | evidence hidden) / pi(x_t | all), the log clamped to [-20, 20]
    S~_t = log(1 + S_t)           I_t = (S~_t - min S~) / (max S~ - min S~ + eps)
    w_t  = I_t / (tau + eps) if I_t < tau, else 1 + beta (I_t - tau) / (1 - tau + eps)
    w~_t = w_t T / sum_j w_j      A_{i,t} = A_i w~_t

pi is the policy at the start of the generation batch, so the weights are the same in all its updates; they carry no
gradient. S_t estimates KL(pi(all) || pi(hidden)) from the one sampled token; "exact" takes the sum over the vocabulary.
"Hidden" means that no token attends to the evidence; it stays where it is, so no position moves.

A row without evidence, or where hiding it changes nothing (max S~ - min S~ <= eps), has all weights 1 (card: decision).
Images that a tool puts into the completion stay visible. With another method that weights tokens the weights multiply,
and Eq. 7 holds for these alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext.annotate import token_offsets
from trl_ext.forward import Features, per_position_detached
from trl_ext.method import HIDE_PROMPT, POLICY, LossInput, Method, Rollout, Setup, param

EPS = 1e-8
"""The stabiliser of Eqs. 5 and 6. Card: not stated in the paper, use 1e-8."""
LOG_RATIO = 20.0
"""Bound of |log r|. Card: open (c)."""


def dependency(logps: Tensor, blind: Tensor) -> Tensor:
    """S = (r - 1) - log r with log r = blind - logps in [-20, 20]: any shape, >= 0, float32, without gradient."""
    log_ratio = (blind - logps).detach().float().clamp(-LOG_RATIO, LOG_RATIO)
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0)


def exact_dependency(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the vocabulary: (n, V) log-probs with and without evidence -> (n,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def relative(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs. 4 and 5: S, mask (B, T) -> I (B, T) in [0, 1], 0 outside the mask; and (B,) bool: all S of the row alike."""
    squashed, valid = torch.log1p(scores), mask.bool()
    low = squashed.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = squashed.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    spread = (high - low).nan_to_num(0.0, neginf=0.0)  # a row without loss tokens: -inf
    found = ((squashed - low) / (spread + EPS)).masked_fill(~valid, 0.0)
    return found, spread.squeeze(1) <= EPS


def gate(importance: Tensor, threshold: float, boost: float) -> Tensor:
    """Eq. 6, elementwise: I -> w in [0, 1 + boost]; continuous at the threshold up to eps."""
    raised = 1 + boost * (importance - threshold) / (1 - threshold + EPS)
    return torch.where(importance < threshold, importance / (threshold + EPS), raised)


def token_weights(
    scores: Tensor, mask: Tensor, threshold: float, boost: float, conserve: bool = True, shown: Tensor | None = None
) -> Tensor:
    """Eqs. 4 to 7: S, mask (B, T) -> w~ (B, T), which sums to each row's count of mask tokens if `conserve`.

    `shown` (B,) bool marks rows without hidden evidence; they, and rows whose S are all alike, get 1. Outside the mask
    every weight is 1.
    """
    importance, alike = relative(scores, mask)
    plain = alike if shown is None else alike | shown
    weights = gate(importance, threshold, boost) * mask
    if conserve:
        weights = weights * (mask.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=EPS))
    return torch.where(plain.unsqueeze(1) | ~mask.bool(), 1.0, weights)


def places(text: str, evidence: Any, content: str) -> list[tuple[int, int]]:
    """Character intervals of `text`, the decoded prompt, that `evidence` names; every occurrence of a text counts.

    `evidence`: a text, [start, end] characters of `content` (the last user turn), or a list of either; None or an
    empty one names nothing. ValueError when a text is not there, or a span reaches out of `content`.
    """
    if evidence is None:
        return []
    if not isinstance(evidence, (str, list, tuple)):
        raise ValueError(f"expected a text, a span [start, end] or a list of these as evidence, got {evidence!r}")
    if len(evidence) == 0:
        return []
    if isinstance(evidence, str):
        found = [match.span() for match in re.finditer(re.escape(evidence), text)]
        if not found:
            raise ValueError(f"the evidence {evidence[:80]!r} does not stand in the prompt {text[-200:]!r}")
        return found
    if all(isinstance(bound, int) for bound in evidence):
        return [_inside(text, evidence, content)]
    return [place for one in evidence for place in places(text, one, content)]


def _inside(text: str, span: Sequence[int], content: str) -> tuple[int, int]:
    base = text.rfind(content)
    if base < 0:
        raise ValueError(
            f"the chat template changes the user's text, so character spans cannot be placed in {text[-200:]!r}; give "
            "the evidence as text"
        )
    if len(span) != 2 or not 0 <= span[0] < span[1] <= len(content):
        raise ValueError(
            f"the evidence {list(span)} is no span [start, end] of the {len(content)} characters {content!r}"
        )
    return base + span[0], base + span[1]


def matches(text: str, pattern: str) -> list[tuple[int, int]]:
    """Character intervals of every match of the regular expression; ValueError when there is none."""
    found = [match.span() for match in re.finditer(pattern, text)]
    if not found:
        raise ValueError(f"the pattern {pattern!r} does not match the prompt {text[-200:]!r}")
    return found


@dataclass(frozen=True)
class Pgpo(Method):
    """Rescales the advantage token by token by how much the token depends on the hidden evidence.

    threshold = 0 with boost = 0 is TRL bit for bit, without a second forward. The evidence is the prompt's images; or
    what a data set column names (`evidence`); or what matches an expression (`pattern`). A token that holds only a part
    of the evidence is hidden as a whole.
    """

    name = "pgpo"
    title = "Not All Tokens See Equally: Perception-Grounded Policy Optimization for Large Vision-Language Models"
    paper = "2604.01840"
    headline = ("dependency", "above_threshold", "degenerate_rows")
    conflicts: ClassVar = dict.fromkeys(
        ("dgpo", "dcpo"),
        "both weigh tokens, and pgpo's weights would not keep a response's mass; name only one of them",
    )

    threshold: float = param(0.4, "tau: below it the weight falls towards 0", source="card: paper", ge=0, le=1)
    boost: float = param(2.0, "beta: the largest weight before Eq. 7 is 1 + beta", source="card: paper", ge=0)
    evidence: str | None = param(
        None,
        "data set column with what to hide in a row's prompt: a text (every occurrence), a [start, end] span of "
        "characters of the last user turn, or a list of these; null for nothing. none: see pattern",
        source="card: generalisation for text-only models",
    )
    pattern: str | None = param(
        None,
        "regular expression; what matches it in the prompt, as decoded without special tokens, is hidden. none, and no "
        "evidence: the images",
        source="card: generalisation for text-only models; the expression is ours",
    )
    estimator: str = param(
        "sampled",
        "S from the sampled token, or the exact KL over the vocabulary, which takes two forwards and projections",
        source="card: paper; exact is its optional mode",
        choices=("sampled", "exact"),
    )
    conserve_mass: bool = param(
        True, "Eq. 7: the weights of a response average 1; false is the ablation", source="card: paper"
    )

    # What it declares

    @property
    def _neutral(self) -> bool:
        return self.threshold == 0 and self.boost == 0

    def needs(self) -> frozenset[str]:
        return frozenset() if self._neutral else frozenset({HIDE_PROMPT})

    def cost(self) -> str:
        if self._neutral:
            return "nothing: every weight is 1"
        return f"{'one forward' if self.estimator == 'sampled' else 'two forwards'} without gradient per rollout"

    def check(self, setup: Setup) -> list[str]:
        problems = []
        if getattr(setup.args, "importance_sampling_level", "token") == "sequence":
            problems.append(
                "a weight per token on a ratio of the whole sequence is only a weight of that ratio; set "
                "importance_sampling_level: token"
            )
        other = (getattr(setup.args, "methods", None) or {}).get("velocity_rank") or {}
        if "velocity_rank" in setup.methods and other.get("bonus_on") == "last_token" and not self._neutral:
            problems.append(
                "velocity_rank's bonus at the last token makes token advantages, whose mass the weights would not keep; "
                "set velocity_rank's bonus_on: response"
            )
        if self.evidence is not None and self.pattern is not None:
            problems.append("evidence and pattern both say what to hide; name only one of them")
        if self.evidence is None and self.pattern is None and setup.images is False:
            problems.append(
                "hides images, and this model takes none; name what to hide in the prompt: evidence (a data set column) "
                "or pattern (a regular expression)"
            )
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                problems.append(f"pattern: {self.pattern!r} is not a regular expression ({error})")
        return problems

    # Rollout: hide the evidence, score again

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        if self._neutral:
            return {}
        hide = self.hidden(rollout)
        rollout.metrics.mean("hidden_tokens", hide.sum(1).float())
        found = {"shown": ~hide.any(1)}
        if self.estimator == "sampled":
            return found | {"blind": rollout.blind_logps(hide)}
        return found | {"dependency": _exact(rollout, hide)}

    def hidden(self, rollout: Rollout) -> Tensor:
        """(rows, L) bool: the prompt tokens to hide. ValueError, with the row, for evidence that cannot be found."""
        if self.evidence is None and self.pattern is None:
            return rollout.images
        hide = torch.zeros_like(rollout.images)
        done: dict[tuple[Any, ...], list[bool]] = {}  # the rows of a group have the same prompt
        for i, (ids, mask) in enumerate(zip(rollout.prompt_ids.tolist(), rollout.prompt_mask.tolist(), strict=True)):
            start = len(ids) - sum(mask)  # the prompt is padded on the left
            key = (*ids[start:], str(rollout.rows[i].get(str(self.evidence))))
            if key not in done:
                done[key] = self._marked(rollout, i, ids[start:])
            hide[i, start:] = torch.tensor(done[key], device=hide.device)
        return hide

    def _marked(self, rollout: Rollout, i: int, ids: list[int]) -> list[bool]:
        """Which tokens of a row's prompt hold evidence."""
        text = rollout.decode(ids)
        try:
            spans = matches(text, self.pattern) if self.pattern is not None else self._named(rollout, i, text)
        except ValueError as error:
            raise ValueError(f"pgpo: row {i} of the rollout: {error}") from None
        return [any(max(a, x) < min(b, y) for x, y in spans) for a, b in token_offsets(ids, rollout.decode_one, text)]

    def _named(self, rollout: Rollout, i: int, text: str) -> list[tuple[int, int]]:
        row: Any = rollout.rows[i]
        if self.evidence not in row:
            raise ValueError(f"the data set has no column '{self.evidence}' (it has: {', '.join(row)})")
        return places(text, row[self.evidence], user_text(rollout.prompts[i]))

    # Loss

    def token_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        if self._neutral:
            return weights
        scores = x.streams.get("dependency")
        if scores is None:
            logps = x.logps if x.old_logps is None else x.old_logps  # without old ones the weights have not moved
            scores = dependency(logps, x.streams["blind"])
        mask = x.mask.float()
        found = token_weights(scores, mask, self.threshold, self.boost, self.conserve_mass, x.streams["shown"])
        self._log(x, scores, mask, found)
        return weights * found

    def _log(self, x: LossInput, scores: Tensor, mask: Tensor, weights: Tensor) -> None:
        """Means over tokens; each `*_max` is the mean over sequences of the largest value in the row."""
        importance, alike = relative(scores, mask)
        plain = alike | x.streams["shown"]
        seen = mask * ~plain.unsqueeze(1)
        x.metrics.mean("dependency", scores, mask)
        x.metrics.mean("dependency_squashed", torch.log1p(scores), mask)
        rows = (mask.sum(1) > 0).float()
        x.metrics.mean("dependency_max", (scores * mask).amax(1), rows)
        x.metrics.mean("dependency_squashed_max", torch.log1p(scores * mask).amax(1), rows)
        x.metrics.mean("importance", importance, seen)
        x.metrics.mean("above_threshold", (importance >= self.threshold).float(), seen)
        x.metrics.mean("weight_max", (weights * mask).amax(1), rows)
        x.metrics.mean("degenerate_rows", plain.float(), rows)


def _exact(rollout: Rollout, hide: Tensor) -> Tensor:
    """(rows, T): KL between the policy with and without the hidden tokens, block by block, 0 outside the loss mask."""
    scores = torch.zeros_like(rollout.mask, dtype=torch.float32)
    for rows in torch.arange(hide.size(0), device=hide.device).split(rollout.micro_batch):
        here = rollout.mask[rows].bool()
        seeing, blind = rollout.other(POLICY, rows), rollout.other(POLICY, rows, hide=hide[rows])
        if here.any():
            scores[rows] = scores[rows].masked_scatter(here, _kl(seeing, blind, here))
    return scores


def _kl(seeing: Features, blind: Features, here: Tensor) -> Tensor:
    return per_position_detached(exact_dependency, [(side.head, side.at(here)) for side in (seeing, blind)])


def user_text(prompt: Any) -> str:
    """The text of the last user turn of a prompt (messages, with text or content blocks), or the prompt itself."""
    if isinstance(prompt, str):
        return prompt
    content = next(m["content"] for m in reversed(prompt) if m["role"] == "user")
    return content if isinstance(content, str) else "".join(b["text"] for b in content if b.get("type") == "text")
