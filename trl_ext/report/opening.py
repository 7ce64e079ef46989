"""What is known before the first step: recipe, plan and versions, in files and on the screen."""

from __future__ import annotations

import io
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from evals.environment import cpu_name, git_state, version_of
from trl_ext.method import Method
from trl_ext.plan import Plan, settings_of
from trl_ext.report import files
from trl_ext.settings import default_of

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "trl_ext")
WIDTH = 110


def start(output_dir: str, recipe: Any, plan: Plan, schedule: str) -> None:
    """Writes `recipe.yaml` (every key resolved), `plan.txt` and `versions.json`; prints the plan and the schedule."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)
    files.write_text(folder / "recipe.yaml", resolved)
    files.write_text(folder / "plan.txt", plan_text(recipe, plan, schedule))
    files.write_json(folder / "versions.json", versions(recipe))
    Console().print(plan_table(recipe, plan, schedule))


def plan_text(recipe: Any, plan: Plan, schedule: str) -> str:
    """The printed plan without colour, `WIDTH` characters wide."""
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(plan_table(recipe, plan, schedule))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def plan_table(recipe: Any, plan: Plan, schedule: str) -> RenderableType:
    """Stage -> methods, then a line for each method with its cost and changed settings, then the schedule."""
    heading = Text(f"{recipe.name}: {recipe.trainer} on {recipe.model_args.model_name_or_path}", "bold")
    words = Text(f"Schedule: {schedule}")
    if recipe.loop is not None:
        heading.append(f"\nLoop: {recipe.loop.describe(recipe.training_args)}", "not bold")
    if not plan.methods:
        plain = (
            "No method is named: updates are plain TRL's." if recipe.loop else "No method is named: this is plain TRL."
        )
        return Group(heading, Text(plain), words)
    table = Table("stage", "methods, in order of application")
    for stage, names in plan.describe():
        table.add_row(stage, Text(names))
    return Group(heading, table, *(Text(f"{m.name}: {m.cost()}; {changed(m)}") for m in plan.methods), words)


def changed(method: Method) -> str:
    """The settings of a method that differ from its defaults, as "key=value"."""
    values = {name: (getattr(method, name), default_of(f)) for name, f in settings_of(type(method)).items()}
    other = [f"{name}={value}" for name, (value, default) in values.items() if value != default]
    return ", ".join(other) or "default settings"


def versions(recipe: Any) -> dict[str, Any]:
    """Python, packages, git commit of the code, machine and seeds: what a second run needs to be the same one."""
    options = recipe.extra.dataset_options or {}
    return {
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "git": git_state(Path(__file__).resolve().parents[2]),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "seeds": {
            "training": recipe.training_args.seed,
            "data": recipe.training_args.data_seed,
            "dataset": options.get("seed"),
        },
    }
