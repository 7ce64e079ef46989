"""Failure refresh between GRPO stages (EVA, arXiv 2603.22918): the prompts that a stage failed are the next one's data.

TRL's log of completions holds every rollout of the earlier stage, on all processes, if it is written at each step and no
evaluation writes over it. A prompt failed if the mean of one
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

from trl_ext.checkpoints import CheckpointError
from trl_ext.data import Data, DataError
from trl_ext.plan import did_you_mean
from trl_ext.report import files

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
            f"below: {below!r} is no number": isinstance(below, bool) or not isinstance(below, (int, float)),
            f"dataset_streaming: the rows of stage '{given['stage']}' must be countable; switch it off": source.get(
                "dataset_streaming"
            ),
        }
        for text, wrong in rules.items():
            if wrong:
                return text
        return cls(str(given["stage"]), given.get("reward"), float(below))

    def misfits(self, args: Any, names: Sequence[str]) -> list[str]:
        """Why the log of the stage would not tell what it failed; `args`: its GRPOConfig, `names`: of its rewards."""
        rules = {
            f"set logging_steps of stage '{self.stage}' to 1 (and leave logging_strategy: steps), so that every rollout is "
            "in its log": args.logging_strategy != "steps" or args.logging_steps != 1,
            f"stage '{self.stage}' makes several rollouts for one step, of which TRL logs the last: set its "
            "steps_per_generation to at least its gradient_accumulation_steps, or its generation_batch_size to as much": (
                args.steps_per_generation < args.gradient_accumulation_steps
            ),
            f"stage '{self.stage}' evaluates, and TRL then writes over the completions of that step: set its "
            "eval_strategy to no": args.eval_strategy != "no" or args.eval_on_start,
        }
        return [text for text, wrong in rules.items() if wrong] + self._reward_misfit(names)

    def _reward_misfit(self, names: Sequence[str]) -> list[str]:
        if self.reward in names or (self.reward is None and len(names) == 1):
            return []
        near = did_you_mean(str(self.reward), names) if self.reward else ""
        return [
            f"say which reward decides, {{stage: {self.stage}, reward: NAME}}{near} (stage '{self.stage}' has: "
            f"{', '.join(names)})"
        ]

    def decided_by(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides which prompts failed: the stage, the reward (of the stage's `names`, the only one) and the bound."""
        return {"stage": self.stage, "reward": self.reward or names[0], "below": self.below}


def last_means(folder: str | Path, reward: str) -> dict[str, float]:
    """Prompt as JSON text -> mean of `reward` over its completions of the last step that asked it.

    `folder`: a run with TRL's `completions/*.parquet`. NaN (no reward) does not count; a prompt without any is left out.
    Raises DataError without such files.
    """
    logs = sorted((Path(folder) / "completions").glob("completions_*.parquet"))
    if not logs:
        raise DataError(f"{folder} holds no completions; they are written while the stage trains with log_completions")
    last: dict[str, float] = {}
    for file in logs:
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

    `names`: the stage's rewards, the only one decides unless `failures` names one. What decided is beside it, as JSON.
    Raises DataError when none failed.
    """
    decided = failures.decided_by(names)
    reward = decided["reward"]
    means = last_means(folder, reward)
    failed = {prompt for prompt, mean in means.items() if mean < failures.below}
    rows: Any = data.train.filter(lambda row: as_text(row["prompt"]) in failed)
    if len(rows) == 0:
        raise DataError(
            f"prompts_from_failures: of {len(means)} prompts that stage '{failures.stage}' asked none has a mean "
            f"{reward} below {failures.below:g}: raise `below`, or leave the stage out"
        )
    files.write_json(decided_file(out), decided)  # first: where the rows are, this is
    part = Path(f"{out}.part")
    rows.to_parquet(part)
    part.replace(out)
    return len(rows)


def decided_file(out: str | Path) -> Path:
    """Beside the rows in `out`: what decided that they failed."""
    return Path(out).with_suffix(".json")


def check_failures(failures: Failures, names: Sequence[str], out: Path) -> None:
    """Raises CheckpointError when the rows in `out` were chosen by something else than would choose them now."""
    if not out.exists():
        return
    then, now = json.loads(decided_file(out).read_text()), failures.decided_by(names)
    if then != now:
        raise CheckpointError(
            f"prompts_from_failures: {out} was written for {then}, and this is {now}. Resume with the same settings, or "
            "start without --resume."
        )
