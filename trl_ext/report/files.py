"""Files of a run: written whole or not at all, and the log read back."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
LOG_TABLE = "log.csv"
Entry = dict[str, Any]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` so that a reader, or a kill, finds the old file or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """The same for bytes."""
    temporary = Path(f"{os.fspath(path)}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Strict JSON, indented; numbers that are not finite become null."""
    write_text(path, json.dumps(strict(content), indent=2, ensure_ascii=False) + "\n")


def strict(value: Any) -> Any:
    """`value` with null in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): strict(v) for key, v in value.items()}
    return [strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def log_line(entry: Mapping[str, Any]) -> str:
    """One log entry as one line of JSON, `step` first."""
    return json.dumps(strict({"step": entry["step"], **entry}), ensure_ascii=False) + "\n"


def read_log(output_dir: str | os.PathLike[str]) -> list[Entry]:
    """The entries of `log.jsonl`; none when it is missing. A last line that a kill cut off is left out."""
    path = Path(output_dir) / LOG
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.split("\n") if line]


def series(entries: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; null becomes NaN, so that a curve shows a gap there."""
    found = [(e["step"], math.nan if e[key] is None else float(e[key])) for e in entries if key in e]
    return [step for step, _ in found], [value for _, value in found]


def log_table(entries: Iterable[Entry]) -> str:
    """The entries as CSV: the union of their columns, in the order in which they first occur; missing is empty."""
    rows = list(entries)
    columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "nan" if v is None else v for k, v in row.items()} for row in rows)
    return text.getvalue()
