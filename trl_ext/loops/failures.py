"""Failure refresh between GRPO stages (EVA, arXiv 2603.22918): the prompts that a stage failed are the next one's data.

TRL's log of completions holds every rollout of the earlier stage, on all processes. A prompt failed if the mean of one
reward over its completions was below `below` the last time it was asked:

    failed(x) = mean_g r(x, y_g) < below,  y_1 ... y_G the completions of the last rollout with x

The prompts themselves are repeated. The paper also writes new ones from them, which takes a teacher; that is not done here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from trl_ext.data import Data, DataError
from trl_ext.plan import did_you_mean

DATA_KEYS = (
    *("dataset_name", "dataset_config", "dataset_streaming", "dataset_train_split", "dataset_test_split", "datasets"),
    *("dataset_options", "columns", "prompt_template", "system_prompt", "max_prompt_tokens", "max_train_rows"),
)
"""Keys of a recipe that say where its prompts come from."""
_SETTINGS = ("stage", "reward", "below")


@dataclass(frozen=True)
class Failures:
    """Whose failed prompts a stage trains on. `below`: 0.5 is fewer than half right (ours; the paper does not say)."""

    stage: str
    reward: str | None = None
    below: float = 0.5

    @classmethod
    def make(cls, spec: Any, earlier: Sequence[str], raws: Mapping[str, Mapping[str, Any]]) -> Failures | str:
        """From a stage's name or a mapping of settings; a text says what is wrong."""
        given: Any = {"stage": spec} if isinstance(spec, str) else spec
        if not isinstance(given, Mapping) or "stage" not in given or set(given) - set(_SETTINGS):
            return f"expected a stage's name, or a mapping of {', '.join(_SETTINGS)}, got {spec!r}"
        if given["stage"] not in earlier:
            return f"'{given['stage']}' is no earlier stage (earlier: {', '.join(earlier) or 'none'})"
        source = raws[given["stage"]]
        below = given.get("below", 0.5)
        rules = {
            f"stage '{given['stage']}' is a {source.get('trainer')} stage, which asks the model nothing; name a grpo one": (
                source.get("trainer", "grpo") != "grpo" or "loop" in source
            ),
            f"set logging_steps of stage '{given['stage']}' to 1, so that every rollout is in its log": (
                source.get("logging_steps") != 1
            ),
            f"below: {below!r} is no number": isinstance(below, bool) or not isinstance(below, (int, float)),
            f"stage '{given['stage']}' makes several rollouts for one step, of which TRL logs the last: set its "
            "steps_per_generation to at least its gradient_accumulation_steps": int(
                source.get("steps_per_generation") or source.get("gradient_accumulation_steps") or 1
            )
            < int(source.get("gradient_accumulation_steps") or 1),
            f"dataset_streaming: the rows of stage '{given['stage']}' must be countable; switch it off": source.get(
                "dataset_streaming"
            ),
        }
        for text, wrong in rules.items():
            if wrong:
                return text
        return cls(str(given["stage"]), given.get("reward"), float(below))

    def misfit(self, names: Sequence[str]) -> str | None:
        """What is wrong with `reward` for a stage whose rewards have these names; None if it fits."""
        if self.reward in names or (self.reward is None and len(names) == 1):
            return None
        near = did_you_mean(str(self.reward), names) if self.reward else ""
        return (
            f"say which reward decides, {{stage: {self.stage}, reward: NAME}}{near} (stage '{self.stage}' has: "
            f"{', '.join(names)})"
        )


def last_means(folder: str | Path, reward: str) -> dict[str, float]:
    """Prompt as JSON text -> mean of `reward` over its completions of the last step that asked it.

    `folder`: a run with TRL's `completions/*.parquet`. NaN (no reward) does not count; a prompt without any is left out.
    Raises DataError without such files.
    """
    files = sorted((Path(folder) / "completions").glob("completions_*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no completions; they are written while the stage trains with log_completions")
    last: dict[str, float] = {}
    for file in files:
        values: dict[str, list[float]] = defaultdict(list)
        table = pd.read_parquet(file)
        for prompt, value in zip(table["prompt"], table[reward], strict=True):
            if value == value:
                values[as_text(prompt)].append(float(value))
        last |= {prompt: sum(found) / len(found) for prompt, found in values.items()}
    return last


def as_text(prompt: Any) -> str:
    """The same text for the same prompt, as a string or as messages; keys without a value do not count."""
    if isinstance(prompt, str):
        return prompt
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in prompt]
    return json.dumps(turns, sort_keys=True, default=list)


def write_failures(failures: Failures, folder: str | Path, names: Sequence[str], data: Data, out: str | Path) -> int:
    """Writes the rows of the stage's `data` whose prompt it failed to the Parquet file `out`; returns how many.

    `names`: the stage's rewards, the only one decides unless `failures` names one. Raises DataError when none failed.
    """
    reward = failures.reward or names[0]
    means = last_means(folder, reward)
    failed = {prompt for prompt, mean in means.items() if mean < failures.below}
    rows: Any = data.train.filter(lambda row: as_text(row["prompt"]) in failed)
    if len(rows) == 0:
        raise DataError(
            f"prompts_from_failures: of {len(means)} prompts that stage '{failures.stage}' asked none has a mean "
            f"{reward} below {failures.below:g}: raise `below`, or leave the stage out"
        )
    part = Path(f"{out}.part")
    rows.to_parquet(part)
    part.replace(out)
    return len(rows)
