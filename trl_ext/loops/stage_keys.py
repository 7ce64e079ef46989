"""The keys of a pipeline's stages: the file with overrides, then for each stage its recipe's, the shared and its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_ext.plan import did_you_mean
from trl_ext.recipe import RecipeError, find_recipe, override
from trl_ext.recipe_parts import TRAINERS, config_classes
from trl_ext.settings import fields_of, put, read_overrides, read_yaml

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PIPELINE_KEYS = ("stages", "eval", "output_dir", "env")
_NOT_IN_A_STAGE = {
    "output_dir": "set it beside `stages`; each stage gets a folder in it",
    "env": "set it beside `stages`; it is for the whole process",
    "resume_from_checkpoint": "use --resume, which continues the stage that was interrupted",
    "push_to_hub": "publish the finished pipeline instead; the adapter of a stage belongs to the model before it",
    "stages": "a stage cannot hold stages",
    "eval": "set it beside `stages`; all models answer the same questions",
}
_ABOUT_THE_FIRST_MODEL = ("model_name_or_path", "model_revision")


def read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The mapping in the file with the overrides put in, and the problems of the overrides."""
    raw = _yaml(path)
    problems: list[str] = []
    try:
        for place, value in read_overrides(overrides):
            _override(raw, place, value)
    except ValueError as error:
        problems += [f"command line: {problem}" for problem in getattr(error, "problems", [str(error)])]
    return raw, problems


def _yaml(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise RecipeError(str(path), ["a recipe is a mapping of keys to values"])
    return {str(key): value for key, value in raw.items()}


def _override(raw: dict[str, Any], place: list[str], value: Any) -> None:
    if place[0] != "stages":
        put(raw, place, value) if place[0] == "eval" else override(raw, place, value)
        return
    spec = raw.get("stages")
    known: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {}
    if len(place) < 3 or place[1] not in known:
        near = did_you_mean(place[1], known) if len(place) > 1 else ""
        raise ValueError(f"--{'.'.join(place)}: expected --stages.NAME.key{near} (stages: {', '.join(known)})")
    block = dict(known[place[1]] or {})
    override(block, place[2:], value)
    raw["stages"] = {**known, place[1]: block}


def blocks_of(spec: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Stage name -> its own keys."""
    if not isinstance(spec, Mapping) or not spec:
        problems.append("stages: expected a mapping of names to recipes, at least one")
        return {}
    blocks: dict[str, dict[str, Any]] = {}
    for name, block in spec.items():
        if not _NAME.fullmatch(str(name)):
            problems.append(f"stages: {name!r} is no name of letters, digits and _; it becomes a folder's name")
        elif not isinstance(block, Mapping):
            problems.append(f"stages.{name}: expected a mapping of keys to values, got {block!r}")
        else:
            blocks[str(name)] = {str(key): value for key, value in block.items()}
    return blocks


def stage_raws(
    raw: Mapping[str, Any], blocks: Mapping[str, dict[str, Any]], problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Stage name -> the keys of its recipe: those of `recipe`, the shared ones, its own. All start from one model."""
    refused = [key for key in _NOT_IN_A_STAGE if key in raw and key not in _PIPELINE_KEYS]
    problems += [f"{key}: {_NOT_IN_A_STAGE[key]}" for key in refused]
    shared = {key: value for key, value in raw.items() if key not in (*_PIPELINE_KEYS, *refused)}
    used: set[str] = set()
    raws: dict[str, dict[str, Any]] = {}
    for place, (name, block) in enumerate(blocks.items()):
        problems += [f"stages.{name}.{key}: {why}" for key, why in _NOT_IN_A_STAGE.items() if key in block]
        if place:
            taken = [key for key in _ABOUT_THE_FIRST_MODEL if key in block]
            problems += [
                f"stages.{name}.{key}: this stage starts from the model before it; remove it" for key in taken
            ]
        base = _named_recipe(name, block, problems)
        if base is None:
            continue
        own = {key: value for key, value in block.items() if key not in ("recipe", *_NOT_IN_A_STAGE)}
        trainer = own.get("trainer", shared.get("trainer", base.get("trainer", "grpo")))
        given = {key: value for key, value in shared.items() if key == "trainer" or key in _known_keys(trainer)}
        used |= {key for key in given if key not in own}
        raws[name] = {**base, **given, **own}
    problems += _unused(shared, used, list(raws.values())) if len(raws) == len(blocks) > 0 else []
    first = next(iter(raws.values()), {})
    start = {key: first[key] for key in _ABOUT_THE_FIRST_MODEL if key in first}
    return {
        name: {k: v for k, v in keys.items() if k not in _ABOUT_THE_FIRST_MODEL} | start for name, keys in raws.items()
    }


def _named_recipe(name: str, block: Mapping[str, Any], problems: list[str]) -> dict[str, Any] | None:
    """The keys of the recipe that a stage names; None, with its problem noted, if there is none."""
    if "recipe" not in block:
        return {}
    try:
        base = _yaml(find_recipe(str(block["recipe"])))
    except RecipeError as error:
        problems += [f"stages.{name}.recipe: {problem}" for problem in error.problems]
        return None
    if "stages" in base or "env" in base:
        problems.append(f"stages.{name}.recipe: {block['recipe']} holds `stages` or `env`, which a stage cannot have")
        return None
    return {key: value for key, value in base.items() if key not in _NOT_IN_A_STAGE}


def _known_keys(trainer: Any) -> set[str]:
    if trainer not in TRAINERS:
        return set()  # reported with the stage
    return {key for cls in config_classes(trainer) for key in fields_of(cls)}


def _unused(shared: Mapping[str, Any], used: set[str], raws: Sequence[Mapping[str, Any]]) -> list[str]:
    """Shared keys that reach no stage: unknown to every trainer, or set by each stage itself."""
    found = []
    known = {key for keys in raws for key in _known_keys(keys.get("trainer", "grpo"))}
    for key in shared:
        if key not in known:
            found.append(f"unknown key '{key}'{did_you_mean(key, [*known, *_PIPELINE_KEYS])}")
        elif key not in used:
            found.append(
                f"{key}: every stage that knows it sets its own, so this one has no effect; remove it here or there"
            )
    return found
