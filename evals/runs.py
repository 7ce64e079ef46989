"""What to evaluate: a training run, adapters, or a model alone, as the base to load and the adapters to attach."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from evals.models import Adapter, BaseSpec, ModelError, adapter_folder, base_of

SANDBOX = "sandbox"
RUNS = "runs"


@dataclass(frozen=True)
class Plan:
    """The base (`named` as the user or the run did), its adapters, whole models to compare it with, the tokenizer's folder
    or name, and runs for their data.

    `tokenizer` is the base's own unless asked otherwise: base and candidates get the same prompts. `repeats`: the
    candidates are training runs of one recipe (adapters without a run are taken for that).
    """

    named: str
    base: BaseSpec
    adapters: tuple[Adapter, ...]
    others: tuple[tuple[str, BaseSpec], ...]
    tokenizer: str
    runs: tuple[Path, ...]
    template_settings: Mapping[str, Any]
    repeats: bool = True

    @property
    def sandbox(self) -> bool:
        """Whether the base is the sandbox's tiny model."""
        return self.named == SANDBOX

    @property
    def names(self) -> list[str]:
        """Of the candidates, adapters first."""
        return [*(a.name for a in self.adapters), *(name for name, _ in self.others)]


def newest_run(root: str | Path = RUNS) -> Path | None:
    """The finished run under `root` that ended last, None when there is none. A pipeline of stages is not one run."""
    found = [path for path in Path(root).glob("*/status.json") if not (path.parent / "pipeline.json").exists()]
    ended = [path for path in found if json.loads(path.read_text())["status"] == "finished"]
    newest = max(ended, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def is_run(folder: Path) -> bool:
    """Whether a folder was written by `trl-ext train`."""
    return (folder / "recipe.yaml").exists()


def plan_runs(folders: Sequence[Path], checkpoints: bool, changes: Mapping[str, Any]) -> Plan:
    """The plan for runs of one base. `checkpoints`: each run's checkpoints are candidates too. `changes`: fields of
    BaseSpec that the user sets. Raises ModelError when the runs differ in their base or hold nothing to evaluate.
    """
    recipes = [_recipe(folder) for folder in folders]
    specs = [_base(recipe) for recipe in recipes]
    for folder, spec in zip(folders, specs, strict=True):
        if spec != specs[0]:
            raise ModelError(
                f"{folder} was trained from {spec}, {folders[0]} from {specs[0]}: compare runs of one base"
            )
    base = _with(specs[0], changes)
    found = [output for folder in folders for output in _outputs(folder, checkpoints)]
    adapters: list[Adapter] = []
    others: list[tuple[str, BaseSpec]] = []
    for name, (_, path, step) in zip(distinct([name for name, _, _ in found]), found, strict=True):
        if (path / "adapter_config.json").exists():
            adapters.append(Adapter(name, path, step))
        else:
            others.append((name, _with(base, {"model": str(path), "revision": None})))
    settings = recipes[0].get("chat_template_kwargs") or {}
    return Plan(
        str(recipes[0]["model_name_or_path"]),
        base,
        tuple(adapters),
        tuple(others),
        base.model,
        tuple(folders),
        settings,
        _same(recipes),
    )


def plan_parts(
    model: str | None, adapters: Sequence[str], candidates: Sequence[str], changes: Mapping[str, Any]
) -> Plan:
    """The plan for a base (None: the one that the first adapter names), adapters and whole models. Raises ModelError.

    Adapters that are all folders of runs bring along how they were trained: precision, quantisation, template settings.
    """
    folders = [adapter_folder(name) for name in adapters]
    if model is None and not folders:
        raise ModelError("name a run, --model or --adapter")
    trained = [_recipe(folder) for folder in folders if is_run(folder)]
    as_trained = bool(trained) and len(trained) == len(folders)
    name = model if model is not None else base_of(folders[0])
    base = replace(_base(trained[0]), model=_path(name)) if as_trained else BaseSpec(_path(name))
    base = _with(base, changes)
    names = distinct([*(Path(n).name for n in adapters), *(Path(c).name for c in candidates)])
    named = tuple(Adapter(n, f) for n, f in zip(names, folders, strict=False))
    others = tuple(
        (n, _with(base, {"model": _path(c), "revision": None}))
        for n, c in zip(names[len(folders) :], candidates, strict=True)
    )
    settings = (trained[0].get("chat_template_kwargs") or {}) if as_trained else {}
    runs = tuple(folder for folder in folders if is_run(folder))
    return Plan(name, base, named, others, base.model, runs, settings, _same(trained) if as_trained else True)


def _recipe(folder: Path) -> dict[str, Any]:
    if not is_run(folder):
        raise ModelError(
            f"{folder} is no run of `trl-ext train`: it has no recipe.yaml. For an adapter: --adapter {folder}"
        )
    return dict(yaml.safe_load((folder / "recipe.yaml").read_text()))


def _base(recipe: Mapping[str, Any]) -> BaseSpec:
    """The base as the run had it: the same precision and the same quantisation."""
    from trl import get_quantization_config
    from trl.trainer.model_config import ModelConfig

    keys = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    settings = {key: recipe[key] for key in (*keys, "dtype") if recipe.get(key) is not None}
    config = get_quantization_config(ModelConfig(**settings))
    revision = recipe.get("model_revision")
    return BaseSpec(
        _path(str(recipe["model_name_or_path"])),
        None if revision == "main" else revision,
        None if config is None else config.to_diff_dict(),
        str(recipe.get("dtype") or "auto"),
    )


SEEDS = ("seed", "data_seed", "output_dir", "run_name", "logging_dir", "dataset_options")


def _same(recipes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the runs differ in nothing but their seeds and folders."""
    settled = [{key: value for key, value in recipe.items() if key not in SEEDS} for recipe in recipes]
    return all(one == settled[0] for one in settled)


def _path(name: str) -> str:
    return _sandbox() if name == SANDBOX else name


def _sandbox() -> str:
    """The folder of the sandbox's model, built on first use."""
    from trl_ext.sandbox import ensure_model

    return ensure_model()


def _with(spec: BaseSpec, changes: Mapping[str, Any]) -> BaseSpec:
    return BaseSpec(**(vars(spec) | dict(changes)))


def _outputs(folder: Path, checkpoints: bool) -> list[tuple[str, Path, int | None]]:
    """(name, folder, step) of a run's checkpoints, if wanted, and of its result."""
    steps = sorted((int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*") if path.is_dir())
    found: list[tuple[str, Path, int | None]] = []
    if checkpoints:
        found = [(f"{folder.name}-step{step}", path, step) for step, path in steps if _weights(path)]
    if _weights(folder) and not (checkpoints and found):
        found.append((folder.name, folder, None))
    if not found:
        raise ModelError(f"{folder} holds no trained weights: the run did not finish, and no checkpoint is whole")
    return found


def _weights(folder: Path) -> bool:
    return any(folder.glob("adapter_model.*")) or any(folder.glob("*.safetensors"))


def distinct(names: Sequence[str], taken: Sequence[str] = ("base",)) -> list[str]:
    """`names` with -2, -3, ... after those that are `taken` or occur again."""
    used, found = set(taken), []
    for name in names:
        number, chosen = 1, name
        while chosen in used:
            number += 1
            chosen = f"{name}-{number}"
        used.add(chosen)
        found.append(chosen)
    return found
