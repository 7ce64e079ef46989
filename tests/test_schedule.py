"""The batch arithmetic in words and numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.tiny import letters_reward, prompts, tiny_path
from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.schedule import group_misfit, schedule_of


def grpo(**changed: object) -> SimpleNamespace:
    settings = {
        "per_device_train_batch_size": 64,
        "world_size": 1,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 4,
        "num_iterations": 1,
        "num_generations": 16,
        "max_steps": 80,
        "num_train_epochs": 3.0,
    }
    return SimpleNamespace(**settings | changed)


@pytest.mark.parametrize(
    ("changed", "rows", "words"),
    [
        (
            {},
            2000,
            "16 prompts x 16 completions = 256 completions per rollout, split over 4 micro-batches of 64; one optimizer "
            "step per rollout; 80 steps see 1280 prompts (0.6 epochs of 2000 rows)",
        ),
        (
            {"num_iterations": 2, "gradient_accumulation_steps": 2, "world_size": 2},
            None,
            "32 prompts x 16 completions = 512 completions per rollout, split over 4 micro-batches of 64 on each of 2 "
            "processes, used 2 times; 4 optimizer steps per rollout; 80 steps see 640 prompts",
        ),
        (
            {"gradient_accumulation_steps": 16},
            None,
            "16 prompts x 16 completions = 256 completions per rollout, split over 4 micro-batches of 64; one optimizer "
            "step per 4 rollouts, so 1024 completions of 64 prompts per step; 80 steps see 5120 prompts",
        ),
        (
            {"max_steps": -1},
            None,
            "16 prompts x 16 completions = 256 completions per rollout, split over 4 micro-batches of 64; one optimizer "
            "step per rollout; 3 epochs; the number of steps depends on the size of the data set",
        ),
    ],
)
def test_words(changed: dict, rows: int | None, words: str) -> None:
    assert schedule_of(grpo(**changed), rows).words() == words


def test_pairs() -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=4, world_size=2, gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2.0
    )
    schedule = schedule_of(args, 100)
    # 100 rows in batches of 8 are 13 batches, in steps of 3 are 5 steps an epoch
    assert schedule.steps == 10
    assert schedule.words().startswith("4 pairs x 2 processes x 3 accumulation steps = 24 pairs per optimizer step")


@pytest.mark.parametrize("sizes", [(8, 2, 2, 1), (8, 1, 2, 2), (4, 4, 4, 1), (4, 2, 4, 1)])
def test_steps_agree_with_the_trainer(sizes: tuple[int, int, int, int], tmp_path: object) -> None:
    batch, accumulation, window, iterations = sizes
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=window,
        num_iterations=iterations,
        num_generations=4,
        num_train_epochs=3,
        learning_rate=0.0,
        max_completion_length=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
    )
    data = prompts(10)
    trainer = GRPOTrainer(tiny_path(), letters_reward, args, data)
    trainer.train()
    assert schedule_of(args, len(data)).steps == trainer.state.global_step


def test_rows_that_do_not_fill_a_rollout() -> None:
    with pytest.raises(ValueError, match="has 15 rows, one rollout takes 16 different prompts"):
        schedule_of(grpo(), 15)
    assert schedule_of(grpo(), 16).rows == 16


def settings(size: int, accumulation: int, window: int | None, group: int, total: int | None = None) -> dict:
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": window,
        "num_generations": group,
        "generation_batch_size": total,
    }


def test_a_misfit_is_found_exactly_when_groups_are_torn() -> None:
    for size in range(1, 9):
        for window in (None, 1, 2, 3):
            for group in range(2, 9):
                total = size * 2 * (window or 4)
                found = group_misfit(settings(size, 4, window, group), processes=2)
                assert (found is None) == (total % group == 0)


def test_the_named_sizes_do_fit() -> None:
    text = group_misfit(settings(10, 1, 3, 8), processes=1)
    assert text is not None and "10 x one process x steps_per_generation 3 = 30 completions" in text
    assert "8 or 16 for per_device_train_batch_size, or 6 or 10 for num_generations" in text
    text = group_misfit(settings(8, 1, None, 8, total=20), processes=1)
    assert text is not None and "generation_batch_size 20 is not a multiple" in text and "16 or 24" in text
