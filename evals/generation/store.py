"""Replies on disk, one JSON line each, written as they come: a killed evaluation goes on where it stopped, samples can be
added later, and grading can be redone without a model.

One file for each model and task; its name carries a key over everything that decides a reply, and `<file>.json` beside
it says in words what that was. How many questions and samples are asked for is not part of the key (but the token limit is, and a longer prompt may lower
it where the model's context is short).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

ABOUT = (
    "task",
    "task_version",
    "model",
    "adapter",
    "quantization",
    "dtype",
    "template_hash",
    "tokenizer",
    "ends",
    "sampling",
    "seed_scheme",
    "control",
)
"""What a key is made of; `sampling` without the number of samples. The data is not: each reply names its prompt."""


Wanted = tuple[str, int, str]
"""Item, sample and prompt hash."""


class StoreError(RuntimeError):
    """A file of replies cannot be trusted; the message names file and line."""


@dataclass(frozen=True)
class Reply:
    """One reply: `sample` counts from 0 within an item; `tokens` includes the end token; `prompt_hash` is SHA-256 of the
    text that the model was given.
    """

    item: str
    sample: int
    prompt_hash: str
    text: str
    tokens: int
    finish: Literal["stop", "length"]


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of a text; lone surrogates count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Store:
    """The replies of one model to one task. `rank` names this process among those that write."""

    def __init__(self, folder: str | Path, about: Mapping[str, Any], rank: int = 0) -> None:
        missing = [name for name in ABOUT if name not in about]
        if missing:
            raise ValueError(f"a store needs {', '.join(missing)}")
        self.about = dict(about)
        self.key = digest({name: about[name] for name in ABOUT})
        self._folder = Path(folder)
        self._stem = f"{about['task']}-{self.key[:16]}"
        self._path = self._folder / (f"{self._stem}.jsonl" if rank == 0 else f"{self._stem}.{rank}.jsonl")
        self._rank = rank

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Opens the store for `append`. Raises StoreError while another evaluation writes here."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{self._path}.lock", timeout=0):
                self._whole_lines()
                if self._rank == 0:
                    self._describe()
                yield
        except Timeout:
            raise StoreError(
                f"{self._path}: another evaluation is writing these replies; wait for it, or use another --store"
            ) from None

    def _describe(self) -> None:
        path = self._folder / f"{self._stem}.json"
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self.about | {"key": self.key}, indent=1))
        os.replace(temporary, path)

    def _whole_lines(self) -> None:
        """Cuts off a line that a kill left half written, so that the next one starts on its own."""
        if not self._path.exists():
            return
        with self._path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)

    def read(self) -> dict[Wanted, Reply]:
        """(item, sample, prompt hash) -> reply, of all processes. Raises StoreError for a damaged or contradictory line.

        An item whose prompt was changed since is thus asked anew, and its old replies stay for the old prompt.
        """
        found: dict[Wanted, Reply] = {}
        for path in sorted(self._folder.glob(f"{self._stem}*.jsonl")):
            for number, reply in _replies(path):
                first = found.setdefault((reply.item, reply.sample, reply.prompt_hash), reply)
                if first != reply:
                    raise StoreError(
                        f"{path}, line {number}: item {reply.item}, sample {reply.sample} was answered before, in "
                        "other words. Two evaluations may have written here at once: remove the file."
                    )
        return found

    def append(self, replies: Iterable[Reply]) -> None:
        """Writes replies and hands them to the system before it returns."""
        with self._path.open("a", encoding="utf-8") as file:
            for reply in replies:
                file.write(json.dumps(asdict(reply)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _replies(path: Path) -> Iterator[tuple[int, Reply]]:
    """(line number, reply); a last line without its end is one that another process is writing."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield number, Reply(**json.loads(line))
            except (ValueError, TypeError):
                raise StoreError(
                    f"{path}, line {number} is damaged: remove the line, it will be asked again"
                ) from None
