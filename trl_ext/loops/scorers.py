"""Who judges the replies of a round: the recipe's rewards, an ensemble of scorers, or a model behind an endpoint.

Each gives, for the n replies to one prompt, a score of each (or none) and P (n, n), the probability that reply i is
better than reply j:

    verifier   scores from the recipe's rewards, weighted and summed; P is 1, 0, or 0.5 for equal scores
    ensemble   k scorers; P = mean over scorers of sigmoid((s_i - s_j) / temperature), scores are their mean, which a
               reply on which one of them abstains does not have
    judge      a chat model. compare: P from its verdicts on both orders of every two replies, no scores;
               rubric: one score from 0 to 6 for each reply, side by side, and P as of the verifier
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.annotate.endpoint import EndpointAnnotator
from trl_ext.loops.pairs import losing, wins_of_members, wins_of_scores
from trl_ext.plan import did_you_mean
from trl_ext.rewards.checked import Reward, RewardError, shown

KINDS = ("verifier", "ensemble", "judge")
MAX_UNREAD = 0.1
"""Share of the questions to a judge that may stay without a readable verdict, unless `max_unread` says another."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """One completion: its text, its token ids, and whether it is an automatic negative, which loses to all others."""

    text: str
    tokens: tuple[int, ...] = ()
    negative: bool = False


@dataclass(frozen=True)
class Judged:
    """The verdict on n replies: `scores` (n) or None, `wins` (n, n), and questions to a judge that had no answer."""

    scores: list[float | None] | None
    wins: Tensor
    unread: int = 0


class Scorer:
    """Base of the three. `name` is what the files of a round call it."""

    name: str
    scores: bool = True
    """Whether there are scores, which `pairs: rubric` and KTO's labels need."""

    def judge(self, rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> list[Judged]:
        """The verdict on the replies to each row's prompt."""
        raise NotImplementedError

    def win_rates(
        self, rows: Sequence[Row], new: Sequence[Sequence[Reply]], old: Sequence[Sequence[Reply]]
    ) -> list[float]:
        """For each row the mean of P[i, j] over new replies i and old replies j, automatic negatives put in."""
        both = [[*a, *b] for a, b in zip(new, old, strict=True)]
        wins = [
            losing(one.wins, [reply.negative for reply in some])
            for one, some in zip(self.judge(rows, both), both, strict=True)
        ]
        return [float(some[: len(a), len(a) :].mean()) for some, a in zip(wins, new, strict=True)]


@dataclass(frozen=True)
class Verifier(Scorer):
    """`rewards` are checked reward functions, called as TRL calls them; `weights` default to 1 each."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...] | None = None
    name: str = "verifier"

    def judge(self, rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> list[Judged]:
        """A reply for which every reward is None has no score, and neither wins nor loses."""
        values = reward_values(self.rewards, rows, replies)  # (F, all replies)
        weights = torch.tensor(self.weights or [1.0] * len(self.rewards), dtype=torch.float64)
        total = (values * weights[:, None]).nansum(0).where(~values.isnan().all(0), math.nan)
        return [
            Judged(scores := _known(part), wins_of_scores(scores))
            for part in total.split([len(some) for some in replies])
        ]


@dataclass(frozen=True)
class Ensemble(Scorer):
    """Members: reward functions, reward models and adapters (`trl_ext.rewards.reward_models`), at least two in all."""

    rewards: tuple[Reward, ...] = ()
    models: tuple[Any, ...] = ()
    temperature: float = 1.0
    name: str = "ensemble"

    def judge(self, rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> list[Judged]:
        """A member's None (NaN) is left out of its reply's pairs. Scores: `shared_means`."""
        values = self._members(rows, replies)
        return [
            Judged(_known(shared_means(part)), wins_of_members(part, self.temperature))
            for part in values.split([len(some) for some in replies], dim=1)
        ]

    def _members(self, rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> Tensor:
        """(k, all replies)."""
        parts = [reward_values(self.rewards, rows, replies)] if self.rewards else []
        if self.models:
            prompts, completions = _conversations(rows, replies)
            for model in self.models:
                name = getattr(model, "path", None) or ", ".join(model.paths)
                parts.append(_finite(model(prompts, completions).double(), name, prompts))
        return torch.cat(parts)


def shared_means(scores: Tensor) -> Tensor:
    """(k, n) scores of one prompt's replies -> (n,): means over the same members, NaN where there is none.

    A member that abstains (NaN) on all n replies is left out; a reply on which another member abstains has no mean, as
    it would be over fewer members than those it is compared with.
    """
    voting = scores[~scores.isnan().all(1)]
    return voting.mean(0) if len(voting) else scores.new_full((scores.size(1),), math.nan)


def reward_values(rewards: Sequence[Reward], rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> Tensor:
    """(F, all replies) float64, replies of one prompt in a row; NaN where a reward is None.

    RewardError for an infinite one.
    """
    prompts, completions = _conversations(rows, replies)
    sizes = [len(some) for some in replies]
    columns = {
        key: [row[key] for row, n in zip(rows, sizes, strict=True) for _ in range(n)]
        for key in (rows[0] if rows else {})
        if key not in ("prompt", "completion", "completion_ids")
    }
    columns["completion_ids"] = [list(reply.tokens) for some in replies for reply in some]
    found = []
    for reward in rewards:
        values = reward(prompts=prompts, completions=completions, **columns)
        scores = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
        found.append(_finite(scores, getattr(reward, "__name__", type(reward).__name__), prompts))
    return torch.stack(found)


def _finite(scores: Tensor, name: str, prompts: Sequence[Any]) -> Tensor:
    """`scores` (..., all replies); RewardError when one is infinite, which no file of a round can hold."""
    bad = scores.isinf().reshape(-1, scores.size(-1)).any(0).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"reward '{name}' gave an infinite score to {len(bad)} of {scores.size(-1)} replies, the first to the prompt "
            f"{shown(prompts[bad[0]])}. Make it return a finite number, or None for a reply that it cannot judge."
        )
    return scores


def make_scorer(spec: Any, rewards: Sequence[Reward | str], weights: Sequence[float] | None, folder: str) -> Scorer:
    """From `scorer:` of a recipe: a name of `KINDS`, or {name: settings}. `folder` keeps a judge's answers.

    ValueError with what is wrong. Reward models are loaded at their first call.
    """
    name, settings = spec_of(spec)
    functions = tuple(reward for reward in rewards if not isinstance(reward, str))
    if len(functions) < len(rewards):
        raise ValueError(
            "a reward model is a member of scorer: {ensemble: {models: [...]}}; remove it from the rewards"
        )
    if name == "judge":
        return _judge(settings, folder)
    if name == "ensemble":
        return _ensemble(functions, **_known_settings(settings, ("models", "adapters", "backbone", "temperature")))
    _known_settings(settings, ())
    if not functions:
        raise ValueError("the verifier is the recipe's `rewards`: name at least one")
    return Verifier(functions, None if weights is None else tuple(weights))


def spec_of(spec: Any) -> tuple[str, dict[str, Any]]:
    """(name, settings) of `scorer:`; ValueError for anything but one known name."""
    wanted = {spec: {}} if isinstance(spec, str) else spec
    if not isinstance(wanted, Mapping) or len(wanted) != 1:
        raise ValueError(f"expected one of {', '.join(KINDS)}, or a mapping of one of them to settings, got {spec!r}")
    ((name, settings),) = wanted.items()
    if name not in KINDS:
        raise ValueError(f"{name!r} is not one of {', '.join(KINDS)}{did_you_mean(str(name), KINDS)}")
    if not isinstance(settings, Mapping | None):
        raise ValueError(f"{name}: expected a mapping of its settings, got {settings!r}")
    return name, dict(settings or {})


def _ensemble(
    rewards: tuple[Reward, ...],
    models: Sequence[str] = (),
    adapters: Sequence[str] = (),
    backbone: str | None = None,
    temperature: float = 1.0,
) -> Ensemble:
    from trl_ext.rewards.reward_models import AdapterScorer, ModelScorer, Scoring

    for key, paths in {"models": models, "adapters": adapters}.items():
        if isinstance(paths, str) or not isinstance(paths, Sequence) or not all(isinstance(p, str) for p in paths):
            raise ValueError(f"ensemble: {key} {paths!r} must be a list of folders or Hub names, such as [org/name]")
    if backbone is not None and not adapters:
        raise ValueError(f"ensemble: backbone {backbone!r} is what `adapters` are put on; name adapters, or remove it")
    if len(rewards) + len(models) + len(adapters) < 2:
        raise ValueError("an ensemble has at least two members: `rewards` of the recipe, `models`, `adapters`")
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        raise ValueError(f"ensemble: temperature {temperature!r} must be a finite number > 0")
    found: list[Any] = [ModelScorer(path, Scoring()) for path in models]
    found += [AdapterScorer(tuple(adapters), backbone, Scoring())] if adapters else []
    return Ensemble(rewards, tuple(found), temperature)


def _judge(settings: dict[str, Any], folder: str) -> Scorer:
    mode, most = settings.pop("mode", "compare"), settings.pop("max_unread", MAX_UNREAD)
    if mode not in ("compare", "rubric"):
        raise ValueError(f"judge: mode {mode!r} is not one of compare, rubric")
    if not isinstance(most, (int, float)) or isinstance(most, bool) or not 0 <= most <= 1:
        raise ValueError(f"judge: max_unread {most!r} must be a share from 0 to 1")
    fields = [f.name for f in dataclasses.fields(EndpointAnnotator) if f.init]
    _known_settings(settings, [*fields, "mode", "max_unread"])
    if missing := {"base_url", "model"} - set(settings):
        raise ValueError(f"a judge needs {' and '.join(sorted(missing))}")
    from trl_ext.loops.judge import Judge

    client: dict[str, Any] = {"max_tokens": 64, "cache_dir": folder} | settings
    return Judge(EndpointAnnotator(**client), mode, float(most))


def _known_settings(settings: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    if unknown := [key for key in settings if key not in known]:
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"unknown setting '{unknown[0]}'{near} (it has: {', '.join(known) or 'none'})")
    return settings


def _conversations(rows: Sequence[Row], replies: Sequence[Sequence[Reply]]) -> tuple[list[Any], list[Any]]:
    pairs = [(row["prompt"], reply.text) for row, some in zip(rows, replies, strict=True) for reply in some]
    return [prompt for prompt, _ in pairs], [[{"role": "assistant", "content": text}] for _, text in pairs]


def _known(values: Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]
