"""Stop and resume equals not stopping, also inside a generation window; a broken checkpoint loses nothing."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig

import trl_ext
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import checkpoints
from trl_ext.checkpoints import CheckpointError

TRACE = {"action": "both", "annotator": "tests.tiny.annotate_first", "sync_every": 2, "clip": None}


def make(folder, lora=False, **kwargs):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "loss_type": "grpo"} | kwargs
    methods = settings.pop("methods", None)
    args = trl_ext.GRPOConfig(**grpo_args(str(folder), **settings), methods=methods)
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    return trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts(), peft_config=peft_config)


def train(folder, resume=None, **kwargs):
    trainer = make(folder, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"steps_per_generation": 2},
        {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 4},
        {"steps_per_generation": 2, "lora": True, "methods": {"trace": TRACE, "high_entropy": {}}},
        {"methods": {"trace": TRACE}},
    ],
    ids=str,
)
def test_resume_is_exact(tmp_path, stop, kwargs):
    whole = train(tmp_path / "whole", **kwargs)
    resumed = train(tmp_path / "again", resume=str(tmp_path / f"whole/checkpoint-{stop}"), **kwargs)
    assert_equal(weights(whole), weights(resumed))
    assert whole._step == resumed._step
    for first, second in zip(whole.plan.methods, resumed.plan.methods, strict=True):
        for key, value in first.state.items():
            assert torch.equal(value, second.state[key])


def test_resume_true_takes_the_newest_whole_checkpoint(tmp_path):
    whole = train(tmp_path)
    (tmp_path / "checkpoint-5/trainer_state.json").unlink()  # as a kill while writing leaves it
    (tmp_path / "checkpoint-4/trainer_state.json").write_text('{"global_st')
    assert checkpoints.last_whole(tmp_path) == str(tmp_path / "checkpoint-3")
    assert_equal(weights(whole), weights(train(tmp_path, resume=True)))


def test_a_run_that_was_killed_after_its_last_step_makes_no_more(tmp_path):
    """In the middle of an epoch: at its end transformers stops by itself."""
    whole = train(tmp_path / "whole", max_steps=3)
    assert whole.state.epoch % 1
    resumed = train(tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-3"), max_steps=3)
    assert resumed.state.global_step == 3 and resumed._step == whole._step
    assert_equal(weights(whole), weights(resumed))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(tmp_path, resume=True)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    original = trl_ext.GRPOTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step == 3:
            with open(os.path.join(folder, "optimizer.pt"), "wb") as half:
                half.write(b"half")
            raise OSError(28, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(CheckpointError, match=r"No space left.*resume from .*checkpoint-2.*Make room"):
        trainer.train()
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    assert_equal(weights(train(tmp_path, resume=True)), weights(train(tmp_path / "whole")))


@pytest.mark.parametrize(
    "saved, now", [({"trace": TRACE}, None), (None, {"trace": TRACE}), ({"trace": TRACE}, {"high_entropy": {}})]
)
def test_other_methods_than_the_checkpoints_are_refused(tmp_path, saved, now):
    train(tmp_path, methods=saved, max_steps=1)
    with pytest.raises(CheckpointError, match="Name the same methods"):
        train(tmp_path, methods=now, resume=True)


def test_teacher_is_in_the_checkpoint_but_not_in_the_adapter(tmp_path):
    trainer = train(tmp_path, methods={"trace": TRACE}, lora=True, max_steps=2)
    content = checkpoints.load(tmp_path / "checkpoint-2" / checkpoints.METHODS_FILE)
    assert content["names"] == ["trace"] and content["snapshots"]["teacher"].keys() == trainer._teacher.values.keys()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not [f for f in (tmp_path / "adapter").rglob("*") if "teacher" in f.name or f.name == "methods.pt"]


def test_save_only_model_writes_no_state(tmp_path):
    train(tmp_path, methods={"trace": TRACE}, max_steps=1, save_only_model=True)
    assert not (tmp_path / "checkpoint-1/methods.pt").exists()
    assert not (tmp_path / "checkpoint-1/rollout_0.pt").exists()


def test_buffer_is_saved_inside_a_window_only(tmp_path):
    train(tmp_path, steps_per_generation=2, max_steps=2)
    assert checkpoints.load(tmp_path / "checkpoint-1/rollout_0.pt")["buffer"] is not None
    assert checkpoints.load(tmp_path / "checkpoint-2/rollout_0.pt") == {"step": 2, "buffer": None, "rewards": []}


def test_loading_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "boom"),))

    torch.save({"names": Bomb()}, tmp_path / "methods.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoints.load(tmp_path / "methods.pt")
    assert not (tmp_path / "boom").exists()


def test_a_kill_while_saving_a_state_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoints.save(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, {"a": 2})
    assert checkpoints.load(path) == {"a": 1}


def test_model_card_names_the_methods(tmp_path):
    train(tmp_path, methods={"trace": TRACE}, max_steps=1)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Methods") == 1 and "2605.10194" in card and "`sync_every=2`" in card


def test_whole_needs_a_readable_state(tmp_path):
    assert not checkpoints.is_whole(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    assert checkpoints.is_whole(tmp_path)
    shutil.rmtree(tmp_path)
    assert not checkpoints.is_whole(tmp_path) and checkpoints.last_whole(tmp_path) is None
