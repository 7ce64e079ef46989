"""What methods cost on a CUDA device: a random Qwen3-1.7B with LoRA, in bf16 and in 4-bit. `python -m tests.bench.gpu`.

Loss, backward, clipping and optimizer on one fixed batch of 4 x (256 + 1024) tokens, V = 151,936, gradient checkpointing
on; variants take turns as in `overhead`. Then the recipe `trace_qwen3_1.7b`: the peak of one loss step of its micro-batch
at full length (TRACE with a span in every wrong row) beside `trl_ext.memory.predict`. Its rollout is not run.

4-bit needs bitsandbytes; without it that part is left out and the result says so. For a machine that cannot reach a
package index, `tests/bench/device.sh` collects the wheels and prints the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.common import RESULTS, machine, machine_text, quiet, say, table, write_json

quiet()

import torch  # noqa: E402 - after the environment is set
from peft import LoraConfig  # noqa: E402
from transformers import BitsAndBytesConfig  # noqa: E402
from transformers.utils import is_bitsandbytes_available  # noqa: E402
from trl import get_peft_config, get_quantization_config  # noqa: E402

from tests.bench import steps  # noqa: E402
from tests.bench.flops import Passes, Shape  # noqa: E402
from tests.bench.overhead import TINY, measure, shape_text, variant_table  # noqa: E402
from tests.bench.steps import Bench, Variant  # noqa: E402
from trl_ext.memory import UNKNOWN_PROMPT, predict  # noqa: E402
from trl_ext.recipe import load_recipe  # noqa: E402

GIB = 2**30
DEVICE = "cuda"
QWEN = Shape(4, 256, 1024, 2048, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=6144, vocab=151_936)
RECIPE = "trace_qwen3_1.7b"
LORA: dict[str, Any] = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PASSES = Passes(frozen=True, checkpointing=True, every_token=False)


def nf4() -> BitsAndBytesConfig:
    """The quantization of the shipped recipes."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def precision(kind: str) -> dict[str, Any]:
    """Config and trainer arguments of "bf16" or "4-bit"."""
    where = {"": 0} if torch.cuda.is_available() else None  # None: a rehearsal on the CPU
    loading = {"dtype": "bfloat16", "attn_implementation": "sdpa", "device_map": where}
    init = {"quantization_config": nf4()} if kind == "4-bit" else {}
    return {"bf16": True, "gradient_checkpointing": True, "model_init_kwargs": loading, "init": init}


def run_kind(kind: str, shape: Shape, model: str, rounds: int) -> list[dict[str, Any]]:
    """All variants in one precision."""
    say(f"{kind} LoRA: {shape}")
    with tempfile.TemporaryDirectory() as folder, steps.known(steps.NaiveTrace, steps.NaiveDgpo):

        def build(variant: Variant) -> Bench:
            return Bench(variant, shape, model, folder, peft=LoraConfig(**LORA), **precision(kind))

        rows = measure(steps.variants(), build, rounds, PASSES)
    _release()
    return rows


def run_recipe(geometry: Shape, model: str, length: tuple[int, int] | None) -> dict[str, Any]:
    """Peak of one loss step of the recipe's micro-batch beside the prediction; `length` (L, T) shortens it."""
    recipe = load_recipe(RECIPE)
    args, own = recipe.training_args, recipe.model_args
    prompt, completion = length or (recipe.extra.max_prompt_tokens or UNKNOWN_PROMPT, args.max_completion_length)
    shape = dataclasses.replace(geometry, rows=args.per_device_train_batch_size, prompt=prompt, completion=completion)
    methods = {name: dict(values or {}) for name, values in recipe.raw["methods"].items()}
    methods["trace"]["annotator"] = steps.FLAGGED
    same = ("loss_type", "temperature", "optim", "epsilon_high", "beta", "gradient_checkpointing")
    loading = precision("bf16")["model_init_kwargs"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            Variant(RECIPE, methods, share=1.0),
            shape,
            model,
            folder,
            peft=get_peft_config(own),
            bf16=True,
            model_init_kwargs=loading,
            init={"quantization_config": get_quantization_config(own)},
            **{name: getattr(args, name) for name in same},
        )
        before = torch.cuda.memory_allocated()
        peak = before + steps.peak_bytes(bench.step)
    predicted = predict(recipe)
    found = {
        "recipe": RECIPE,
        "shape": dataclasses.asdict(shape),
        "span_tokens": bench.span_tokens(),
        "measured_gib": peak / GIB,
        "predicted_gib": (predicted.of("always") + predicted.of("loss")) / GIB,
        "predicted_total_gib": predicted.total / GIB,
        "full_length": length is None,
    }
    del bench
    _release()
    return found


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run(shape: Shape, rounds: int, length: tuple[int, int] | None) -> dict[str, Any]:
    """Both precisions and the recipe, from one random model on disk."""
    four = is_bitsandbytes_available()
    with tempfile.TemporaryDirectory() as model:
        steps.build_model(shape, DEVICE, torch.bfloat16).save_pretrained(model)
        kinds = ("bf16", "4-bit") if four else ("bf16",)
        parts = {kind: run_kind(kind, shape, model, rounds) for kind in kinds}
        recipe = run_recipe(shape, model, length) if four else None
    left_out = None if four else "4-bit and the recipe were left out: bitsandbytes is not installed."
    return {
        "bench": "gpu",
        "machine": machine(),
        "rounds": rounds,
        "shape": dataclasses.asdict(shape),
        "kinds": parts,
        "recipe": recipe,
        "left_out": left_out,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The result as text for the README."""
    parts = [f"Random model, LoRA, gradient checkpointing, {shape_text(result['shape'])}."]
    parts += [f"**{kind}**\n\n{variant_table(rows)}" for kind, rows in result["kinds"].items()]
    if recipe := result["recipe"]:
        header = ("recipe, loss step", "measured, GiB", "predicted, GiB", "predicted with rollout, GiB")
        numbers = (recipe["measured_gib"], recipe["predicted_gib"], recipe["predicted_total_gib"])
        size = recipe["shape"]
        name = f"{recipe['recipe']}, {size['rows']} x ({size['prompt']} + {size['completion']})"
        parts.append(table(header, [(name, *(f"{n:.2f}" for n in numbers))]))
    if result["left_out"]:
        parts.append(result["left_out"])
    parts.append(f"Median of {result['rounds']} rounds. {machine_text(result['machine'])}.")
    return "\n\n".join(parts)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it work at all?")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    parser.add_argument("--out", type=Path, help="folder (default tests/bench/results; none if quick)")
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        sys.exit(
            "tests.bench.gpu needs a CUDA device, and torch sees none here. CPU figures: python -m tests.bench.overhead"
        )
    quick = dataclasses.replace(TINY, hidden=128, head_dim=64, intermediate=256)  # 4-bit blocks need 64 entries
    result = run(quick, 2, (32, 64)) if args.quick else run(QWEN, args.rounds, None)
    out = args.out or (None if args.quick else RESULTS)
    if out:
        write_json(out / "gpu.json", result)
        say(f"written: {out / 'gpu.json'}")
    sys.stdout.write(markdown(result) + "\n")


if __name__ == "__main__":
    main()
