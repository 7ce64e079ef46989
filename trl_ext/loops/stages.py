"""Staged pipelines: several trainings in one recipe, each from the model of the one before (EVA, arXiv 2603.22918).

    stages:                                     # in order; the keys beside `stages` are defaults of all of them
      sft: {trainer: sft, ...}                  # the keys of a normal recipe
      dpo: {recipe: sandbox_dpo, max_steps: 20} # or those of another recipe, with changes
      grpo: {trainer: grpo, rewards: [...], prompts_from_failures: {stage: ..., reward: ..., below: 0.5}}
    eval: {rows: 200}                           # or {tasks: [...], limit: ...}, as `trl-ext eval` takes them

What wins: the stage's own keys, then the shared ones, then those of `recipe`. A shared key goes to the stages whose
trainer knows it. The first stage starts from `model_name_or_path`; stage k from the model of stage k - 1, an adapter
merged into it, and that model is its reference. All stages are checked and planned before anything runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_ext.loops.failures import DATA_KEYS, Failures
from trl_ext.loops.stage_evals import StageEvals, default_evals, make_evals
from trl_ext.loops.stage_keys import blocks_of, read, stage_raws
from trl_ext.recipe import Recipe, RecipeError, find_recipe
from trl_ext.recipe_parts import build_parts
from trl_ext.settings import read_yaml

_KEY = re.compile(r"[A-Za-z_]\w*(\[\d+\])?:")


@dataclass(frozen=True)
class StageRecipe(Recipe):
    """The recipe of one stage, named PIPELINE.STAGE."""

    stage: str = ""

    @property
    def name(self) -> str:
        """The pipeline's name and the stage's."""
        return f"{self.path.stem}.{self.stage}"


@dataclass(frozen=True)
class Stage:
    """One stage. `raw`: its keys, shared ones included; `recipe`: checked as if it started from the first model.

    `failures`: which earlier stage's failed prompts it trains on, or None.
    """

    number: int
    name: str
    raw: Mapping[str, Any]
    recipe: StageRecipe
    failures: Failures | None

    @property
    def label(self) -> str:
        """Name of its folder."""
        return f"{self.number}_{self.name}"

    def starts_from(self, pipeline: Pipeline) -> str:
        """Its model, reference and prompts in words, for the plan."""
        if self.number == 1:
            model = f"starts from {self.recipe.model_args.model_name_or_path}"
        else:
            before = pipeline.stages[self.number - 2]
            merged = ", its adapter merged into the base" if before.recipe.model_args.use_peft else ""
            if before.recipe.model_args.load_in_4bit or before.recipe.model_args.load_in_8bit:
                merged += " before it was quantized"
            model = f"starts from the model of stage '{before.name}'{merged}; that is also its reference"
        if self.failures is None:
            return model
        return (
            f"{model}; trains on the prompts that stage '{self.failures.stage}' failed (below {self.failures.below:g}), "
            "of which there are at most as many as counted here"
        )


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline. `raw`: the file with overrides applied; `evals`: what is asked between stages, or None."""

    path: Path
    raw: Mapping[str, Any]
    stages: tuple[Stage, ...]
    evals: StageEvals | None
    output_dir: str

    def recipe_of(self, stage: Stage, **changes: Any) -> StageRecipe:
        """The stage's recipe with other keys, None for none: where it starts from, its folder. Raises RecipeError."""
        problems: list[str] = []
        kept = {key: value for key, value in stage.raw.items() if key not in changes}
        kept |= {key: value for key, value in changes.items() if value is not None}
        found = _recipe(self.path, stage.name, kept, problems)
        if found is None:
            raise RecipeError(str(self.path), problems)
        return found


def is_pipeline(name_or_path: str) -> bool:
    """Whether the recipe of that name or path holds `stages`. Raises RecipeError when there is none."""
    try:
        raw = read_yaml(find_recipe(name_or_path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # the reader of recipes says what is wrong with it
    return isinstance(raw, Mapping) and "stages" in raw


def load_pipeline(name_or_path: str, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of that name or path with `--key value` and `--stages.NAME.key value` overrides.

    Raises RecipeError with every problem of every stage, each with its place.
    """
    path = find_recipe(name_or_path)
    raw, problems = read(path, overrides)
    blocks = blocks_of(raw.get("stages"), problems)
    if isinstance(env := raw.get("env"), Mapping):
        os.environ.update({str(key): str(value) for key, value in env.items()})  # as TRL's own parser does
    raws = stage_raws(raw, blocks, problems)
    failures = _failures(raws, problems)
    evals = _evals(raw, raws, problems)
    stages = tuple(_stages(path, raws, failures, evals, problems))
    if problems:
        raise RecipeError(str(path), problems)
    return Pipeline(path, raw, stages, evals, str(raw.get("output_dir") or f"runs/{path.stem}"))


def _failures(raws: dict[str, dict[str, Any]], problems: list[str]) -> dict[str, Failures]:
    """Stage -> whose failures it trains on. Both stages' keys are changed so that they can."""
    found: dict[str, Failures] = {}
    for place, (name, keys) in enumerate(list(raws.items())):
        spec = keys.pop("prompts_from_failures", None)
        if spec is None:
            continue
        source = Failures.make(spec, list(raws)[:place], raws)
        if isinstance(source, str):
            problems.append(f"stages.{name}.prompts_from_failures: {source}")
            continue
        problems += [
            f"stages.{name}.{key}: the prompts come from stage '{source.stage}'; remove it"
            for key in DATA_KEYS
            if keys.get(key) is not None and keys[key] != raws[source.stage].get(key)
        ]
        keys.update({key: raws[source.stage][key] for key in DATA_KEYS if key in raws[source.stage]})
        raws[source.stage].update(log_completions=True, num_completions_to_print=0)
        found[name] = source
    return found


def _evals(raw: Mapping[str, Any], raws: Mapping[str, Mapping[str, Any]], problems: list[str]) -> StageEvals | None:
    """What is asked between the stages: as `eval` says, else held-out problems if a stage trains on the sandbox."""
    sandbox = any(str(keys.get("dataset_name") or "").startswith("sandbox/") for keys in raws.values())
    if "eval" not in raw:
        return default_evals(sandbox)
    try:
        return make_evals(raw["eval"], sandbox)
    except ValueError as error:
        problems += [f"eval: {problem}" for problem in getattr(error, "problems", [str(error)])]
        return None


def _stages(
    path: Path,
    raws: Mapping[str, dict[str, Any]],
    failures: Mapping[str, Failures],
    evals: StageEvals | None,
    problems: list[str],
) -> Iterator[Stage]:
    recipes: dict[str, StageRecipe] = {}
    for number, (name, keys) in enumerate(raws.items(), 1):
        if evals is not None and evals.rows and "eval_rows" not in keys and not keys.get("eval_strategy"):
            keys["eval_rows"] = 0  # every model is evaluated once, between the stages
        recipe = _recipe(path, name, keys, problems)
        source = failures.get(name)
        if source is not None and (asked := recipes.get(source.stage)) is not None:
            why = source.misfits(asked.training_args, asked.reward_names)
            problems += [f"stages.{name}.prompts_from_failures: {text}" for text in why]
        if recipe is not None:
            recipes[name] = recipe
            yield Stage(number, name, keys, recipe, source)


def _recipe(path: Path, name: str, keys: Mapping[str, Any], problems: list[str]) -> StageRecipe | None:
    own: list[str] = []
    parts = build_parts({"report_to": "none", "output_dir": f"runs/{path.stem}/{name}", **keys}, own)
    problems += [f"stages.{name}{'.' if _KEY.match(problem) else ': '}{problem}" for problem in own]
    return None if own or parts is None else StageRecipe(path, keys, **parts, stage=name)
