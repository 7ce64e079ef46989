"""Losses over whole groups: the two-pass form has the gradient of the direct one, however rows are shuffled and split."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import trl_ext
from tests.test_services import Probe
from tests.tiny import grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import coupled, whole_groups
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError

FORWARDS: list[str] = []


def group_loss(s: torch.Tensor) -> torch.Tensor:
    """(P, G) -> (P,): couples all rows, the later the more."""
    factors = torch.linspace(-1, 2, s.size(1))
    return torch.log1p((factors * s * 3).exp().sum(1))


def score(logps, old, mask):
    """(B,) mean log-ratio."""
    old = logps.detach() if old is None else old
    return ((logps - old) * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class TwoPass(Probe):
    owns = ("surrogate",)

    def streams(self, rollout):
        return {"row": torch.arange(len(rollout.rows))}

    def coupled(self, rows):
        s = rows.by_group((rows.drift() * rows.mask).sum(1) / rows.mask.sum(1).clamp(min=1)).requires_grad_()
        with torch.enable_grad():
            loss = group_loss(s)
            (slope,) = torch.autograd.grad(loss.sum(), s)
        share = (loss.detach() / s.size(1)).unsqueeze(1).expand_as(s)
        assert torch.equal(rows.by_group(rows.own(slope)), slope)
        return {"slope": rows.own(slope), "share": rows.own(share), "again": rows.streams["row"]}

    def surrogate(self, x):
        assert torch.equal(x.streams["again"], x.streams["row"])
        s = score(x.logps, x.old_logps, x.mask)
        return x.run.num_generations * (x.streams["share"] + x.streams["slope"] * (s - s.detach())).mean()


@dataclass(frozen=True)
class Direct(Probe):
    """The same loss written down as it is, for micro-batches of whole groups."""

    owns = ("surrogate",)

    def streams(self, rollout):
        return {"row": torch.arange(len(rollout.rows))}

    def coupled(self, rows):
        return {}

    def surrogate(self, x):
        order = x.streams["row"].argsort()
        return group_loss(score(x.logps, x.old_logps, x.mask)[order].view(-1, x.run.num_generations)).mean()


@pytest.fixture
def train(tmp_path, monkeypatch):
    original = coupled.CoupledRows._current_logps

    def counted(self, batches):
        FORWARDS.extend("x" * len(batches))
        return original(self, batches)

    monkeypatch.setattr(coupled.CoupledRows, "_current_logps", counted)

    def run(cls, micro, accumulation, generation, **kwargs):
        FORWARDS.clear()
        monkeypatch.setitem(METHODS, "probe", cls)
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        sizes |= {"steps_per_generation": generation, "optim": "sgd", "learning_rate": 0.5, "max_steps": 4}
        args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **sizes | kwargs), methods="probe")
        trainer = trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
        trainer.train()
        return trainer

    return run


def assert_close(first, second):
    """Same weights and same logged losses."""
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=1e-4, atol=1e-6)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and losses[0][0] > 0.1


@pytest.mark.parametrize(
    ("sizes", "scope", "forwards"),
    [
        ((8, 1, 1), whole_groups.MICRO_BATCH, 0),
        ((4, 2, 2), whole_groups.MICRO_BATCH, 0),
        ((2, 4, 4), whole_groups.STEP, 0),
        ((1, 8, 8), whole_groups.STEP, 0),
    ],
)
def test_any_split_has_the_direct_gradient(train, sizes, scope, forwards):
    found = train(TwoPass, *sizes)
    assert found._couples() == scope and len(FORWARDS) == forwards
    assert_close(train(Direct, 8, 1, 1), found)


@pytest.mark.parametrize(("sizes", "forwards"), [((8, 1, 1), 0), ((2, 4, 4), 2 * 4)])
def test_a_second_pass_over_the_rollout(train, sizes, forwards):
    """The rows' scores have moved: one forward for each micro-batch of a step, where the loss's own does not do."""
    found = train(TwoPass, *sizes, num_iterations=2)
    assert len(FORWARDS) == forwards
    assert_close(train(Direct, 8, 1, 1, num_iterations=2), found)


def test_a_rollout_for_several_steps_is_cut_between_groups(train):
    assert_close(train(Direct, 4, 1, 2), train(TwoPass, 2, 2, 4))
    assert len(FORWARDS) == 2 * 2  # two rollouts, whose second step finds its two micro-batches moved


def test_without_moving_rows_the_whole_rollout_is_scored(train, monkeypatch):
    expected = train(Direct, 8, 1, 1, num_iterations=2)
    monkeypatch.setattr(whole_groups, "scope_of", lambda *args, **kwargs: whole_groups.ROLLOUT)
    assert_close(expected, train(TwoPass, 2, 4, 4, num_iterations=2))


def test_scopes():
    def scope(group, micro, generation, accumulation, can_move=True):
        return whole_groups.scope_of(group, micro, generation, accumulation, can_move)

    assert scope(4, 8, 1, 1) == scope(4, 4, 2, 8) == whole_groups.MICRO_BATCH
    assert scope(4, 2, 4, 2) == scope(4, 2, 2, 4) == scope(4, 2, 2, 2) == whole_groups.STEP
    assert scope(4, 1, 4, 2) == whole_groups.ROLLOUT  # half a group in a step
    assert scope(4, 2, 3, 2) == whole_groups.ROLLOUT  # groups lie on two processes
    assert scope(4, 2, 4, 3) == whole_groups.ROLLOUT  # steps and rollouts do not meet
    assert scope(4, 4, 2, 2, can_move=False) == whole_groups.ROLLOUT  # images


def test_rows_come_together_in_the_order_of_their_groups():
    def batch(ids, places, scalar):
        ids = torch.tensor(ids)
        return {
            whole_groups.ID: ids,
            "x": ids * 10 + torch.tensor(places),
            "names": [f"{i}" for i in ids],
            "n": scalar,
        }

    made = whole_groups.together([batch([2, 0, 1], [0, 0, 0], 5), batch([1, 2, 0], [1, 1, 1], 5)])
    assert [b["x"].tolist() for b in made] == [[20, 21, 0], [1, 10, 11]]
    assert [b["names"] for b in made] == [["2", "2", "0"], ["0", "1", "1"]] and made[1]["n"] == 5


def test_a_torn_group_is_refused():
    torn = {whole_groups.ID: torch.tensor([0, 0, 1]), whole_groups.PLACE: torch.tensor([0, 1, 0])}
    with pytest.raises(ValueError, match="3 rows of 2 groups are not whole groups of 2"):
        whole_groups.arranged([torn], 2, None)


def test_a_method_that_drops_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "probe", TwoPass)
    with pytest.raises(PlanError, match="probe's loss needs whole groups, d3s drops rows"):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods=["probe", "d3s"])


def test_a_run_stopped_within_a_rollout_goes_on_alike(train, tmp_path, monkeypatch):
    kwargs = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    whole = train(TwoPass, 2, 4, 4, **kwargs)
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **_sizes(whole), **kwargs), methods="probe")
    again = trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value), name


def _sizes(trainer):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "max_steps")
    return {name: getattr(trainer.args, name) for name in (*names, "optim", "learning_rate")}
