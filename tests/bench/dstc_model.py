"""DSTC with the sandbox's model, for `tests.bench.preference`: does it write more right code after learning from its own?

The recipe `sandbox_dstc` by hand: one SFT on sloppy demonstrations for each seed, then DSTC from that model once for each
way to select pairs, on `TRAINED` of the 60 instructions. Asked of the start and of each result: the share of sampled codes
that are right on every input of `INPUTS` (pass@1), for the instructions trained on and for the others; and of the pairs,
how many chosen codes are right and how many rejected ones wrong. Nobody runs a code for this: a right one is one line that
adds, subtracts or multiplies, and is read as such; whatever is not counts as wrong.
"""

from __future__ import annotations

import ast
import json
import operator
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import quiet, write_json

quiet()

import yaml  # noqa: E402 - after the environment is set
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from trl_ext.loops import dstc  # noqa: E402
from trl_ext.loops.dstc_data import asked  # noqa: E402
from trl_ext.loops.dstc_settings import Dstc  # noqa: E402
from trl_ext.loops.sampling import Drawing, TransformersSampler  # noqa: E402
from trl_ext.recipe import find_recipe, load_recipe  # noqa: E402
from trl_ext.run import train  # noqa: E402
from trl_ext.sandbox.programs import CODE_PROMPT, instructions, value  # noqa: E402
from trl_ext.settings import read_yaml  # noqa: E402

RECIPE = "sandbox_dstc"
TRAINED = 45
INPUTS = range(-3, 12)
ARMS: Mapping[str, Mapping[str, Any]] = {
    "random": {"selection": "random", "require_gap": False},
    "random, with a gap": {"selection": "random"},
    "minimax": {"selection": "minimax"},
}
"""A gap: the chosen code passes more tests than the rejected one, which is a part of what minimax does."""
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def is_right(text: str | None, operation: str, number: int) -> bool:
    """Whether a code is `def f(x): return A op B`, A and B each x or a whole number, and right on all of `INPUTS`."""
    match dstc.parsed(text or ""):
        case ast.Module(
            body=[
                ast.FunctionDef(
                    name="f", args=ast.arguments(args=[ast.arg(arg=x)]), body=[ast.Return(ast.BinOp() as b)]
                )
            ]
        ):
            return all(_value(b, x, at) == value(operation, number, at) for at in INPUTS)
    return False


def _value(node: ast.BinOp, x: str, at: int) -> int | None:
    sides = []
    for side in (node.left, node.right):
        match side:
            case ast.Name(id=name) if name == x:
                sides.append(at)
            case ast.Constant(value=int(constant)):
                sides.append(constant)
            case _:
                return None
    known = _OPERATORS.get(type(node.op))
    return known(*sides) if known else None


def dstc_arms(seed: int, steps: int | None, eval_rows: int) -> dict[str, dict[str, float]]:
    """Each selection for one seed; `eval_rows`: codes sampled for each instruction, at least one of each."""
    rows = list(instructions(60, seed))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = _trained("sft", seed, folder / "sft", {"dataset_options": {"n": 12800, "seed": 1 + 10 * seed}})
        before = _pass_at_1(start, rows, seed, eval_rows)
        changes: dict[str, Any] = {"model_name_or_path": start, "dataset_options": {"n": TRAINED, "seed": seed}}
        changes |= {"max_steps": steps} if steps else {}
        found: dict[str, dict[str, float]] = {}
        for number, (arm, how) in enumerate(ARMS.items()):
            if number:
                _share(folder / "arm0", folder / f"arm{number}", how)
            out = _trained("dstc", seed, folder / f"arm{number}", changes, **how)
            after = _pass_at_1(out, rows, seed, eval_rows)
            gains = {f"{key}_gain": after[key] - before[key] for key in after}
            found[arm] = {**after, **gains, **_pairs(out, rows[:TRAINED])}
        return {**found, "start": before}


def _share(first: Path, out: Path, how: Mapping[str, Any]) -> None:
    """The codes, tests and results of an arm for another one, which draws and runs the same and selects by `how`."""
    settings = json.loads((first / "rounds" / "settings.json").read_text())
    write_json(out / "rounds" / "settings.json", settings | {"require_gap": Dstc.require_gap} | how)
    for part in (first / "rounds" / "dstc").glob("part-*"):
        own = out / "rounds" / "dstc" / part.name
        own.mkdir(parents=True)
        for name in ("samples.jsonl", "results.jsonl"):
            shutil.copy(part / name, own / name)


def _trained(stage: str, seed: int, out: Path, changes: dict[str, Any], **loop: Any) -> str:
    """Trains one stage of the recipe as a recipe of its own; its folder."""
    raw: dict[str, Any] = read_yaml(find_recipe(RECIPE).read_text())
    block = raw.pop("stages")[stage]
    del raw["eval"]
    if loop:
        block["loop"]["dstc"] |= loop
    path = out.with_suffix(".yaml")
    own = {"seed": 42 + seed, "output_dir": str(out), "eval_rows": 0, "disable_tqdm": True}
    path.write_text(yaml.safe_dump(raw | block | own | changes, sort_keys=False))
    train(load_recipe(str(path)), resume=out.exists())
    return str(out)


def _pass_at_1(folder: str, rows: Sequence[dict[str, Any]], seed: int, each: int) -> dict[str, float]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    drawing = Drawing(1.0, 1.0, Dstc.max_completion_length, 256)
    prompts = [{"prompt": asked(row, CODE_PROMPT)} for row in rows]
    replies = TransformersSampler(model, tokenizer).sample(prompts, each, drawing, f"{seed}/pass@1")
    shares = [
        sum(is_right(dstc.first_block(s["text"]), row["operation"], row["number"]) for s in own) / each
        for row, own in zip(rows, replies, strict=True)
    ]
    parts = {"pass_at_1": shares[:TRAINED], "pass_at_1_others": shares[TRAINED:]}
    return {name: sum(own) / len(own) for name, own in parts.items()}


def _pairs(folder: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of chosen codes that are right and of rejected ones that are wrong, and how many pairs there are."""
    chosen, rejected = [], []
    for path in sorted((Path(folder) / "rounds" / "dstc").glob("part-*")):
        results = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
        pairs = [json.loads(line) for line in (path / "pairs.jsonl").read_text().splitlines()]
        for result, pair in zip(results, pairs, strict=True):
            row = rows[result["index"]]
            for side, judged in (("chosen", chosen), ("rejected", rejected)):
                if pair["skipped"] is None:
                    code = result["codes"][pair["selection"][f"{side}_code"]]
                    judged.append(is_right(code, row["operation"], row["number"]))
    return {
        "chosen_right": sum(chosen) / len(chosen),
        "rejected_wrong": 1 - sum(rejected) / len(rejected),
        "pairs": float(len(chosen)),
    }
