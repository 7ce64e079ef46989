"""PasoDoble's rules (arXiv 2511.11881), as pure functions: no model, no trainer.

I questions of one knowledge text, J answers to each. p_i = share of the J answers that equal the Proposer's own answer.

- gates: p_i counts as 0 if question or answer is missing, if one text contains the other, or the question a box;
- diversity: d_i = 1 - #{h in H : Jaccard(q_i, h) > 0.8} / |H|, 1 if H is empty; texts are sets of token ids;
- Proposer: r_i = 0 if p_i <= tau_low or d_i <= tau_div, else (1.1 - p_i) + w d_i;
- Solver: trains on questions with tau_low < p_i < p_high.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from evals.graders.answers import last_boxes
from trl_ext.sandbox.rewards import parse_reply

EASY_BONUS = 1.1
"""A question that the Solver always answers still earns 0.1 (card: paper)."""
TokenSet = frozenset[int]
_BOX = "\\boxed{"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Proposal:
    """A question with the answer that its Proposer gives; "" is missing."""

    question: str
    answer: str

    @property
    def complete(self) -> bool:
        """Whether both are there, so that it can be asked and checked."""
        return bool(self.question and self.answer)


def parse_blocks(text: str) -> Proposal:
    """The paper's form: first <problem> block after the last </think>, answer in the last box after it."""
    text = text.rpartition("</think>")[2]
    question, end, _ = text.partition("<problem>")[2].partition("</problem>")
    return Proposal(question.strip() if end else "", last_boxed(text))


def parse_json(text: str) -> Proposal:
    """The sandbox's form: the question, then from the first { on its reply, `{"steps": [...], "answer": n}`."""
    question, brace, rest = text.partition("{")
    reply = parse_reply((brace + rest).strip())
    return Proposal(question.strip(), "" if reply is None else str(reply["answer"]))


PARSERS: dict[str, Callable[[str], Proposal]] = {"blocks": parse_blocks, "json": parse_json}


def last_boxed(text: str) -> str:
    """What stands in the last \\boxed{...}, read as the evaluation's grader does; "" if there is none, or it never closes."""
    return (last_boxes(text) or [""])[-1]


def failed_gates(proposal: Proposal, answer_check: str = "substring") -> list[str]:
    """Names of the anti-hacking rules that a proposal breaks: "missing", "question in answer", "box", "answer in question".

    `answer_check`: "substring" is the paper's rule; "tokens" compares whole numbers (12 is not in 120) where the answer
    is one; "off" leaves that rule out.
    """
    if not proposal.complete:
        return ["missing"]
    broken = {
        "question in answer": proposal.question in proposal.answer,
        "box": _BOX in proposal.question,
        "answer in question": _gives_away(proposal, answer_check),
    }
    return [name for name, wrong in broken.items() if wrong]


def _gives_away(proposal: Proposal, answer_check: str) -> bool:
    if answer_check == "off":
        return False
    if answer_check == "tokens" and _NUMBER.fullmatch(proposal.answer):
        return proposal.answer in _NUMBER.findall(proposal.question)
    return proposal.answer in proposal.question


def jaccard(first: Set[int], second: Set[int]) -> float:
    """Intersection over union; 0 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def diversity(question: Set[int], history: Sequence[Set[int]], threshold: float = 0.8) -> float:
    """d in [0, 1]: the share of `history` that is not nearly this question; 1 without history."""
    if not history:
        return 1.0
    return 1 - sum(jaccard(question, old) > threshold for old in history) / len(history)


def remembered(history: Sequence[TokenSet], questions: Sequence[TokenSet], size: int = 100) -> list[TokenSet]:
    """`history` with `questions` behind it, the oldest dropped beyond `size`. An empty set is no question."""
    return [*history, *(q for q in questions if q)][-size:]


def proposer_reward(p: float, d: float, tau_low: float = 0.2, tau_div: float = 0.3, weight: float = 0.2) -> float:
    """r_P: 0 for a question that is not valid (p <= tau_low) or not new (d <= tau_div), else (1.1 - p) + weight d."""
    return 0.0 if p <= tau_low or d <= tau_div else EASY_BONUS - p + weight * d


def trains_solver(p: float, tau_low: float = 0.2, p_high: float = 1.0) -> bool:
    """Whether a question's answers train the Solver: tau_low < p < p_high."""
    return tau_low < p < p_high


def skipped(
    passes: Sequence[float], rewards: Sequence[float], tau_low: float = 0.2, p_high: float = 1.0
) -> str | None:
    """Why a round trains nobody, or None: no (checked) pass rate inside the interval, or no Proposer advantage."""
    if not any(trains_solver(p, tau_low, p_high) for p in passes):
        return "pass rates"
    return "advantages" if max(rewards) == min(rewards) else None


def circular(items: Sequence[Proposal], start: int, count: int) -> tuple[list[Proposal], int]:
    """Up to `count` different `items` from `start` on, round the end, and where the next call starts."""
    count = min(count, len(items))
    return [items[(start + i) % len(items)] for i in range(count)], (start + count) % len(items)


@dataclass(frozen=True)
class Phase:
    """Where the offline schedule stands: who plays, and how much of the block is done."""

    player: str = "proposer"
    done: int = 0


def next_phase(phase: Phase, updated: bool, proposer_updates: int, solver_rounds: int) -> Phase:
    """After a round: the Proposer's block ends after so many updates, the Solver's after so many rounds."""
    if phase.player == "proposer":
        done = phase.done + updated
        if done < proposer_updates:
            return Phase("proposer", done)
        return Phase("solver") if solver_rounds else Phase("proposer")
    return Phase("solver", phase.done + 1) if phase.done + 1 < solver_rounds else Phase("proposer")
