"""The functions that the YAML twins name; lm-eval loads this file by its path. All of them live in `evals`."""

from __future__ import annotations

from typing import Any

from evals.tasks.lm_eval import gold_text, load_named, pooled, score_named, user_text

__all__ = ["gold_text", "load", "pooled", "score_named", "user_text"]


def load(benchmark: str, data_folder: str | None = None, data_seed: int = 0, **_: Any) -> Any:
    """Rows of a task. `--metadata '{"data_folder": DIR, "data_seed": 1}'` arrives here, among the model's own."""
    return load_named(benchmark, data_folder, data_seed)
