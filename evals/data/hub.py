"""Rows of a public data set, from the Hub or from a local folder that holds its files; no code of a data set is run."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.task import DataError, Item, Source

Load = Callable[[Source], list[Item]]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub. `columns`: for each name that we use, the column names that are accepted, best first."""

    path: str
    split: str
    config: str | None
    columns: Mapping[str, Sequence[str]]
    gated: bool = False

    @property
    def page(self) -> str:
        """Where a person reads about it and asks for access."""
        return f"https://huggingface.co/datasets/{self.path}"


def rows(task: str, data: HubData, source: Source, config: str | None = None) -> list[dict[str, str]]:
    """All rows of `data` (of another `config` if given), our column names, every value as text.

    Raises DataError if the data cannot be had, or a column or a value is missing.
    """
    config = config or data.config
    raw = from_folder(task, data, source.folder, config) if source.folder else from_hub(task, data, config)
    if not raw:
        raise DataError(f"{task}: {source.folder or data.path} has no rows")
    names = {ours: _column(task, data, ours, raw[0]) for ours in data.columns}
    return [_row(task, names, raw_row, i) for i, raw_row in enumerate(raw)]


def _column(task: str, data: HubData, ours: str, row: Mapping[str, Any]) -> str:
    for name in data.columns[ours]:
        if name in row:
            return name
    wanted = " or ".join(repr(name) for name in data.columns[ours])
    raise DataError(f"{task}: no column {wanted}; the data has {', '.join(map(repr, row))}. Expected: {data.page}")


def _row(task: str, names: Mapping[str, str], row: Mapping[str, Any], i: int) -> dict[str, str]:
    empty = [name for name in names.values() if row.get(name) is None or not str(row[name]).strip()]
    if empty:
        raise DataError(f"{task}: row {i} has nothing in column {', '.join(map(repr, empty))}")
    return {ours: str(row[name]) for ours, name in names.items()}


def from_hub(task: str, data: HubData, config: str | None) -> list[dict[str, Any]]:
    """Rows by `datasets.load_dataset`; needs the network or the Hub cache."""
    from datasets import load_dataset

    try:
        return list(load_dataset(data.path, config, split=data.split))
    # Offline, unknown, not cached, refused: `datasets` and the Hub client raise subclasses of these two.
    except (OSError, ValueError) as error:
        gated = refused(error)
        raise DataError(_help(task, data, gated, error), gated=gated) from error


def refused(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says 401, 403 or gated."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or re.search(r"\bgated\b|\b40[13]\b", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _help(task: str, data: HubData, gated: bool, error: BaseException) -> str:
    download = f"hf download --repo-type dataset {data.path} --local-dir DIR"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if data.gated or gated:
        access = f"ask for access at {data.page}, then `hf auth login` (older: `huggingface-cli login`); or "
    else:
        access = "connect to the network; or "
    return (
        f"{task}: the data set {data.path} cannot be had ({reason}). What to do: {access}"
        f"`{download}` on a machine that may, and pass the folder with --data DIR."
    )


def from_folder(task: str, data: HubData, folder: str, config: str | None) -> list[dict[str, Any]]:
    """Rows of the folder's files, read as they stand: no guess at types, no copy in a cache.

    Of all parquet, jsonl, json and csv files, those whose path names the config are taken, if any does, and of these
    those whose name holds the split as a word, if any does. `test-00000-of-00001.parquet` is split `test`.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{task}: --data {folder} is not a folder; get one with {_help_folder(data)}")
    files = data_files(Path(folder), data.split, config)
    if not files:
        raise DataError(f"{task}: {folder} holds no {', '.join(SUFFIXES)} file; get them with {_help_folder(data)}")
    return [row for file in files for row in read(file)]


def _help_folder(data: HubData) -> str:
    return f"`hf download --repo-type dataset {data.path} --local-dir DIR`"


SPLITS = re.compile(r"(^|[-_.])(train|test|val|validation|dev)([-_.]|$)")


def data_files(folder: Path, split: str, config: str | None) -> list[Path]:
    """The files that hold a split, in the order of their names; hidden files and folders are passed over."""
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix in SUFFIXES)
    files = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    if config:
        files = [f for f in files if config in f.as_posix()] or files
    word = re.compile(rf"(^|[-_.]){re.escape(split)}([-_.]|$)")
    named = [f for f in files if word.search(f.name)]
    other = [f for f in files if SPLITS.search(f.name)]
    if not named and other:
        raise DataError(f"{folder} holds {other[0]} and more, but no file of the split {split}")
    return [folder / f for f in named or files]


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of one file; DataError if it is not what its suffix says."""
    try:
        yield from _read(file)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{file} is not a readable {file.suffix[1:]} file: {error}") from error


def _read(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(file).to_pylist()
    elif file.suffix == ".jsonl":
        yield from (json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip())
    elif file.suffix == ".json":
        yield from json.loads(file.read_text("utf-8"))
    else:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            yield from csv.DictReader(handle)


def or_stand_in(load: Load, stand_in: str) -> Load:
    """`load`, whose DataError also names the generated task that needs no data."""

    def loaded(source: Source) -> list[Item]:
        try:
            return load(source)
        except DataError as error:
            message = f"{error} Without the data, the generated task {stand_in} can be asked instead."
            raise DataError(message, gated=error.gated) from error

    return loaded
