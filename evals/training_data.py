"""The texts that an adapter was trained on, read again from its run's recipe: only a training package has them at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.contamination import contamination
from evals.task import Item

COLUMNS = ("prompt", "completion", "chosen", "rejected", "problem", "question", "solution", "answer")
"""Columns whose text a model may have learned from."""


def overlaps(runs: Sequence[Path], tasks: Mapping[str, Sequence[Item]]) -> dict[str, list[str]]:
    """Task -> what its prompts share with each run's training data, in words. A run whose data cannot be read any more
    is named instead, for a check that did not take place must not look like one that found nothing.
    """
    found: dict[str, list[str]] = {name: [] for name in tasks}
    for run in runs:
        try:
            texts = list(training_texts(run))
        except Exception as error:  # whatever a data source raises: the evaluation itself does not need it
            for name in tasks:
                found[name].append(f"Not checked against {run.name}'s training data, which cannot be read: {error}")
            continue
        for name, items in tasks.items():
            prompts = {item.id: "\n".join(m["content"] for m in item.messages) for item in items}
            questions = {item.id: item.messages[-1]["content"] for item in items}
            found[name].append(f"{run.name}: {contamination(prompts, questions, texts).words}")
    return found


def training_texts(run: Path) -> Iterator[str]:
    """One text for each row of the training data that the run's recipe names."""
    from trl_ext.data import load_data
    from trl_ext.recipe import load_recipe

    data = load_data(load_recipe(str(run / "recipe.yaml")))
    for row in data.train:
        yield "\n".join(_text(row[name]) for name in COLUMNS if row.get(name))


def _text(value: Any) -> str:
    """A string as it is; of a conversation the contents of its turns."""
    if isinstance(value, list):
        return "\n".join(str(turn.get("content") or "") if isinstance(turn, dict) else str(turn) for turn in value)
    return str(value)
