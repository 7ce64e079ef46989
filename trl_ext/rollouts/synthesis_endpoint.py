"""Variants of a task written by a model behind an OpenAI-compatible endpoint, and checked by a second question to it.

The model sees the seed's question and answer and writes both anew; asked for the same structure and one coherent story
(RODS's planning and rewriting in one request). Then it has to solve its own question, greedily and without the answer:
where the two answers differ the variant is refused (the judge). Replies are data: strict JSON of two texts, bounded in
length, which end up in the prompt and in the answer column, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.graders.strict_json import load_tolerant
from trl_ext.annotate.base import AnnotatorError, RefusedError
from trl_ext.annotate.endpoint import EndpointAnnotator, check_fields
from trl_ext.method import Unavailable
from trl_ext.rollouts.synthesis import Ask, Offer
from trl_ext.rollouts.vetting import question_text, with_question

_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3}){1,20}([.][0-9]{1,40})?")
MAX_REPLY_CHARS = 40_000
MAX_ANSWER_CHARS = 2_000
_CLIENT = (
    "base_url",
    "model",
    "api_key_env",
    "timeout",
    "retries",
    "concurrency",
    "max_tokens",
    "extra_body",
    "backoff",
)
_WRITE = """\
Below is a task for a student, and its answer.

<task>
{question}
</task>
<answer>
{answer}
</answer>

The student gets it right in {rbar:.0%} of the attempts. Write one new task of the same kind and the same difficulty: as \
many steps, of the same kind, in the same order, each using the result of the same earlier ones; with other numbers, \
names and things, told as one coherent story. Keep every instruction about the form of the answer word by word. Work out \
the new answer with care; give it in the form of the answer above.
Reply with one JSON object and nothing else: {{"task": "...", "answer": "..."}}
This is variant {number}.{again}"""
_AGAIN = "\nAn earlier variant was refused: {reason}. Write a different one."
_SOLVE = """\
Solve this task.

<task>
{question}
</task>

Reply with one JSON object and nothing else: {{"answer": "..."}}, the answer in the form of this one: {example}"""


@dataclass(frozen=True)
class EndpointSynthesiser:
    """Asks `model` at `base_url`/chat/completions; time limits, retries and the rest of `EndpointAnnotator`'s settings.

    - `question`: the column that holds the question as it stands in the prompt; None: the whole last turn is written.
    - `answer`: the column with the answer. `keep`: columns that a variant has in common with its seed (a level, a source);
      all others are empty (None) in a variant.
    - `judge`: the model must come to the same answer a second time. `temperature` of the writing.
    - `folder`: replies are kept there by content, so that a run that goes on does not ask again.

    Raises ValueError for unusable settings; a call raises Unavailable when no request of a round was answered, and for
    an address, key or model that the server refuses.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 3
    concurrency: int = 8
    max_tokens: int = 1024
    backoff: float = 1.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    question: str | None = None
    answer: str = "answer"
    keep: Sequence[str] = ()
    judge: bool = True
    folder: str | None = None

    _answered: set[bool] = field(default_factory=set, init=False, repr=False, compare=False)
    """Not empty once a request was answered: the settings are then not what a server refuses."""

    def __post_init__(self) -> None:
        if "temperature" in self.extra_body:
            raise ValueError("extra_body: name the temperature of the writing as `temperature`; the judge's is 0")
        self._client(self.temperature)

    def _client(self, temperature: float) -> EndpointAnnotator:
        settings = {name: getattr(self, name) for name in _CLIENT}
        settings["extra_body"] = {**self.extra_body, "temperature": temperature}
        return EndpointAnnotator(**settings, cache_dir=None if self.folder is None else Path(self.folder))

    def check(self, row: Mapping[str, Any]) -> None:
        """What can be known before the first epoch is over: Unavailable if `api_key_env` is not set, ValueError if `row`
        of the training set lacks a column that is named here."""
        wanted = {self.answer, *self.keep} | ({self.question} if self.question is not None else set())
        if missing := sorted(wanted - row.keys()):
            raise ValueError(
                f"rods: the synthesizer names {', '.join(missing)}, and the training set has the columns {', '.join(row)}; "
                "set answer, question and keep to its names"
            )
        if self.api_key_env is not None and not os.environ.get(self.api_key_env, "").strip():
            raise Unavailable(
                f"rods: the environment variable {self.api_key_env} (api_key_env) is not set; export the key"
            )

    def __call__(self, asks: Sequence[Ask]) -> list[Offer]:
        """One variant for each ask, or why there is none."""
        texts = self._answers([self._writing(ask) for ask in asks], self.temperature)
        offers = [self._offer(ask, text) for ask, text in zip(asks, texts, strict=True)]
        return self._judged(asks, offers) if self.judge else offers

    def _answers(self, conversations: list[list[dict[str, str]]], temperature: float) -> list[str | None]:
        if not conversations:
            return []
        try:
            found = self._client(temperature).complete(conversations)
            self._answered.add(True)
            return found
        except RefusedError as error:
            if self._answered:  # these texts alone are refused, and would be again after a restart
                return [None] * len(conversations)
            raise self._stopped(error) from error
        except AnnotatorError as error:
            raise self._stopped(error) from error

    def _stopped(self, error: AnnotatorError) -> Unavailable:
        return Unavailable(
            f"rods: no new rows can be made, so the run stops here. {error}\nRows and replies so far are in the run's "
            "folder; once the endpoint answers again, --resume goes on."
        )

    def _question(self, row: Mapping[str, Any]) -> str:
        return question_text(row) if self.question is None else str(row[self.question])

    def _writing(self, ask: Ask) -> list[dict[str, str]]:
        again = "" if ask.refused is None else _AGAIN.format(reason=ask.refused)
        text = _WRITE.format(
            question=self._question(ask.row),
            answer=ask.row[self.answer],
            rbar=ask.stats["rbar"],
            number=ask.number,
            again=again,
        )
        return [{"role": "user", "content": text}]

    def _offer(self, ask: Ask, text: str | None) -> Offer:
        notes = {"model": self.model}
        if text is None:
            return Offer(None, "the endpoint gave no answer", notes)
        found = read_reply(text, ("task", "answer"))
        if isinstance(found, str):
            return Offer(None, f"reply: {found}", notes)
        try:
            return Offer(self._row(ask.row, found["task"], found["answer"]), None, notes)
        except ValueError as error:
            return Offer(None, f"reply: {error}", notes)

    def _row(self, seed: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
        kind = type(seed[self.answer])
        if kind not in (str, int, float):
            raise ValueError(f"column {self.answer} holds {kind.__name__}, not text or a number")
        row: dict[str, Any] = {name: value if name in self.keep else None for name, value in seed.items()}
        row["prompt"] = with_question(seed["prompt"], self._question(seed), question)
        row[self.answer] = kind(answer)
        return row if self.question is None else {**row, self.question: question}

    def _judged(self, asks: Sequence[Ask], offers: list[Offer]) -> list[Offer]:
        asked = [i for i, offer in enumerate(offers) if offer.row is not None]
        texts = self._answers([self._solving(offers[i].row or {}, asks[i]) for i in asked], 0.0)
        for i, text in zip(asked, texts, strict=True):
            offers[i] = self._with_verdict(offers[i], text)
        return offers

    def _solving(self, row: Mapping[str, Any], ask: Ask) -> list[dict[str, str]]:
        text = _SOLVE.format(question=self._question(row), example=ask.row[self.answer])
        return [{"role": "user", "content": text}]

    def _with_verdict(self, offer: Offer, text: str | None) -> Offer:
        assert offer.row is not None
        found = "no answer" if text is None else read_reply(text, ("answer",))
        if isinstance(found, str):
            return dataclasses.replace(offer, refused=f"judge: {found}", notes={**offer.notes, "judge": found})
        own, other = str(offer.row[self.answer]), found["answer"]
        notes = {**offer.notes, "judge": other}
        if same_answer(own, other):
            return dataclasses.replace(offer, notes=notes)
        return dataclasses.replace(offer, refused="judge: comes to another answer", notes=notes)


def read_reply(text: str, keys: Sequence[str]) -> dict[str, str] | str:
    """The texts at exactly these keys of the one JSON object that a reply is; else what is wrong with it, in words."""
    if len(text) > MAX_REPLY_CHARS:
        return f"longer than {MAX_REPLY_CHARS} characters"
    parsed = load_tolerant(text)
    if not parsed.ok:
        return f"no JSON ({parsed.problem})"
    value = parsed.value
    if not isinstance(value, dict) or set(value) != set(keys):
        return f"not one object with the keys {', '.join(keys)} and no other"
    if any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in value.values()):
        return "a value is neither text nor a number"
    found = {key: str(v).strip() for key, v in value.items()}
    if not all(found.values()):
        return "a text is empty"
    if len(found["answer"]) > MAX_ANSWER_CHARS:
        return f"the answer is longer than {MAX_ANSWER_CHARS} characters"
    return found


def same_answer(first: str, second: str) -> bool:
    """Equal as numbers, or as text but for case, spaces and a full stop."""
    numbers = [text.replace(",", "") if _THOUSANDS.fullmatch(text) else text for text in (first, second)]
    try:
        return float(numbers[0]) == float(numbers[1])
    except ValueError:
        return _plain(first) == _plain(second)


def _plain(text: str) -> str:
    return "".join(text.casefold().split()).rstrip(".").strip("$")


def endpoint_synthesiser(spec: Mapping[str, Any], folder: str | None = None) -> EndpointSynthesiser:
    """From the fields in a recipe; ValueError for unknown, missing or unusable ones."""
    check_fields(EndpointSynthesiser, spec, but=("folder",))
    if missing := {"base_url", "model"} - set(spec):
        raise ValueError(f"an endpoint needs {' and '.join(sorted(missing))}")
    return EndpointSynthesiser(**spec, folder=folder)
