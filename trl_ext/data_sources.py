"""Where training data comes from: the sandbox, a file or a folder, the Hub, or TRL's mixture of several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from trl_ext.loops.topics import TOPICS, topics
from trl_ext.plan import did_you_mean
from trl_ext.recipe import Recipe
from trl_ext.sandbox.programs import PROGRAMS

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SANDBOX = "sandbox/"
SANDBOX_EVAL_ROWS = 200
"""Held-out problems for the numbers before and after; 200 give an interval of about +-7 points at 50 %."""


class DataError(ValueError):
    """The data set cannot be used as the recipe says; the message names what exists."""


def evaluates(recipe: Recipe) -> bool:
    """Whether TRL evaluates during training."""
    return recipe.training_args.eval_strategy != "no"


def load_source(recipe: Recipe) -> Mapping[str, Any]:
    """Split name -> data set."""
    script, name = recipe.script_args, recipe.script_args.dataset_name
    try:
        if recipe.dataset_args.datasets:
            from trl import get_dataset

            return get_dataset(recipe.dataset_args)
        if name.startswith(SANDBOX):
            kind, options = name.removeprefix(SANDBOX), recipe.extra.dataset_options or {}
            return {split: _sandbox(kind, options, split) for split in split_names(recipe)[: 1 + evaluates(recipe)]}
        if Path(name).exists():
            return _local(Path(name), script.dataset_streaming, script.dataset_train_split)
        found = load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
    except DataError:
        raise
    except Exception as error:  # what a source raises depends on its library; the user needs its name and the reason
        raise DataError(f"cannot load the data set '{name or 'datasets'}': {type(error).__name__}: {error}") from error
    return found if isinstance(found, Mapping) else {script.dataset_train_split: found}


def _sandbox(kind: str, options: Mapping[str, Any], split: str) -> Dataset:
    """A sandbox data set with a recipe's `dataset_options`."""
    from trl_ext.sandbox import dataset

    known: tuple[str, ...] = ("n", "difficulty", "seed")
    known += ("bad_difficulty", "bad_share") if kind == "labels" else ()
    if unknown := [str(key) for key in options if key not in known]:
        near = did_you_mean(unknown[0], known)
        raise DataError(f"dataset_options: unknown '{unknown[0]}'{near} (known: {', '.join(known)})")
    settings = {**options}
    if kind == TOPICS:
        return topics(**settings)
    if kind in PROGRAMS:
        return _programs(kind, settings)
    for key in ("difficulty", "bad_difficulty"):
        if isinstance(mix := settings.get(key), Mapping):
            settings[key] = {int(level): float(weight) for level, weight in mix.items()}
    try:
        return dataset(kind, split=split, **settings)
    except (ValueError, TypeError) as error:
        raise DataError(f"{SANDBOX}{kind}: {error}") from error


def _programs(kind: str, options: Mapping[str, Any]) -> Dataset:
    """One-line functions of the sandbox, the same for every split."""
    if "difficulty" in options:
        raise DataError("dataset_options: difficulty: the sandbox's programs have none; remove it")
    try:
        return PROGRAMS[kind](**options)
    except ValueError as error:
        raise DataError(f"{SANDBOX}{kind}: {error}") from error


def _local(path: Path, streaming: bool, split: str) -> Mapping[str, Any]:
    """A file, or a folder whose files are named after their splits (train.jsonl, test.parquet, ...)."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in FORMATS)
        kinds = {FORMATS[f.suffix] for f in files}
        if len(kinds) != 1:
            raise DataError(f"{path} holds {len(files)} data files of {len(kinds)} formats; one format is needed")
        by_split: dict[str, list[str]] = {}
        for file in files:
            by_split.setdefault(file.stem.split("-")[0] if len(files) > 1 else split, []).append(str(file))
        return load_dataset(kinds.pop(), data_files=by_split, streaming=streaming)
    if path.suffix not in FORMATS:
        raise DataError(f"{path} is not one of {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return load_dataset(FORMATS[path.suffix], data_files={split: str(path)}, streaming=streaming)


def split_names(recipe: Recipe) -> tuple[str, str]:
    """Names of the training split and of the one that TRL evaluates on."""
    if recipe.dataset_args.datasets:  # TRL names the splits of a mixture itself
        return "train", "test"
    return recipe.script_args.dataset_train_split, recipe.script_args.dataset_test_split


def split_of(source: Mapping[str, Any], name: str) -> Any:
    """One split; DataError names those that exist."""
    if name not in source:
        raise DataError(
            f"the data set has no split '{name}'{did_you_mean(name, source)} (it has: {', '.join(source)})"
        )
    return source[name]


def held_out(recipe: Recipe) -> Dataset | None:
    """Problems of the sandbox's test split, for the numbers before and after. They share no text with training."""
    name, wanted = recipe.script_args.dataset_name or "", recipe.extra.eval_rows
    kind = name.removeprefix(SANDBOX)
    if not name.startswith(SANDBOX) or kind in ("mcq", *PROGRAMS) or wanted == 0:
        return None
    own = {key: value for key, value in (recipe.extra.dataset_options or {}).items() if key == "difficulty"}
    return _sandbox("math", own | {"n": wanted or SANDBOX_EVAL_ROWS, "seed": recipe.training_args.seed}, "test")
