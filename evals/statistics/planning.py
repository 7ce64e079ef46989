"""Before an evaluation: how many questions and replies are needed to see an effect of a given size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.stats import minimum_detectable_effect

AGREEMENT = 1 / 3
"""Share of a single reply's variance that lies between questions, where no pilot says it."""
GAIN_SD = 0.13
"""SD over questions of the true gain, where no pilot says it: that of the simulated pairs in this project's design."""


@dataclass(frozen=True)
class Variances:
    """Of the difference between two models: `between` questions (true differences, variance), and `within` a question
    (noise of one reply of each model: p (1 - p) + q (1 - q)), so that Var(d_i) = between + within / K.
    """

    between: float
    within: float

    def at(self, samples: float) -> float:
        """Var(d_i) with that many replies; `math.inf` leaves `between`."""
        return self.between + self.within / samples


@dataclass(frozen=True)
class Plan:
    """`samples`: smallest number of replies to each question that makes `effect` detectable, None if no number does.

    `detectable`: at `samples` (or in the limit); `floor`: with ever more replies to these questions. `tokens`: expected
    for all subjects, None unless planned. `questions_needed`: with one reply to each, and with ever more.
    """

    effect: float
    questions: int
    samples: int | None
    detectable: float
    floor: float
    tokens: int | None
    questions_needed: tuple[int, int]

    @property
    def words(self) -> str:
        """The plan in a sentence."""
        size = f"{100 * self.effect:.3g} points on {self.questions} questions"
        if self.samples is None:
            return (
                f"{size}: not detectable; even with ever more replies the smallest is {100 * self.floor:.1f} points. "
                f"It takes {self.questions_needed[1]} questions or more"
            )
        tokens = "" if self.tokens is None else f", about {self.tokens:,} tokens in all"
        replies = "1 reply" if self.samples == 1 else f"{self.samples} replies"
        return f"{size}: {replies} to each question (then {100 * self.detectable:.1f} points are detectable){tokens}"


def variances_of_means(before: Sequence[float], after: Sequence[float], samples: int) -> Variances:
    """From each question's means over `samples` replies that are 0 or 1, where the replies themselves are not at hand:
    within = mean of (p (1 - p) + q (1 - q)) K / (K - 1), between = max(0, Var(d) - within / K). Raises ValueError for K = 1.
    """
    p, q = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if samples < 2:
        raise ValueError("variances: one reply to each question does not tell noise from differences")
    within = float((p * (1 - p) + q * (1 - q)).mean()) * samples / (samples - 1)
    return Variances(max(0.0, float((q - p).var(ddof=1)) - within / samples), within)


def assumed_variances(accuracy: float, agreement: float = AGREEMENT, gain_sd: float = GAIN_SD) -> Variances:
    """Without a pilot, from the accuracy expected: within = 2 m (1 - m) (1 - agreement), between = gain_sd^2.

    `agreement` is the intraclass correlation of replies to one question; both defaults are assumptions.
    """
    if not (0 < accuracy < 1 and 0 <= agreement < 1 and gain_sd >= 0):
        raise ValueError("plan: accuracy must lie in (0, 1), agreement in [0, 1), and gain_sd must not be negative")
    return Variances(gain_sd**2, 2 * accuracy * (1 - accuracy) * (1 - agreement))


def detectable(variances: Variances, questions: int, samples: float) -> float:
    """2.80 sqrt((between + within / samples) / questions); `samples` may be `math.inf`."""
    return minimum_detectable_effect(math.sqrt(variances.at(samples) / questions))


def plan_effect(
    effect: float,
    questions: int,
    variances: Variances,
    tokens_per_reply: float | None = None,
    subjects: int = 2,
) -> Plan:
    """The smallest K with detectable(K) <= effect: K = within / (N (effect / 2.80)^2 - between), rounded up.

    Raises ValueError unless effect > 0, questions >= 2 and subjects >= 2.
    """
    if effect <= 0 or questions < 2 or subjects < 2:
        raise ValueError("plan: effect above 0, and at least 2 questions and 2 subjects (base and candidate)")
    square = (effect / minimum_detectable_effect(1.0)) ** 2
    room = questions * square - variances.between
    samples = max(1, math.ceil(variances.within / room - 1e-9)) if room > 0 else None
    tokens = None
    if samples is not None and tokens_per_reply is not None:
        tokens = round(samples * questions * subjects * tokens_per_reply)
    needed = [max(2, math.ceil(total / square - 1e-9)) for total in (variances.at(1), variances.between)]
    return Plan(
        effect=effect,
        questions=questions,
        samples=samples,
        detectable=detectable(variances, questions, samples or math.inf),
        floor=detectable(variances, questions, math.inf),
        tokens=tokens,
        questions_needed=(needed[0], needed[1]),
    )
