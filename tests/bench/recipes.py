"""recipes/README.md: a row for each recipe with what it takes, generated from the recipes and the memory model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import ROOT
from trl_ext import memory
from trl_ext.loops.stages import is_pipeline, load_pipeline
from trl_ext.recipe import Recipe, load_recipe

FOLDER = ROOT / "recipes"
ON_CPU = ("--use_cpu", "true")  # so that bf16 recipes can be planned on a machine without a GPU
HEAD = """# Recipes

Written by `make docs` from the recipes and the memory model (`trl_ext/memory.py`): change those. "Predicted" is the
peak in GiB as `trl-ext plan RECIPE` explains it, an upper bound with every prompt and completion at full length; `plan
RECIPE --gpu 24` says what to turn down for a smaller GPU. Models whose configuration the Hub did not give are counted from
a table in `trl_ext/geometry.py`. [accelerate/](accelerate) holds configurations for several GPUs, and
[ENGINES.md](../trl_ext/methods/ENGINES.md) says which methods run under which."""
COLUMNS = ("recipe", "paper", "trainer", "model", "data", "predicted, GiB", "needs")
_PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_GPU = re.compile(r"One GPU with (\d+) GB")


def stated_gpu(path: Path) -> int | None:
    """GB of the GPU that a recipe's head states, or None."""
    found = _GPU.search(path.read_text())
    return int(found.group(1)) if found else None


def recipes_of(path: Path) -> list[Recipe]:
    """The recipe in a file, or those of its stages."""
    if is_pipeline(str(path)):
        return [stage.recipe for stage in load_pipeline(str(path), ON_CPU).stages]
    return [load_recipe(str(path), ON_CPU)]


def papers(path: Path, recipes: Sequence[Recipe]) -> list[str]:
    """arXiv ids: those that the head of the file names, else those of its methods and its loop."""
    head = path.read_text().partition("\n\n")[0].partition("trainer:")[0]
    own = [part.paper for recipe in recipes for part in (*recipe.plan.methods, recipe.loop) if part is not None]
    named = _PAPER.findall(head) or own
    return list(dict.fromkeys(named))


def needs(path: Path, recipe: Recipe) -> Iterator[str]:
    """What the machine must offer beside the model and the data."""
    if recipe.model_args.model_name_or_path == "sandbox":
        yield "a CPU"
    elif (gpu := stated_gpu(path)) is not None:
        yield f"a GPU of {gpu} GB"
    if getattr(recipe.training_args, "use_vllm", False):
        yield "vLLM"
    if hasattr(memory.config_of(recipe)[0], "vision_config"):
        yield "images"
    yield from (f"the reward model `{name}`" for name in recipe.rewards if isinstance(name, str))
    if recipe.tools:
        yield "tools: " + ", ".join(tool.__name__ for tool in recipe.tools)
    if _holds(recipe.raw, "base_url"):
        judges = any("judge" in name for name in recipe.reward_names) or _holds(recipe.raw, "judge")
        yield "an endpoint" + (" for a judge" if judges else "")


def _holds(value: Any, key: str) -> bool:
    """Whether a mapping, or one in it, has `key`."""
    if isinstance(value, Mapping):
        return key in value or any(_holds(inner, key) for inner in value.values())
    return False


def data_of(recipe: Recipe) -> str:
    """The data set's name, or the names of a mixture."""
    mixture = [item.path for item in recipe.dataset_args.datasets or ()]
    return ", ".join(mixture or [str(recipe.script_args.dataset_name)])


def row(path: Path) -> list[str]:
    """One recipe's cells, in the order of `COLUMNS`."""
    recipes = recipes_of(path)
    total = max(memory.predict(recipe).total for recipe in recipes) / memory.GIB
    unique = [
        ", ".join(dict.fromkeys(cell for recipe in recipes for cell in cells(recipe)))
        for cells in (
            lambda r: [r.trainer + (f", {r.loop.name}" if r.loop else "")],
            lambda r: [f"`{r.model_args.model_name_or_path}`"],
            lambda r: [f"`{data_of(r)}`"],
        )
    ]
    links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers(path, recipes))
    wanted = ", ".join(dict.fromkeys(need for recipe in recipes for need in needs(path, recipe)))
    return [f"[{path.stem}]({path.name})", links or "none", *unique, f"{total:.1f}", wanted]


def page(folder: Path = FOLDER) -> str:
    """The whole page: real models first, then the sandbox."""
    paths = sorted(folder.glob("*.yaml"))
    parts = [HEAD]
    for title, sandbox in (("Real models", False), ("Sandbox", True)):
        rows = [row(path) for path in paths if path.stem.startswith("sandbox") is sandbox]
        lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
        parts += [f"## {title}", "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])]
    return "\n\n".join(parts) + "\n"
