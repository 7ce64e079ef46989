"""The files of a loop in rounds: what is there was written whole, so a stage whose file is there is done.

rounds/settings.json                 what decides the rounds; a resumed run must agree
rounds/answers/                      a judge's answers, one file a question, so that none is asked twice
rounds/start/held_out.jsonl          replies of the first policy to the held-out prompts
rounds/round-T/samples.jsonl         one prompt a line: replies, and who sampled them with which seed
               samples/              parts of that file while it is made
               scores.jsonl          the same prompts: scores, win probabilities, automatic negatives
               train.jsonl           one pair (or labelled reply) a line, with round, prompt and replies that it is from
               train/                the trainer's folder with its checkpoints, until the round is trained
               log.json              what the trainer logged
               merge.json            what an adapter's merge had to warn of; there before policy/ is
               policy/               the trained weights, whole and merged
               anchor.json           the momentum and how far it moves the weights; there before anchor/ is
               anchor/               the weights that the next round begins with, if they are others
               held_out.jsonl        replies of the trained policy to the held-out prompts
               report.json           the round's numbers
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trl_ext.checkpoints import CheckpointError
from trl_ext.report import files

ROUNDS = "rounds"
SETTINGS = "settings.json"


class RoundFolder:
    """One round's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.train, self.policy, self.anchor = path / "train", path / "policy", path / "anchor"

    def lines(self, name: str, make: Callable[[], Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of `name`.jsonl; made and written whole if they are not there."""
        if not (path := self.path / f"{name}.jsonl").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            files.write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in make()))
        return self.read_lines(name)  # also if just made: a resumed run must not see other numbers

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of `name`.jsonl, which is there."""
        return [json.loads(line) for line in (self.path / f"{name}.jsonl").read_text().splitlines()]

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of `name`.json, made and written if it is not there; numbers that are not finite are null."""
        if not (path := self.path / f"{name}.json").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            files.write_json(path, make())
        return self.read(name)

    def read(self, name: str) -> Any:
        """The value of `name`.json, which is there."""
        return json.loads((self.path / f"{name}.json").read_text())

    @property
    def done(self) -> bool:
        """Whether the round came to its end: the report is written last."""
        return (self.path / "report.json").exists()


def folder_of(output_dir: str, number: int) -> RoundFolder:
    """The folder of round `number` (1, 2, ...); 0 is the policy that the run starts with."""
    return RoundFolder(Path(output_dir) / ROUNDS / (f"round-{number}" if number else "start"))


def write_folder(target: Path, write: Callable[[str], None]) -> None:
    """Calls `write(path)` for a folder that takes the name `target` when it is whole."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(str(part))
    os.replace(part, target)


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of plain values (others as text) in their order: the same number of other rows is another data set."""
    whole = hashlib.sha256()
    for value in values:
        whole.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return whole.hexdigest()


def check_settings(
    output_dir: str, settings: Mapping[str, Any], until_trained: Callable[[str], bool] | None = None
) -> None:
    """Writes what decides the rounds, or raises CheckpointError as `compare_settings` does.

    A training of round 1 that was begun with other settings is removed.
    """
    changed = compare_settings(output_dir, settings, until_trained)
    path = Path(output_dir) / ROUNDS / SETTINGS
    if changed:
        shutil.rmtree(folder_of(output_dir, 1).train, ignore_errors=True)
    if changed or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, json.loads(json.dumps(settings)))


def compare_settings(
    output_dir: str, settings: Mapping[str, Any], until_trained: Callable[[str], bool] | None = None
) -> list[str]:
    """Raises CheckpointError when the folder has rounds that were made with other settings. Writes nothing.

    Keys for which `until_trained` holds may differ while round 1 is not trained; those that do are returned.
    """
    path = Path(output_dir) / ROUNDS / SETTINGS
    plain = json.loads(json.dumps(settings))
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    every = sorted(key for key in {*before, *plain} if before.get(key) != plain.get(key))
    free = None if folder_of(output_dir, 1).policy.exists() else until_trained
    if changed := [key for key in every if free is None or not free(key)]:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {plain.get(key)!r}" for key in changed)
        raise CheckpointError(
            f"the rounds in {path.parent} were made with other settings ({told}). Resume with the same ones, or start a "
            "new run."
        )
    return every
