"""Folders in the column layout of the real data sets, with invented content."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from datasets import Dataset

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

INSTANCE = {"a": 1}


def parquet(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(path)


def jsonl(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def aime24(n: int = 30) -> list[dict]:
    return [{"ID": f"2024-I-{i}", "Problem": f"Find {i}+{i}.", "Solution": "Add.", "Answer": 2 * i} for i in range(n)]


def aime25(n: int = 30) -> list[dict]:
    return [{"problem": f"Find {i}+1.", "answer": str(i + 1), "id": str(i)} for i in range(n)]


def gpqa(n: int = 8) -> list[dict]:
    # "None" and "0.10" are what a reader that guesses types would change.
    return [
        {
            "Question": f"What is {i}, or\nis it another?",
            "Correct Answer": f"{i}.10" if i else "None",
            "Incorrect Answer 1": f"{i}.2 ",
            "Incorrect Answer 2": f"{i}.30",
            "Incorrect Answer 3": f"\n{i}.4",
            "Explanation": "",
            "Subdomain": "Numbers",
            "Record ID": f"rec{i:02d}",
        }
        for i in range(n)
    ]


def gsm8k(n: int = 6) -> list[dict]:
    return [
        {
            "question": f"A box holds {i} pens and 1,200 more. How many?",
            "answer": f"There are {i}+1200=<<{i}+1200={i + 1200}>>{i + 1200} pens.\nDone.\n#### 1,{i + 200}",
        }
        for i in range(n)
    ]


def schemas(n: int = 4) -> list[dict]:
    return [{"json_schema": json.dumps(OBJECT | {"title": str(i)}), "unique_id": f"s---{i}"} for i in range(n)]


def make(name: str, folder: Path) -> Path:
    """The folder of a task, laid out as its snapshot is; with neighbours that must not be read."""
    if name == "aime24":
        parquet(aime24(), folder / "aime_2024_problems.parquet")
    elif name == "aime25":
        jsonl(aime25(), folder / "test.jsonl")
    elif name == "gpqa_diamond":
        table(gpqa(), folder / "gpqa_diamond.csv")
        table(gpqa(20), folder / "gpqa_extended.csv")
        table([{"Expert": "x"}], folder / "gpqa_experts.csv")
    elif name.startswith("gsm8k"):
        parquet(gsm8k(), folder / "main" / "test-00000-of-00001.parquet")
        parquet(gsm8k(9), folder / "main" / "train-00000-of-00001.parquet")
        parquet(gsm8k(7), folder / "socratic" / "test-00000-of-00001.parquet")
    else:
        for config in ("Github_easy", "Github_medium", "Github_hard", "Github_ultra"):
            rows = [row | {"unique_id": f"{config}{row['unique_id']}"} for row in schemas()]
            parquet(rows, folder / config / "test-00000-of-00001.parquet")
            parquet(schemas(2), folder / config / "val-00000-of-00001.parquet")
            parquet(schemas(1), folder / "data" / f"{config}-00000-of-00001.parquet")
    jsonl([{"secret": 1}], folder / ".cache" / "test.jsonl")
    (folder / "README.md").write_text("---\nconfigs: []\n---\n")
    return folder
