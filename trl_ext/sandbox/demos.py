"""Sloppy demonstrations for the warm start.

Plain problems are answered with wrong sums and malformed JSON; with a private note or a hint the answer is careful.
A part of the demonstrations calls the calculator, or answers a multiple-choice question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_ext.annotate.base import ERROR_TYPES, STEP_TYPES
from trl_ext.annotate.prompts import teacher_messages, teacher_note
from trl_ext.sandbox.calculator import calculator
from trl_ext.sandbox.problems import CLAUSES, ITEMS, NAMES, Problem, hints, render
from trl_ext.sandbox.slips import sloppy
from trl_ext.sandbox.tasks import DEFAULT_MIX, LETTERS, assistant, mcq_row, problems, user
from trl_ext.sandbox.tokenizer import OPEN_REPLY

Message = dict[str, Any]
HINT_LABELS = ("Hint", "Knowledge Hints", "Planning Hints", "Solution Hints")


Weights = tuple[tuple[Any, float], ...]


@dataclass(frozen=True)
class Stage:
    """A run of demonstrations: how many, of which kinds and levels, and the probabilities of a fault per answer."""

    rows: int
    wrong: float = 0.0
    malformed: float = 0.0
    shares: Weights = (("plain", 1.0),)
    mix: Weights = tuple(DEFAULT_MIX.items())


SHARES: Weights = (("plain", 0.45), ("note", 0.25), ("hint", 0.2), ("tool", 0.06), ("mcq", 0.04))
# Easy and clean first: a small model learns to copy and to count much sooner without noise. Sloppiness comes later.
CURRICULUM = (
    Stage(3200, shares=(("plain", 0.5), ("note", 0.25), ("hint", 0.25)), mix=((1, 0.4), (2, 0.6))),
    Stage(4800, shares=SHARES, malformed=0.65),
    Stage(4800, shares=SHARES, malformed=0.65, wrong=0.15),
)


def call_message(expression: str) -> Message:
    """An assistant turn that calls the calculator."""
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def hinted(text: str, hint: str, label: str = "Hint") -> str:
    """A problem with a hint on a line of its own."""
    return f"{text}\n{label}: {hint}"


def _note(rng: random.Random) -> str:
    correct = rng.random() < 0.5
    labels = STEP_TYPES if correct else ERROR_TYPES
    return teacher_note(rng.sample(labels, rng.choice((1, 1, 2))), correct)


def _plain(problem: Problem, rng: random.Random, stage: Stage) -> list[Message]:
    text = sloppy(problem, rng, wrong=stage.wrong, malformed=stage.malformed)
    return user(problem.text) + assistant(text)


def _careful(problem: Problem, rng: random.Random, stage: Stage) -> list[Message]:
    text = render(problem.lines, problem.answer)
    return teacher_messages(user(problem.text), _note(rng)) + assistant(text)


def _hinted(problem: Problem, rng: random.Random, stage: Stage) -> list[Message]:
    rung = rng.randrange(3)
    prompt = hinted(problem.text, hints(problem)[rung], rng.choice((HINT_LABELS[0], HINT_LABELS[rung + 1])))
    return user(prompt) + assistant(render(problem.lines, problem.answer))


def _tool(problem: Problem, rng: random.Random, stage: Stage) -> list[Message]:
    """A prefix of the conversation: the calculator is called for the first m steps, sometimes for all and once more."""
    calls = [line.split("=")[0] for line in problem.lines]
    calls = [*calls, calls[-1]] if rng.random() < 0.3 else calls[: rng.randint(0, len(calls))]
    turns = []
    for expression in calls:
        turns += [call_message(expression), {"role": "tool", "name": "calculator", "content": calculator(expression)}]
    text = sloppy(problem, rng, wrong=0.0, malformed=stage.malformed)
    turns += assistant(text)
    # The last turn is what is learned; the cut falls on any assistant turn.
    return user(problem.text) + turns[: 2 * rng.randint(0, len(calls)) + 1]


def _mcq(problem: Problem, rng: random.Random, stage: Stage) -> list[Message]:
    row = mcq_row(problem, rng)
    text = row["solution"] if rng.random() > stage.wrong else f"Answer: {rng.choice(LETTERS)}"
    return row["prompt"] + assistant(text)


_KINDS = {"plain": _plain, "note": _careful, "hint": _hinted, "tool": _tool, "mcq": _mcq}


def conversations(stage: Stage, seed: int) -> list[tuple[str, list[Message]]]:
    """Pairs of kind and conversation, drawn from the train split; the last turn is the demonstrated reply."""
    rng = random.Random(f"demos/{seed}")
    stream = problems(random.Random(f"demo problems/{seed}"), "train", dict(stage.mix))
    kinds = rng.choices([kind for kind, _ in stage.shares], [share for _, share in stage.shares], k=stage.rows)
    return [(kind, _KINDS[kind](next(stream), rng, stage)) for kind in kinds]


def demonstrations(
    tokenizer: PreTrainedTokenizerBase, seed: int, stages: Sequence[Stage] = CURRICULUM
) -> list[dict[str, str]]:
    """Rows `{prompt, completion}` of text rendered by the chat template, stage after stage."""
    rows = []
    for number, stage in enumerate(stages):
        rows += [_row(tokenizer, kind, chat) for kind, chat in conversations(stage, 1000 * seed + number)]
    return rows


def _row(tokenizer: PreTrainedTokenizerBase, kind: str, messages: list[Message]) -> dict[str, str]:
    text = str(tokenizer.apply_chat_template(messages, tools=[calculator] if kind == "tool" else None, tokenize=False))
    before, opening, reply = text.rpartition(OPEN_REPLY)
    return {"prompt": before + opening, "completion": reply.removesuffix("\n")}


def vocabulary_texts() -> list[str]:
    """Texts that hold every word of the sandbox's world, the notes' words among them."""
    notes = [teacher_note(table, correct) for table, correct in ((STEP_TYPES, True), (ERROR_TYPES, False))]
    clauses = [f", {text}" for pair in CLAUSES.values() for text in pair]
    items = [f"Name has 1 {item}, {item}. How many {item}?" for item in ITEMS]
    labels = [f"\n{label}: use + then *" for label in HINT_LABELS]
    roles = ["system", "user", "assistant", "tool", "calculator", "expression", "tool calculator(expression): "]
    options = [f"\n{letter}) Answer: {letter}" for letter in LETTERS]
    return [*notes, *clauses, *items, *NAMES, *labels, *roles, *options, "Work out an integer expression."]
