"""The recipes for real models: read, planned, dry-run on a stand-in with the data set's columns, and they fit."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
import yaml

from trl_ext import memory
from trl_ext.data import DataError, load_data
from trl_ext.method import HIDDEN, TEACHER
from trl_ext.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = {"trace_qwen3_1.7b": 24, "trace_qwen3_8b": 80}  # GiB of the GPU
# transformers refuses bf16 on a machine without such a GPU unless this is set
DEVICE = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
CARD = {
    "temperature": 0.6,
    "num_generations": 8,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "loss_type": "grpo",
    "max_steps": 300,
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}


def load(name: str, *overrides: str):
    return load_recipe(str(FOLDER / f"{name}.yaml"), [*DEVICE, *overrides])


def stand_in(path: Path, rows: int = 6) -> Path:
    """The public columns of open-r1/OpenThoughts-114k-math with our own text in them."""
    long = "word " * 40
    content = [
        {
            "source": "ours",
            "problem": f"What is {i} + {i}?" if i else f"{long}What is 0 + 0?",
            "solution": f"We add: {i} + {i} = $\\boxed{{{2 * i}}}$.",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "system": "",
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
            "generated_token_count": 100 + i,
            "correct": True,
        }
        for i in range(rows)
    ]
    data = datasets.Dataset.from_list(content)
    data.to_parquet(path) if path.suffix == ".parquet" else data.to_json(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_cards(name: str) -> None:
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    recipe = load(name)
    args = recipe.training_args
    assert {key: getattr(args, key) for key in CARD} == CARD
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    assert args.gradient_accumulation_steps % args.steps_per_generation == 0  # every rollout is on policy
    assert (args.top_p, args.top_k) == (1.0, 0)
    assert (recipe.extra.max_prompt_tokens, recipe.extra.max_train_rows) == (2048, 30_000)
    assert "none" in str(raw["report_to"])


@pytest.mark.parametrize(("name", "action"), [("trace_qwen3_1.7b", "rkl_error"), ("trace_qwen3_8b", "fkl_key")])
def test_plan(name: str, action: str) -> None:
    recipe = load(name)
    (trace,) = recipe.plan.methods
    assert (trace.name, trace.action, trace.needs()) == ("trace", action, {HIDDEN, TEACHER})
    assert (trace.weight, trace.hold_steps, trace.decay_steps, trace.coverage) == (0.5, 10, 30, 0.25)
    assert (trace.clip, trace.top_k, trace.sync_every, trace.annotator) == (0.05, 100, 10, "policy")
    assert recipe.reward_names == ["math_correct"]


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_its_reason(name: str) -> None:
    """Each number that the card gives is quoted on its line, as "card: ..."."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    for key in (*CARD, "max_completion_length", "learning_rate", "max_prompt_tokens", "max_train_rows", "action"):
        (line,) = [x for x in lines if x.strip().startswith(f"{key}:")]
        assert "card" in line, line


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_dry_run_of_the_data(name: str, suffix: str, tmp_path: Path) -> None:
    path = stand_in(tmp_path / f"math{suffix}")
    recipe = load(name, "--dataset_name", str(path), "--max_prompt_tokens", "40")
    data = load_data(recipe, count_tokens=lambda prompt: len(prompt[0]["content"].split()))
    assert (data.rows, data.dropped) == (5, 1)
    row = data.train[0]
    assert row["prompt"] == [
        {
            "role": "user",
            "content": "What is 1 + 1?\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        }
    ]
    (reward,) = recipe.rewards
    replies = [[{"role": "assistant", "content": f"so it is \\boxed{{{n}}}"}] for n in (2, 3)]
    columns = {key: [row[key]] * 2 for key in row if key != "prompt"}
    assert reward(prompts=[row["prompt"]] * 2, completions=replies, **columns) == [1.0, 0.0]


def test_8b_in_4_bit_as_its_comment_says() -> None:
    smaller = ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true", "--steps_per_generation", "4")
    assert memory.predict(load("trace_qwen3_8b", *smaller)).fits(48) == []


def test_another_data_set_is_refused_with_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "1 + 1", "label": "2"}\n')
    with pytest.raises(DataError, match="question, label"):
        load_data(load("trace_qwen3_1.7b", "--dataset_name", str(path)))


@pytest.mark.parametrize(("name", "gib"), NAMES.items())
def test_memory_fits_the_gpu(name: str, gib: int) -> None:
    prediction = memory.predict(load(name))
    assert 0.5 * gib < prediction.total / memory.GIB < gib - 2  # used, and with room for what is not counted
    assert prediction.fits(gib) == []
    table = prediction.table()
    assert "adapter" in table and "KV cache" in table and "full distributions" in table
    # The whole step in one rollout, TRL's default, would not fit; the first advice says so
    whole = memory.predict(load(name, "--steps_per_generation", "128"))
    assert whole.fits(gib)[0].startswith("steps_per_generation: 64 saves ")


@pytest.mark.parametrize(("name", "gib"), NAMES.items())
def test_vllm_as_the_recipe_describes_it(name: str, gib: int) -> None:
    vllm = ("--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.3")
    recipe = load(name, *vllm, "--steps_per_generation", "128")
    assert memory.predict(recipe).fits(gib) == []


def test_the_sandbox_model_needs_no_download() -> None:
    prediction = memory.predict(load_recipe(str(FOLDER / "sandbox_trace.yaml")))
    assert prediction.notes == ("max_prompt_tokens is not set: prompts of 64 tokens assumed",)
    assert prediction.total < 4 * memory.GIB
