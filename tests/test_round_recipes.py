"""The recipes of loops in rounds: the card's values, the plan, the data, and the memory."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from trl_ext import memory
from trl_ext.cli import plan_text
from trl_ext.data import load_data
from trl_ext.loops.building import splits
from trl_ext.loops.iterative_settings import Iterative
from trl_ext.loops.judge import Judge
from trl_ext.loops.pairs import Rubric
from trl_ext.loops.scorers import make_scorer
from trl_ext.recipe import load_recipe
from trl_ext.schedule import schedule_of

FOLDER = Path(__file__).parents[1] / "recipes"
# transformers refuses bf16 on a machine without such a GPU unless this is set
DEVICE = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
CARD = {
    "rounds": 3,
    "prompts_per_round": 20_000,
    "num_samples": 5,
    "temperature": 0.7,
    "top_p": 0.95,
    "min_positive_score": 5.0,
    "margin": 2.0,
    "student_margin": 1.0,
    "replay": 0.3,
    "keep": "best",
}


def load(*overrides: str):
    return load_recipe(str(FOLDER / "dno_mistral_7b.yaml"), [*DEVICE, *overrides])


def test_values_are_the_cards() -> None:
    recipe = load()
    args, loop = recipe.training_args, recipe.loop
    assert {key: getattr(loop, key) for key in CARD} == CARD and loop.rubric == Rubric()
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert (args.beta, args.learning_rate, args.num_train_epochs, args.loss_type) == (0.1, 5e-5, 1, ["dno"])
    (dno,) = recipe.plan.methods
    assert (dno.name, dno.variant) == ("dno", "prct")
    scorer = make_scorer(loop.scorer, [], None, "unused")
    assert isinstance(scorer, Judge) and scorer.mode == "rubric" and scorer.client.api_key_env == "OPENAI_API_KEY"


@pytest.mark.parametrize("key", [*CARD, "learning_rate", "per_device_train_batch_size", "beta", "num_train_epochs"])
def test_every_value_has_its_reason(key: str) -> None:
    lines = [x.strip() for x in (FOLDER / "dno_mistral_7b.yaml").read_text().splitlines()]
    (line,) = [x for x in lines if x.startswith(f"{key}:")]
    assert "card" in line, line


def test_dry_run_of_the_data(tmp_path: Path) -> None:
    """The public columns with our own text."""
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(5)]
    rows = [
        {
            "prompt": f"q{i}" + " w" * i,
            "prompt_id": str(i),
            "chosen": t,
            "rejected": t,
            "messages": t,
            "score_chosen": 8.0,
        }
        for i, t in enumerate(turns)
    ]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "prefs.jsonl")
    recipe = load("--dataset_name", str(tmp_path / "prefs.jsonl"), "--max_prompt_tokens", "4")
    data = load_data(recipe, count_tokens=lambda prompt: len(prompt[0]["content"].split()))
    assert (data.rows, data.dropped, data.eval) == (4, 1, None)
    assert data.train[0]["prompt"] == [{"role": "user", "content": "q0"}]
    assert data.train[0][recipe.loop.teacher_column][-1] == {"role": "assistant", "content": "a0"}


def test_memory_fits_the_gpu() -> None:
    prediction = memory.predict(load())
    assert 15 < prediction.total / memory.GIB < 46 and prediction.fits(48) == []


@pytest.mark.parametrize("name", ["sandbox_dno", "sandbox_kto_iterative", "dno_mistral_7b"])
def test_plan(name: str) -> None:
    recipe = load_recipe(str(FOLDER / f"{name}.yaml"), DEVICE)
    assert isinstance(recipe.loop, Iterative)
    text = plan_text(recipe, schedule_of(recipe.training_args).words())
    assert "Loop: iterative (arXiv 2404.03715): 3 rounds" in text


@pytest.mark.parametrize("name", ["sandbox_dno", "sandbox_kto_iterative"])
def test_the_sandbox_has_enough_prompts(name: str) -> None:
    recipe = load_recipe(str(FOLDER / f"{name}.yaml"))
    held_out, rounds = splits(range(load_data(recipe).rows), recipe.loop, recipe.training_args.seed)
    everything = [*held_out, *(i for one in rounds for i in one)]
    assert len(held_out) == 100 and [len(one) for one in rounds] == [160] * 3
    assert len(set(everything)) == len(everything) == 580
