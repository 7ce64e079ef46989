"""high_entropy: the card's worked example, its limits, and its gradient. Card: high_entropy."""

from __future__ import annotations

import pytest
import torch
import trl

import trl_ext
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import ops
from trl_ext.methods.grpo.high_entropy import HighEntropy, high_entropy_mask, kept_weights, linear_quantile
from trl_ext.plan import PlanError

H = torch.tensor([[0.1, 2.0, 0.5, 0.0], [1.0, 0.2, 0.9, 7.0]])  # 7.0 is padding
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
LOSS = torch.tensor([[0.3, -0.5, 0.2, 0.1], [0.4, 0.6, -0.2, 9.0]])


def keep_of(selection, quantile=0.8, lowest=False):
    valid = MASK.bool()
    return torch.zeros_like(H).masked_scatter(valid, high_entropy_mask(H[valid], quantile, selection, lowest).float())


def total(loss_type, per_token):
    return float(
        ops.aggregate(
            per_token, MASK, loss_type, num_items=MASK.sum(), steps_per_generation=1, max_completion_length=4
        )
    )


@pytest.mark.parametrize("selection", ["topk", "quantile"])
def test_worked_example_keeps_two_tokens(selection):
    assert keep_of(selection).nonzero().tolist() == [[0, 1], [1, 0]]


def test_worked_example_threshold():
    assert linear_quantile(H[MASK.bool()], 0.8).item() == pytest.approx(0.98, abs=1e-6)


@pytest.mark.parametrize("loss_type, expected", [("bnpo", -0.014286), ("dapo", -0.014286), ("grpo", 0.004167)])
def test_worked_example_all(loss_type, expected):
    assert total(loss_type, LOSS * keep_of("topk")) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_worked_example_kept(loss_type):
    """Official token mean: (-0.5 + 0.4) / 2; 'kept' = 'all' times n / kept = 7 / 2."""
    weight = kept_weights(keep_of("topk"), MASK, loss_type, torch.tensor([[3.5]]))
    assert total(loss_type, LOSS * weight) == pytest.approx(-0.05, abs=1e-6)
    assert total(loss_type, LOSS * weight) == pytest.approx(3.5 * total(loss_type, LOSS * keep_of("topk")), abs=1e-7)


def test_sequence_mean_counts_kept_tokens_of_each_row():
    """Rows keep one token each: (-0.5 / 1 + 0.4 / 1) / 2."""
    weight = kept_weights(keep_of("topk"), MASK, "grpo", torch.ones(1))
    assert total("grpo", LOSS * weight) == pytest.approx(-0.05, abs=1e-6)


def test_counts_of_both_rules():
    """Card: rho 0.9, n 5: TRL 4, official 5; one high entropy and nine ties: TRL 10, official 2."""
    five = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    assert high_entropy_mask(five, 0.1, "quantile").sum() == 4
    assert high_entropy_mask(five, 0.1, "topk").sum() == 5
    ties = torch.tensor([1.0] + [0.0] * 9)
    assert high_entropy_mask(ties, 0.8, "quantile").sum() == 10
    assert high_entropy_mask(ties, 0.8, "topk").sum() == 2


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.8, 0.99])
def test_quantile_is_torch_quantile(n, quantile):
    values = torch.rand(n)
    assert linear_quantile(values, quantile).item() == pytest.approx(torch.quantile(values, quantile).item(), abs=1e-6)


def test_kept_are_above_dropped_and_sets_grow():
    entropy = torch.rand(200)
    smaller = torch.zeros(200, dtype=torch.bool)
    for quantile in (0.99, 0.9, 0.5, 0.1, 0.0):
        kept = high_entropy_mask(entropy, quantile)
        assert bool((kept | ~smaller).all()), "a larger share must only add tokens"
        assert kept.all() or entropy[kept].min() >= entropy[~kept].max()
        smaller = kept
    assert smaller.all()


def test_lowest_is_the_other_end():
    entropy = torch.arange(10.0)
    assert high_entropy_mask(entropy, 0.8, lowest=True).nonzero().flatten().tolist() == [0, 1]
    assert high_entropy_mask(entropy, 0.8, "quantile", lowest=True).nonzero().flatten().tolist() == [0, 1]


def test_no_tokens():
    assert high_entropy_mask(torch.zeros(0), 0.8).shape == (0,)


def train(tmp_path, cls=trl_ext.GRPOTrainer, config=trl_ext.GRPOConfig, steps=3, **kwargs):
    args = config(**grpo_args(str(tmp_path), max_steps=steps, **kwargs))
    trainer = cls(tiny_path(), letters_reward, args, prompts())
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo"])
def test_all_and_quantile_is_trls_option(tmp_path, loss_type):
    """With TRL's normaliser and rule, TRL's `top_entropy_quantile` is the same training."""
    ours = {"high_entropy": {"normalizer": "all", "selection": "quantile", "quantile": 0.8}}
    first = train(tmp_path, loss_type=loss_type, beta=0.1, methods=ours)
    second = train(
        tmp_path, trl.GRPOTrainer, trl.GRPOConfig, loss_type=loss_type, beta=0.1, top_entropy_quantile=1 - 0.8
    )
    for name, value in weights(second).items():
        torch.testing.assert_close(weights(first)[name], value, rtol=1e-4, atol=2e-6)


def test_dropped_tokens_get_no_gradient(tmp_path, monkeypatch):
    """The gradient of the whole loss on the sampled log-probs is exactly 0 at dropped positions, not 0 at kept ones."""
    seen = {}
    original = trl_ext.GRPOTrainer._loss_input

    def spy(self, inputs, forward, features):
        forward[0].retain_grad()
        seen["logps"], seen["x"] = forward[0], original(self, inputs, forward, features)
        return seen["x"]

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_loss_input", spy)
    train(tmp_path, steps=1, methods="high_entropy")
    keep, grad = seen["x"].scratch["high_entropy"]["keep"].bool(), seen["logps"].grad
    assert keep.sum() == 10  # ceil(0.2 * 48)
    assert not keep.requires_grad and bool((grad[~keep] == 0).all())
    learns = keep & (seen["x"].advantages != 0).unsqueeze(1)  # a group without variance teaches nothing
    assert learns.any() and bool((grad[learns] != 0).all())


def test_generation_batch_scope_does_not_depend_on_the_split(tmp_path):
    """Ranked at rollout time, one micro-batch of 8 is the same as 8 of 1; ranked per micro-batch it is not."""
    runs = {}
    for scope in ("generation_batch", "micro_batch"):
        for size in (8, 1):
            trainer = train(
                tmp_path,
                steps=2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                methods={"high_entropy": {"scope": scope}},
            )
            runs[scope, size] = torch.cat([p.flatten() for p in weights(trainer).values()])
    torch.testing.assert_close(runs["generation_batch", 8], runs["generation_batch", 1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(runs["micro_batch", 8], runs["micro_batch", 1], rtol=1e-3, atol=1e-5)


def test_metrics_and_summary(tmp_path):
    trainer = train(tmp_path, methods="high_entropy")
    entry = trainer.state.log_history[0]
    assert entry["high_entropy/kept_fraction"] == pytest.approx(10 / 48, abs=1e-6)
    assert (
        entry["high_entropy/entropy_kept"] >= entry["high_entropy/threshold"] > entry["high_entropy/entropy_dropped"]
    )
    (method,) = trainer.plan.methods
    assert method.state["kept_counts"].sum() == 30  # 3 steps of 10 tokens
    assert method.summary(trainer.decode_one)[0].startswith("most frequent kept tokens: '")


def test_inverted_mask_trains_the_other_tokens(tmp_path):
    entry = train(tmp_path, steps=1, methods={"high_entropy": {"lowest": True}}).state.log_history[0]
    assert entry["high_entropy/entropy_kept"] < entry["high_entropy/entropy_dropped"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: token"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"loss_type": "luspo"}, "normalizer: all"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **settings), methods="high_entropy")


def test_neutral_hook_hands_its_input_back():
    weights_in = torch.ones(2, 3)
    assert HighEntropy(quantile=0).token_weights(weights_in, None) is weights_in


def test_two_runs_are_the_same(tmp_path):
    assert_equal(weights(train(tmp_path, methods="high_entropy")), weights(train(tmp_path, methods="high_entropy")))
