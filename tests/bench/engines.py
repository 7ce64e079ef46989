"""trl_ext/methods/ENGINES.md: each method under each way to run, from the classes' own checks and the tests that ran."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from tests.distributed import pair_worker
from tests.distributed.worker import CASES, PAIRS
from trl_ext.advice import generation_needs
from trl_ext.method import Method, Setup
from trl_ext.plan import Plan, PlanError
from trl_ext.recipe import load_recipe

HEAD = """# Where each method runs

Written by `make docs` from the classes' own checks and the tests: change those. It is for default settings; a plan is checked
with the settings that it has, before the model is loaded.

What was run. **One process**: every method, on the CPU, in the tests. **DDP**: two processes on the CPU (gloo), in
tests/distributed, with every group split between them; "equal" says that the weights were those of one process. The sandbox
recipe also runs there under `accelerate launch --config_file recipes/accelerate/ddp.yaml`. **FSDP2**: not run. accelerate
1.15 shards on GPUs alone: `fsdp2.yaml` on the CPU runs as DDP. **ZeRO-2, ZeRO-3**: not run, DeepSpeed needs a GPU; the
configurations are read by accelerate's own loader and its DeepSpeedPlugin. **vLLM**: not run. "not tested" means that no
check refuses the pair and that nobody has tried it.

With vLLM the trainer's keys pass through as they are (`use_vllm`, `vllm_mode: colocate` or `server`, ...). What a method asks
of generation beyond TRL's rollout goes through TRL's own generation, so that neither mode needs code of its own. Forwards
with part of the prompt hidden, of the teacher and of the reference are the trainer's, not vLLM's. TRL's importance
correction makes a forward for the old log-probs in every rollout; with top_p, top_k or min_p it is biased
(huggingface/trl#6789), and `trl-ext plan` says so."""
NOTES = """Loops: `pasodoble` refuses vLLM, whose copy of the weights holds one player; `iterative` samples with transformers, or from
a vLLM server that the recipe names (`vllm_server_base_url`)."""
COLUMNS = ("method", "trainer", "one process", "DDP", "FSDP2", "ZeRO-2", "ZeRO-3", "vLLM colocate and server")
ENGINES = ("fsdp", "zero", "zero3")
BASES = {"grpo": "sandbox_grpo", "dpo": "sandbox_dpo", "kto": "sandbox_kto"}
"""Recipes whose settings the checks see."""


def problems(cls: type[Method], engine: str | None, recipe: Any) -> list[str]:
    """What the plan of this method alone says under `engine`."""
    try:
        with warnings.catch_warnings():  # about these settings, not about the engine
            warnings.simplefilter("ignore")
            Plan((cls(),)).check(Setup(recipe.training_args, recipe.reward_names, engine=engine))
    except PlanError as error:
        return error.problems
    return []


def refusal(cls: type[Method], engine: str, recipe: Any) -> str | None:
    """Why `engine` refuses the method: the problems that a run without it does not have; None if there are none."""
    before = problems(cls, None, recipe)
    found = [text for text in problems(cls, engine, recipe) if text not in before]
    return "; ".join(text.partition(": ")[2] for text in found) or None


def split_cases() -> set[str]:
    """Methods whose runs in two processes are compared with one."""
    cases: tuple[Mapping[str, Any], ...] = (*CASES.values(), *PAIRS.values(), *pair_worker.CASES.values())
    return {name for case in cases for name in case["methods"] or {}}


def _generation(cls: type[Method]) -> str:
    asks = ", ".join(generation_needs(cls()))
    if cls.trainer != "grpo":
        return "samples nothing"
    return f"not tested; asks for {asks}" if asks else "not tested; asks for nothing more"


def row(cls: type[Method], recipe: Any, compared: Iterable[str], reasons: dict[str, int]) -> list[str]:
    """One method's cells; `reasons` collects the texts of refusals with their numbers."""
    trainers = ", ".join((cls.trainer, *cls.also_in))
    split = "equal" if cls.name in compared else "not tested"
    cells = [f"[`{cls.name}`](README.md#{cls.name})", trainers, "ran", split]
    for engine in ENGINES:
        why = refusal(cls, engine, recipe)
        cells.append("not tested" if why is None else f"refused ({reasons.setdefault(why, len(reasons) + 1)})")
    return [*cells, _generation(cls)]


def page(methods: Mapping[str, type[Method]]) -> str:
    """The whole page."""
    recipes = {trainer: load_recipe(name) for trainer, name in BASES.items()}
    reasons: dict[str, int] = {}
    compared = split_cases()
    rows = [row(cls, recipes[cls.trainer], compared, reasons) for cls in methods.values()]
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    why = "\n".join(f"{number}. {text}" for text, number in reasons.items())
    return "\n\n".join([HEAD, "\n".join(lines), f"Why it is refused:\n\n{why}", NOTES]) + "\n"
