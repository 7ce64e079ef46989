"""Every question and every verdict of a run, one JSON line each, in the order in which they were played."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trl_ext.report import files

FILE = "questions.jsonl"


class Diary:
    """Appends to `questions.jsonl` in the run's folder. `rewind` forgets the rounds that a resumed run plays again."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE

    def write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """One line for each entry, flushed to the operating system."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(entry), ensure_ascii=False) + "\n" for entry in entries)

    def rewind(self, rounds: int) -> None:
        """Keeps the entries of the first `rounds` rounds; a last line that was cut off goes too."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]  # splitlines() also splits inside a question
        kept = [line for line in lines if json.loads(line)["round"] < rounds]
        files.write_text(self.path, "".join(f"{line}\n" for line in kept))
