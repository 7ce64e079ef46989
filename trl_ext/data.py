"""Training data: from the sandbox, a file, the Hub or a mixture, with columns mapped and prompts made conversational."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from trl import extract_prompt

from trl_ext.data_sources import DataError, evaluates, held_out, load_source, split_names, split_of
from trl_ext.plan import did_you_mean
from trl_ext.recipe import Recipe
from trl_ext.rewards.checked import Reward, columns_of

_REPLIES = ("chosen", "rejected", "completion")
_COLUMNS: dict[str, list[tuple[str, ...]]] = {
    "grpo": [("prompt",)],
    "dpo": [("prompt", "chosen", "rejected"), ("chosen", "rejected")],
    "kto": [("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")],
    "sft": [("prompt", "completion"), ("messages",), ("text",)],
}
"""Trainer -> the columns that it can learn from; the first set that is there is used. Pairs become two labelled rows
in the kto trainer."""


@dataclass(frozen=True)
class Data:
    """`train` and, when TRL evaluates, `eval`; `held_out`: sandbox problems for the report, empty elsewhere.

    `rows` of the training set, None when it streams; `dropped` rows whose prompt was too long, None when not counted.
    """

    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None
    held_out: Dataset | None
    rows: int | None
    dropped: int | None


def load_data(recipe: Recipe, count_tokens: Callable[[Any], int] | None = None) -> Data:
    """The recipe's data. `count_tokens(prompt)` is needed for `max_prompt_tokens`; without it no row is dropped.

    Raises DataError for a missing column, an unknown split, an empty data set or a source that cannot be read.
    """
    source = load_source(recipe)
    train_split, test_split = split_names(recipe)
    raw = split_of(source, train_split)
    asked = recipe.loop is not None and not recipe.loop.makes_data  # the loop's questions are all that rewards see
    check_rewards(recipe.rewards, ["prompt", "answer"] if asked else _columns_after(raw, recipe))
    train, dropped = _rows(raw, recipe, count_tokens, "max_train_rows")
    evaluated = None
    if evaluates(recipe):
        evaluated, _ = _rows(split_of(source, test_split), recipe, count_tokens, "eval_rows")
    return Data(train, evaluated, held_out(recipe), _length(train), dropped)


def _rows(raw: Any, recipe: Recipe, count_tokens: Callable[[Any], int] | None, limit: str) -> tuple[Any, int | None]:
    """One split as the trainer takes it, at most as many rows as the recipe's `limit` says, and how many were too long."""
    data, pairs = _prepared(raw, recipe)
    short, each = _short_prompts(data, recipe, count_tokens), 2 if pairs else 1
    before, after = _length(data), _length(short)
    if after == 0:
        raise DataError(f"all {before} prompts are longer than max_prompt_tokens {recipe.extra.max_prompt_tokens}")
    dropped = None if before is None or after is None or count_tokens is None else each * (before - after)
    most = getattr(recipe.extra, limit)
    if most and most < each:
        raise DataError(f"{limit}: {most} is less than one pair, which makes two labelled rows; set at least 2")
    short = _first(short, most and most // each)
    return (_labelled(short) if pairs else short), dropped


def _short_prompts(data: Any, recipe: Recipe, count_tokens: Callable[[Any], int] | None) -> Any:
    """The rows whose prompt has at most `max_prompt_tokens` tokens."""
    limit = recipe.extra.max_prompt_tokens
    if limit is None or count_tokens is None:
        return data
    return data.filter(lambda row: count_tokens(row["prompt"]) <= limit)


def check_rewards(rewards: Iterable[Reward | str], columns: Sequence[str] | None) -> None:
    """Raises DataError when a reward function reads a column that the (mapped) data set does not have."""
    for reward in rewards:
        for names in [] if columns is None or isinstance(reward, str) else columns_of(reward):
            if not set(names) & set(columns or ()):
                raise DataError(
                    f"reward '{reward.__name__}' reads the column {' or '.join(map(repr, names))}, "  # type: ignore[union-attr]
                    f"the data set has: {', '.join(columns or ())}. Map one in the recipe, e.g. columns: "
                    f"{{{names[0]}: {next(iter(columns or ('theirs',)))}}}"
                )


def _columns_after(data: Any, recipe: Recipe) -> list[str] | None:
    if data.column_names is None:
        return None
    mapping = recipe.extra.columns or {}
    return [c for c in data.column_names if c not in mapping.values()] + list(mapping)


def _prepared(data: Any, recipe: Recipe) -> tuple[Any, bool]:
    """Columns under our names, prompts as messages; and whether the kto trainer gets pairs, to be made labelled rows."""
    first = next(iter(data), None)
    if first is None:
        raise DataError("the data set is empty")
    columns = list(data.column_names or first)  # a stream may not know its columns before its first row
    mapping = dict(recipe.extra.columns or {})
    _need(columns, [str(theirs) for theirs in mapping.values()], "columns")
    fields = {**{c: c for c in columns}, **mapping}
    template = recipe.extra.prompt_template
    if template is not None:
        used = template_fields(template)
        _need(list(fields), used, "prompt_template")
    wanted = _wanted(recipe, [*fields, *(["prompt"] if template is not None else [])])
    if "prompt" not in wanted:
        return _checked(_renamed(data, mapping, columns), recipe, wanted)
    make = _Prompt(template, recipe.extra.system_prompt, fields)
    prepared = data.map(make)
    rest = {ours: theirs for ours, theirs in mapping.items() if ours not in ("prompt", *_REPLIES)}
    return _checked(_renamed(prepared, rest, list(dict.fromkeys([*columns, "prompt"]))), recipe, wanted)


def _wanted(recipe: Recipe, fields: Sequence[str]) -> tuple[str, ...]:
    """The columns, under our names, that the trainer, or the loop that makes its data, learns from."""
    if recipe.loop is not None and recipe.loop.makes_data:
        _need(list(fields), ["prompt"], "prompt")
        return ("prompt",)
    reads_prompt = any(
        getattr(recipe.extra, key) is not None for key in ("prompt_template", "system_prompt", "max_prompt_tokens")
    )
    sets = [s for s in _COLUMNS[recipe.trainer] if "prompt" in s or not reads_prompt]
    found = next((s for s in sets if set(s) <= set(fields)), None)
    if found is None:
        why = "prompt" if "prompt" not in fields and reads_prompt else f"the {recipe.trainer} trainer"
        nearest = max(sets, key=lambda s: len(set(s) & set(fields)))
        _need(fields, nearest, why)
        return nearest
    return found


def _checked(data: Any, recipe: Recipe, wanted: Sequence[str]) -> tuple[Any, bool]:
    """For the kto trainer: pairs have their prompt in a column, all labels are checked. True for such pairs."""
    if recipe.trainer != "kto" or recipe.loop is not None:
        return data, False
    if "label" not in wanted:
        return (data if "prompt" in wanted else data.map(extract_prompt)), True
    if isinstance(data, Dataset):
        for row, label in enumerate(data["label"][:]):
            _check_label({"label": label}, row)
        return data, False
    data = data.map(_check_label, with_indices=True)
    next(iter(data))  # the first row's label before the model is loaded, the others' as they come
    return data, False


def _check_label(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Raises DataError for a label that is not true or false, 1 or 0; changes nothing."""
    if row["label"] not in (0, 1):
        raise DataError(
            f"label: expected true or false (thumbs up or down), row {index} (from 0) has {row['label']!r}; mend or leave "
            "out such rows"
        )
    return {}


def _labelled(pairs: Any) -> Any:
    """Each pair as two labelled rows, so that every batch has both classes: row 2i is chosen, row 2i + 1 rejected."""
    columns = list(pairs.column_names or next(iter(pairs)))  # a stream may not know its columns
    return pairs.map(_alternating, batched=True, remove_columns=columns)


def _alternating(pairs: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Chosen reply of pair i, rejected reply of pair i - 1 (of the last one first), and so on.

    Neighbours have different prompts: TRL's KTO gives a row its neighbour's reply to measure the KL with replies that
    do not belong to their prompts.
    """
    n = len(pairs["chosen"])
    order = [place for i in range(n) for place in ((i, "chosen"), ((i - 1) % n, "rejected"))]
    rows = {
        name: [values[i] for i, _ in order] for name, values in pairs.items() if name not in ("chosen", "rejected")
    }
    return {**rows, "completion": [pairs[side][i] for i, side in order], "label": [s == "chosen" for _, s in order]}


@dataclass(frozen=True)
class _Prompt:
    """A row -> its prompt as messages; text replies become messages too, so that all columns have one form."""

    template: str | None
    system: str | None
    fields: Mapping[str, str]

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.template is None:
            prompt = row[self.fields["prompt"]]
        else:
            prompt = self.template.format_map({ours: row[theirs] for ours, theirs in self.fields.items()})
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        new: dict[str, Any] = {"prompt": messages}
        for name in _REPLIES:
            if name in self.fields:
                reply = row[self.fields[name]]
                new[name] = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
        return new


def template_fields(template: str) -> list[str]:
    """Names of the columns in a template; DataError for anything but plain {column} fields."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"prompt_template: {error}; write {{{{ and }}}} for literal braces") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise DataError(
                f"prompt_template: '{{{name}}}' is not a plain {{column}}; write {{{{ }}}} for literal braces"
            )
    return [name for _, name, _, _ in parts if name is not None]


def _need(columns: Sequence[str], wanted: Iterable[str], why: str) -> None:
    for name in wanted:
        if name not in columns:
            raise DataError(
                f"{why}: there is no column '{name}'{did_you_mean(name, columns)}; the data set has: {', '.join(columns)}. "
                "Map it in the recipe, e.g. columns: {prompt: theirs, answer: theirs}"
            )


def _renamed(data: Any, mapping: Mapping[str, str], columns: Sequence[str]) -> Any:
    """Columns under our names; a column that already has one of these names gives way."""
    for ours, theirs in mapping.items():
        if ours == theirs:
            continue
        data = data.remove_columns(ours) if ours in columns else data
        data = data.rename_column(theirs, ours)
    return data


def _length(data: Any) -> int | None:
    return len(data) if isinstance(data, Dataset) else None


def _first(data: Any, n: int | None) -> Any:
    """The first n rows; None or 0 means all."""
    if not n:
        return data
    return data.select(range(min(n, len(data)))) if isinstance(data, Dataset) else data.take(n)
