"""From a YAML file and overrides to checked configuration objects. TRL's own script keys work unchanged.

Every key is a field of TRL's configurations, or one of `trl_ext.recipe_parts.Extra`. All problems of a recipe are
reported at once, with the file and the key, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_ext.loops import Loop
from trl_ext.plan import Plan, did_you_mean, normalise, settings_of
from trl_ext.recipe_parts import Extra, build_parts, config_classes, named, reward_names
from trl_ext.rewards.checked import Reward
from trl_ext.settings import default_of, fields_of, put, read_overrides, read_yaml

_SECRET = re.compile(r"(^|_)(api_?key|password|secret|authorization)$|^((hf|hub|auth|access|push_to_hub)_)?token$")


class RecipeError(ValueError):
    """A recipe that cannot run. `problems` lists every reason, each with the key and what to change."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__(f"{source} cannot run:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: the objects that TRL's own scripts use, our keys, the plan and the reward functions.

    `raw`: the mapping as written, overrides applied. `values`: what was set, cast to its type, by key. `rewards`:
    checked functions, or the name of a reward model, in the order of TRL's columns. `loop`: what drives the trainer, or
    None. `not_here`: why it can be planned
    but not trained on this machine, or None.
    """

    path: Path
    raw: Mapping[str, Any]
    values: Mapping[str, Any]
    training_args: Any
    model_args: Any
    script_args: Any
    dataset_args: Any
    extra: Extra
    plan: Plan
    rewards: tuple[Reward | str, ...]
    tools: tuple[Any, ...]
    loop: Loop | None
    not_here: str | None

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def trainer(self) -> str:
        """ "grpo", "dpo", "kto" or "sft"."""
        return self.extra.trainer

    @property
    def reward_names(self) -> list[str]:
        """The names under which TRL logs the rewards, and by which a method names its verifier."""
        return reward_names(self.rewards)

    def resolved(self) -> dict[str, Any]:
        """Every key with the value that was set or the default: a recipe in itself, without tokens and `env`."""
        fields = {key: f for cls in config_classes(self.trainer) for key, f in fields_of(cls).items() if key != "env"}
        full = {key: _plain(self.values.get(key, default_of(f))) for key, f in fields.items()}
        full["output_dir"] = str(self.training_args.output_dir)
        full["methods"] = {
            m.name: {key: _plain(getattr(m, key)) for key in settings_of(type(m))} for m in self.plan.methods
        }
        if self.loop is not None:
            settings = {key: _plain(getattr(self.loop, key)) for key in fields_of(type(self.loop))}
            full["loop"] = {self.loop.name: settings}
        return without_secrets(full)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or path with `--key value` overrides. Raises RecipeError with every problem found."""
    path = find_recipe(name_or_path)
    raw, problems = _read(path, overrides)
    if "stages" in raw:
        raise RecipeError(str(path), ["stages: this is a pipeline; trl_ext.loops.stages.load_pipeline reads it"])
    if isinstance(env := raw.get("env"), Mapping):
        os.environ.update({str(key): str(value) for key, value in env.items()})  # as TRL's own parser does
    parts = build_parts({"report_to": "none", "output_dir": f"runs/{path.stem}"} | raw, problems)
    if problems or parts is None:
        raise RecipeError(str(path), problems)
    return Recipe(path, raw, **parts)


def find_recipe(name_or_path: str) -> Path:
    """`recipes/NAME.yaml` in the current folder or beside the package, or the file itself."""
    if name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path:
        if Path(name_or_path).is_file():
            return Path(name_or_path)
        raise RecipeError(f"recipe {name_or_path}", ["there is no such file"])
    folders = [Path("recipes"), Path(__file__).resolve().parents[1] / "recipes"]
    for folder in folders:
        if (path := folder / f"{name_or_path}.yaml").is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = did_you_mean(name_or_path, known)
    raise RecipeError(
        f"recipe '{name_or_path}'", [f"unknown recipe{near} (known: {', '.join(known) or 'none'}; or give a file)"]
    )


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The mapping in the file with the overrides put in, and the problems of the overrides."""
    try:
        raw = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise RecipeError(str(path), ["a recipe is a mapping of keys to values"])
    problems: list[str] = []
    try:
        for place, value in read_overrides(overrides):
            override(raw, place, value)
    except ValueError as error:
        problems += [f"command line: {problem}" for problem in getattr(error, "problems", [str(error)])]
    return {str(key): value for key, value in raw.items()}, problems


def override(raw: dict[str, Any], place: list[str], value: Any) -> None:
    """Sets the key at `place` as the command line means it: --no_FLAG, and names without settings under `methods`."""
    if place[0].startswith("no_") and value is True:
        place, value = [place[0].removeprefix("no_")], False  # TRL's way to switch a flag off
    if place[0] == "methods" and len(place) > 1:
        raw["methods"] = normalise(raw.get("methods"))
        value = {} if len(place) == 2 and value is True else value
    if place[0] == "loop" and len(place) > 1:
        raw["loop"] = normalise(raw.get("loop"))
    if place[0] == "rewards" and len(place) > 1:
        raw["rewards"] = named(raw.get("rewards"))
        value = {} if len(place) == 2 and value is True else value
    put(raw, place, value)


def _plain(value: Any) -> Any:
    """A value as YAML can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    return (
        value if value is None or isinstance(value, (bool, int, float, str)) else str(getattr(value, "value", value))
    )


def without_secrets(value: Any) -> Any:
    """The same without entries whose key says that they are a secret."""
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items() if not _SECRET.search(str(k))}
    return [without_secrets(v) for v in value] if isinstance(value, list) else value
