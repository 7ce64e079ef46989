"""Each advice fires where it should, names key, value and what to set, and stays silent beside it; recipes get none."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config

from trl_ext import memory
from trl_ext.advice import Advice, advise, context_length, reference_words
from trl_ext.cli import main
from trl_ext.loops.stages import is_pipeline, load_pipeline
from trl_ext.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
REAL = str(FOLDER / "trace_qwen3_1.7b.yaml")  # 4-bit base, adapter of r 32 and alpha 64, rate 5e-5, 300 steps
FULL = ("--use_peft", "false", "--load_in_4bit", "false")
VLLM = ("--use_vllm", "true")


def load(*overrides: str, path: str = REAL):
    return load_recipe(path, ["--use_cpu", "true", *overrides])


def found(*overrides: str, config=None, path: str = REAL) -> dict[str, Advice]:
    advice = advise(load(*overrides, path=path), config)
    assert len({a.key for a in advice}) == len(advice)
    return {a.key: a for a in advice}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_recipe_needs_advice(path: Path) -> None:
    on_cpu = ["--use_cpu", "true"] if not path.stem.startswith("sandbox") else []
    if is_pipeline(str(path)):
        recipes = [stage.recipe for stage in load_pipeline(str(path), on_cpu).stages]
    else:
        recipes = [load_recipe(str(path), on_cpu)]
    for recipe in recipes:
        assert advise(recipe, memory.config_of(recipe)[0]) == []


# (overrides that hurt, overrides beside it that do not, key, words of the advice)
CASES = {
    "adapter's rate too low": (["--learning_rate", "9e-7"], ["--learning_rate", "1e-6"], "learning_rate", "1e-05"),
    "adapter's rate too high": (["--learning_rate", "2e-4"], ["--learning_rate", "1e-4"], "learning_rate", "collapse"),
    "full rate too high": (
        [*FULL, "--dtype", "float32", "--learning_rate", "5e-5"],
        [*FULL, "--dtype", "float32", "--learning_rate", "1e-5"],
        "learning_rate",
        "about 1e-06",
    ),
    # 1e-6 x 2^9 = 5.1e-4, far below a usual weight; 5e-5 x 512 = 0.026 is above 0.02
    "updates of bfloat16 weights": (
        [*FULL, "--learning_rate", "1e-6"],
        [*FULL, "--learning_rate", "1e-6", "--dtype", "float32"],
        "dtype",
        "above 0.00051",
    ),
    "frozen base in float32": (
        ["--load_in_4bit", "false", "--dtype", "float32"],
        ["--load_in_4bit", "false", "--dtype", "bfloat16"],
        "dtype",
        "doubles",
    ),
    "alpha over r": (["--lora_alpha", "7"], ["--lora_alpha", "8"], "lora_alpha", "0.21875"),
    "alpha far over r": (["--lora_alpha", "257"], ["--lora_alpha", "256"], "lora_alpha", "lora_alpha: 64"),
    "adapter's places": (
        ["--lora_target_modules", "null"],
        ["--lora_target_modules", "all-linear"],
        "lora_target_modules",
        "all-linear",
    ),
    "dropout": (
        ["--lora_dropout", "0.05"],
        ["--lora_dropout", "0.05", "--disable_dropout", "true"],
        "lora_dropout",
        "lora_dropout: 0.0",
    ),
    "prompts of any length": (
        ["--max_prompt_tokens", "null"],
        ["--max_prompt_tokens", "100000"],
        "max_prompt_tokens",
        "does not cut",
    ),
    "greedy": (["--temperature", "0"], ["--temperature", "0.1"], "temperature", "divides by zero"),
    "top-p": ([*VLLM, "--top_p", "0.95"], ["--top_p", "0.95"], "top_p", "#6789"),
    "top-k": ([*VLLM, "--top_k", "20"], [*VLLM, "--top_k", "0"], "top_k", "top_k: 0"),
    "min-p without correction": (
        [*VLLM, "--min_p", "0.1"],
        [*VLLM, "--min_p", "0.1", "--vllm_importance_sampling_correction", "false"],
        "min_p",
        "min_p: 0",
    ),
    "pairs of two": (
        ["--num_generations", "2"],
        ["--num_generations", "2", "--scale_rewards", "none"],
        "num_generations",
        "+0.71",
    ),
    "bnpo": (
        ["--loss_type", "bnpo"],
        ["--loss_type", "bnpo", "--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "8"]
        + ["--steps_per_generation", "1"],
        "loss_type",
        "dapo",
    ),
    "saved at the end alone": (
        ["--max_steps", "19"],
        ["--max_steps", "20"],
        "save_steps",
        "the only checkpoint is written at the end, so a run that is cut off cannot be resumed; set save_steps: 4",
    ),
    "evaluated at the end alone": (
        ["--eval_strategy", "steps", "--eval_steps", "301"],
        ["--eval_strategy", "steps", "--eval_steps", "300"],
        "eval_steps",
        "max_steps 300: the only evaluation comes at the end",
    ),
    "never warm": (["--warmup_steps", "300"], ["--warmup_steps", "299"], "warmup_steps", "warmup_steps: 30"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_advice(case: str) -> None:
    hurts, fine, key, words = CASES[case]
    advice = found(*hurts)
    assert list(advice) == [key]
    assert words in str(advice[key]) and str(advice[key]).startswith(f"{key}: ") and advice[key].source
    assert key not in found(*fine)


def test_context() -> None:
    """The recipe's prompts of 2048 and completions of 3072 tokens make 5120."""
    assert "max_completion_length" not in found(config=Qwen3Config(max_position_embeddings=5120))
    advice = found(config=Qwen3Config(max_position_embeddings=5119))["max_completion_length"]
    assert "5120" in advice.why and "end at 5119" in advice.why and "3071 or less" in advice.instead


def test_context_of_scaled_positions() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert context_length(None) is None
    assert context_length(Qwen3Config(max_position_embeddings=40960)) == 40960
    assert context_length(Qwen3Config(max_position_embeddings=32768, rope_parameters=yarn)) == 131072
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    assert context_length(Qwen3Config(max_position_embeddings=4096, rope_parameters=linear)) == 8192


def test_the_sandbox_has_rates_of_its_own() -> None:
    assert found("--learning_rate", "0.01", path=str(FOLDER / "sandbox_grpo.yaml")) == {}


def test_reference_in_words() -> None:
    assert reference_words(load()) is None
    assert reference_words(load("--beta", "0.04")) == "the base model with the adapter off; no copy"
    whole = reference_words(load("--beta", "0.04", *FULL))
    assert whole is not None and "second copy" in whole


def test_plan_shows_advice_reference_and_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--use_cpu", "true", "--beta", "0.04", "--lora_alpha", "512"]
    assert main(["plan", REAL, "--gpu", "24", *keys]) == 0
    shown = capsys.readouterr().out
    assert "Reference: the base model with the adapter off" in shown
    assert "Settings that are known to hurt:\n  - lora_alpha: 512. " in shown
    assert "Fits: " in shown and " of 24 GiB at the peak." in shown
    assert main(["plan", REAL, "--gpu", "12", "--use_cpu", "true"]) == 0
    shown = capsys.readouterr().out
    assert "known to hurt" not in shown
    assert "Does not fit: " in shown and "12 GiB there are. One knob at a time:\n  - " in shown
    enough = float(shown.rsplit("Enough, ")[1].split()[0])
    assert enough <= 12
