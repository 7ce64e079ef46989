"""Which synthetic rows may be trained on: whole, harmless to the chat template, new, and no copy of an evaluation.

Two texts are near duplicates when their word n-grams overlap by a Jaccard index |A & B| / |A | B| of at least a limit;
n-grams that more than half of the known texts share are the task's instruction, and count for neither.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.contamination import Index, gram_hashes, normalised_words
from evals.task import Source, Task
from evals.training_data import COLUMNS

ACCEPTED = "accepted"
# What chat templates use as marks: in a prompt they would begin or end a turn.
_MARKS = re.compile(
    r"<[|\uff5c][^|\uff5c>\n]{0,100}[|\uff5c]>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,20}\]"
    r"|</?(?:think|tool_call|tool_response)>|<</?SYS>>"
)
_ALLOWED_CONTROL = "\n\t"


def question_text(row: Mapping[str, Any]) -> str:
    """The prompt if it is text, else the content of its last turn."""
    prompt = row["prompt"]
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def with_question(prompt: Any, old: str, new: str) -> Any:
    """The prompt with `new` in place of `old`, which must stand once in its last turn; ValueError if it does not."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if text.count(old) != 1:
        raise ValueError(
            f"the question {old[:80]!r} must stand exactly once in the prompt's last turn, it stands there "
            f"{text.count(old)} times"
        )
    text = text.replace(old, new)
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


class KnownTexts:
    """Texts that a new one must differ from; `n` words make one n-gram."""

    def __init__(self, texts: Iterable[str], n: int) -> None:
        self.n = n
        self._same: set[str] = set()
        self._grams: list[frozenset[int]] = []
        self._holders: dict[int, list[int]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """From now on `text` is known."""
        words = normalised_words(text)
        grams = self._of(words)
        for gram in grams:
            self._holders.setdefault(gram, []).append(len(self._grams))
        self._grams.append(grams)
        self._same.add(" ".join(words))

    def _of(self, words: Sequence[str]) -> frozenset[int]:
        return frozenset(gram_hashes(words, min(self.n, len(words)))) if words else frozenset()

    def likeness(self, text: str) -> float:
        """1 for the same words as a known text (capitals and punctuation aside), else the largest Jaccard index."""
        words = normalised_words(text)
        if " ".join(words) in self._same:
            return 1.0
        own = self._telling(self._of(words))
        shared = Counter(number for gram in own for number in self._holders.get(gram, ()))
        return max(
            (count / len(own | self._telling(self._grams[number])) for number, count in shared.items()), default=0.0
        )

    def _telling(self, grams: frozenset[int]) -> frozenset[int]:
        """Those that at most half of the known texts hold; all of them if there are fewer than three texts."""
        total = len(self._grams)
        return frozenset(g for g in grams if total < 3 or 2 * len(self._holders.get(g, ())) <= total)


def evaluation_parts(names: Sequence[str]) -> tuple[list[str], list[Task]]:
    """The names that are files of one text per line, and the evaluations that the others name; ValueError for neither."""
    from evals.tasks import get_tasks  # here, since it loads every grader

    files = [name for name in names if Path(name).is_file()]
    others = [name for name in names if name not in files]
    return files, get_tasks(others) if others else []


def load_evaluation(names: Sequence[str]) -> Index:
    """The n-grams of the texts behind these names; ValueError for an unknown one, `evals.task.DataError` if a benchmark cannot be had."""
    files, tasks = evaluation_parts(names)
    prompts: dict[str, str] = {}
    questions: dict[str, str] = {}
    for item in (item for task in tasks for item in task.load(Source())):
        prompts[item.id] = "\n".join(message["content"] for message in item.messages)
        questions[item.id] = item.messages[-1]["content"]
    for name in files:
        lines = [line for line in Path(name).read_text(encoding="utf-8").split("\n") if line.strip()]
        prompts |= {f"{name}:{i}": line for i, line in enumerate(lines)}
        questions |= {f"{name}:{i}": line for i, line in enumerate(lines)}
    return Index.of(prompts, questions)


@dataclass(frozen=True)
class Vetting:
    """The rules: `similar` is the Jaccard index from which two texts are near duplicates, `max_chars` bounds a prompt.

    A row is contaminated if it shares 13 words in a row with an evaluation's prompt, or 8 with its question.
    """

    known: KnownTexts
    evaluation: Index
    similar: float
    max_chars: int

    def verdict(self, row: Any, like: Mapping[str, Any]) -> str:
        """ "accepted", which makes the row known, or why not. `like`: the seed row, whose columns it must have."""
        problem = _form_problem(row, like) or _text_problem(row, self.max_chars)
        if problem is None:
            problem = self._copy_problem(row)
        if problem is None:
            self.known.add(question_text(row))
        return problem or ACCEPTED

    def _copy_problem(self, row: Mapping[str, Any]) -> str | None:
        likeness = self.known.likeness(question_text(row))
        if likeness >= 1:
            return "duplicate: the pool has this text"
        if likeness >= self.similar:
            return f"near duplicate: Jaccard index {likeness:.2f} with a text of the pool"
        if self.evaluation.met_by(training_text(row)):
            return "contamination: shares its words with an evaluation"
        return None


def training_text(row: Mapping[str, Any]) -> str:
    """All text of a row that a model may learn from, as `evals.training_data` reads it."""
    found = [row[name] for name in COLUMNS if row.get(name)]
    return "\n".join("\n".join(str(turn["content"]) for turn in v) if _turns(v) else str(v) for v in found)


def _turns(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in value)


def _form_problem(row: Any, like: Mapping[str, Any]) -> str | None:
    """Columns and their kinds as in `like`, a prompt of text turns that ends with the user's, and plain JSON."""
    if not isinstance(row, Mapping) or row.keys() != like.keys():
        found = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        return f"columns: {found}, the training set has {sorted(like)}"
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError
        return f"not JSON: {error}"
    for name, value in row.items():
        if value is not None and like[name] is not None and type(value) is not type(like[name]):
            return f"column {name}: {type(value).__name__}, the training set has {type(like[name]).__name__}"
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not (_turns(prompt) and prompt and prompt[-1].get("role") == "user"):
        return "prompt: neither text nor turns of text that end with the user's"
    return None


def _text_problem(row: Mapping[str, Any], max_chars: int) -> str | None:
    turns = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
    if not question_text(row).strip():
        return "prompt: empty"
    if sum(map(len, turns)) > max_chars:
        return f"prompt: longer than {max_chars} characters"
    for text in turns:
        if mark := _MARKS.search(text):
            return f"prompt: holds {mark[0]!r}, which chat templates use"
        if any(unicodedata.category(c) in ("Cc", "Cs") and c not in _ALLOWED_CONTROL for c in text):
            return "prompt: holds control characters"
    return None
