"""A reward that raises, gives NaN or hangs ends a run with a checkpoint, from which it goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from tests.tiny import annotate_first, assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import checkpoints
from trl_ext.annotate import AnnotatorError
from trl_ext.checkpoints import CheckpointError
from trl_ext.last_step import LARGE, Large, Overwritten, recalled, remembered
from trl_ext.plan import PlanError
from trl_ext.rewards import RewardError, checked


class Shaky:
    """`letters_reward` that fails at call number `at` (0: never), and remembers how many completions it scored."""

    __name__ = "shaky"

    def __init__(self, at: int, how: str = "raises") -> None:
        self.at, self.how, self.calls, self.seen = at, how, 0, 0

    def __call__(self, completions: list, **kwargs: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.at:
            if self.how == "raises":
                raise OSError("the judge is down")
            if self.how == "hangs":
                time.sleep(60)
            return [math.nan] * len(completions)
        self.seen += len(completions)
        return [score + self.seen / 1000 * (i % 2) for i, score in enumerate(letters_reward(completions))]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def train(self, mode: bool = True) -> None: ...


def run(folder: Path, reward: Any, resume: bool = False, **kwargs: Any) -> trl_ext.GRPOTrainer:
    """Six steps; no checkpoint is asked for."""
    methods = kwargs.pop("methods", None)
    settings = {"max_steps": 6, "loss_type": "grpo"} | kwargs
    args = trl_ext.GRPOConfig(**grpo_args(str(folder), **settings), methods=methods)
    data = prompts(4) if "eval_strategy" in kwargs else None
    trainer = trl_ext.GRPOTrainer(tiny_path(), checked(reward), args, prompts(), eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.left = torch.get_rng_state()
    return trainer


def assert_same(whole: trl_ext.GRPOTrainer, resumed: trl_ext.GRPOTrainer, first: int) -> None:
    """Weights, counters, random numbers to come, states, and what is logged from step `first` on."""
    assert_equal(weights(whole), weights(resumed))
    for one, other in zip(whole.plan.methods, resumed.plan.methods, strict=True):
        torch.testing.assert_close(one.state, other.state, rtol=0, atol=0)
    assert whole.reward_funcs[0].__wrapped__.seen == resumed.reward_funcs[0].__wrapped__.seen
    assert whole.state.num_input_tokens_seen == resumed.state.num_input_tokens_seen
    assert whole.state.total_flos == resumed.state.total_flos and whole._step == resumed._step
    assert torch.equal(whole.left, resumed.left)
    logs = [
        [
            {k: v for k, v in sorted(entry.items()) if not k.endswith(("_time", "seconds", "runtime", "_per_second"))}
            for entry in trainer.state.log_history[:-1]
            if entry["step"] >= first
        ]
        for trainer in (whole, resumed)
    ]
    assert repr(logs[0]) == repr(logs[1]) and len(logs[0]) >= 6 - first  # repr: a NaN is no other NaN


SAMPLING = {"dynamic_sampling": {"low": 0.45, "high": 0.6, "rounds": 2}}
TWO_ROLLOUTS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
UNEVEN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
TRACE = {"trace": {"action": "both", "annotator": "tests.tiny.annotate_first", "sync_every": 2, "clip": None}}


@pytest.mark.parametrize(
    ("at", "step", "kwargs"),
    [
        (4, 3, {}),
        (7, None, {"methods": SAMPLING}),  # the refill of a rollout
        (8, None, {"methods": SAMPLING}),
        (4, 3, {"methods": TRACE}),
        (2, 2, {"steps_per_generation": 2}),
        (2, 4, {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1}),
        (6, 2, TWO_ROLLOUTS),  # inside the third step: two micro-batches of it are done
        (2, 2, UNEVEN),
        (4, 3, {"methods": {"paced": {"use": "sampler", "smoothing": 0.5}}}),
    ],
    ids=str,
)
def test_a_reward_that_raises_loses_nothing(tmp_path: Path, at: int, step: int | None, kwargs: Any) -> None:
    whole = run(tmp_path / "whole", Shaky(0), **kwargs)
    with pytest.raises(RewardError, match="reward 'shaky' raised OSError: the judge is down"):
        run(tmp_path / "cut", Shaky(at), **kwargs)
    saved = checkpoints.last_whole(tmp_path / "cut")
    assert saved is not None
    found = checkpoints.step_of(Path(saved))
    assert found == step if step is not None else 0 < found < 6
    assert_same(whole, run(tmp_path / "cut", Shaky(0), resume=True, **kwargs), found + 1)


def test_it_can_fail_again(tmp_path: Path) -> None:
    """The first rollout after a resume has nothing new to save; later ones have."""
    whole = run(tmp_path / "whole", Shaky(0))
    for at, step in ((3, 2), (1, 2), (3, 4)):
        with pytest.raises(RewardError):
            run(tmp_path / "cut", Shaky(at), resume=step != 2 or at == 1)
        assert checkpoints.last_whole(tmp_path / "cut") == str(tmp_path / f"cut/checkpoint-{step}")
    assert_same(whole, run(tmp_path / "cut", Shaky(0), resume=True), 5)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(RewardError):
        run(tmp_path, Shaky(1))
    assert checkpoints.last_whole(tmp_path) is None


def test_a_nan_and_a_hang_end_the_same_way(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Shaky(0))
    said = {"is nan": "gave nan for row 0", "hangs": r"did not return within 0\.3 seconds \(reward_seconds\)"}
    for how, message in said.items():
        with pytest.raises(RewardError, match=f"reward 'shaky' {message}"):
            run(tmp_path / how, Shaky(3, how), reward_seconds=0.3)
        assert_same(whole, run(tmp_path / how, Shaky(0), resume=True), 3)


def test_an_asynchronous_reward(tmp_path: Path) -> None:
    def make(at: int) -> Any:
        inner = Shaky(at, "waits")

        async def shaky(completions: list, **kwargs: Any) -> list[float]:
            if inner.calls + 1 == at:
                await asyncio.sleep(60)
            return inner(completions)

        shaky.seen = 0  # type: ignore[attr-defined]
        return shaky

    whole = run(tmp_path / "whole", make(0), max_steps=1)
    with pytest.raises(RewardError, match=r"'shaky' did not return within 0\.3 seconds"):
        run(tmp_path / "cut", make(2), reward_seconds=0.3)
    assert checkpoints.last_whole(tmp_path / "cut") == str(tmp_path / "cut/checkpoint-1")
    assert_equal(weights(whole), weights(run(tmp_path / "cut", make(0), resume=True, max_steps=1)))


class Unreliable:
    """`annotate_first` whose endpoint is gone at the third batch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, requests: list) -> list:
        self.calls += 1
        if self.calls == 3:
            raise AnnotatorError("nobody answers")
        return annotate_first(requests)


unreliable = Unreliable()


def test_an_annotator_that_fails(tmp_path: Path) -> None:
    methods = {"trace": TRACE["trace"] | {"annotator": "tests.test_last_step.unreliable"}}
    unreliable.calls = -10
    whole = run(tmp_path / "whole", Shaky(0), methods=methods)
    unreliable.calls = 0
    with pytest.raises(AnnotatorError, match="nobody answers"):
        run(tmp_path / "cut", Shaky(0), methods=methods)
    assert checkpoints.last_whole(tmp_path / "cut") == str(tmp_path / "cut/checkpoint-2")
    assert_same(whole, run(tmp_path / "cut", Shaky(0), resume=True, methods=methods), 3)


@pytest.mark.parametrize(("at", "step"), [(4, 2), (12, 6)])
def test_an_evaluation_that_fails_is_made_up_for(tmp_path: Path, at: int, step: int) -> None:
    """Each second step has one, of two batches: calls 3, 4, 7, 8, 11, 12. It draws, so what follows depends on it."""
    kwargs: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 8,
        "max_steps": 6,
    }
    whole = run(tmp_path / "whole", Shaky(0), **kwargs)
    assert whole.reward_funcs[0].__wrapped__.calls == 12
    with pytest.raises(RewardError, match="the judge is down"):
        run(tmp_path / "cut", Shaky(at), **kwargs)
    assert checkpoints.last_whole(tmp_path / "cut") == str(tmp_path / f"cut/checkpoint-{step}")
    resumed = run(tmp_path / "cut", Shaky(0), resume=True, **kwargs)
    assert_same(whole, resumed, step)
    evaluated = [entry["step"] for entry in resumed.state.log_history if "eval_reward" in entry]
    assert evaluated == [2, 4, 6]


def test_a_full_disk_does_not_hide_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(RewardError, match="the judge is down") as caught:
        run(tmp_path, Shaky(3))
    assert "No space left" in caught.value.__notes__[0] and "no earlier checkpoint" in caught.value.__notes__[0]
    assert CheckpointError.__name__ not in caught.value.__notes__[0]


def test_state_is_remembered_as_it_was() -> None:
    state: dict[str, Any] = {"rates": torch.ones(3), "pool": {"rows": [1, 2], "at": (0.5, None)}, "kinds": {"a"}}
    kept = remembered(state)
    state["rates"].mul_(2)
    state["pool"]["rows"].append(3)
    state["kinds"].add("b")
    found = recalled(kept)
    assert found["pool"] == {"rows": [1, 2], "at": (0.5, None)} and found["kinds"] == {"a"}
    assert torch.equal(found["rates"], torch.ones(3))


def test_a_large_tensor_is_not_copied_and_not_trusted_once_written_to() -> None:
    large = torch.zeros(LARGE, dtype=torch.uint8)
    kept = remembered([large])
    assert isinstance(kept[0], Large) and recalled(kept)[0] is large
    large[0] = 1
    with pytest.raises(Overwritten):
        recalled(kept)


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_the_bound_is_a_time(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(PlanError, match=r"reward_seconds: .* must be above 0"):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), reward_seconds=seconds)
