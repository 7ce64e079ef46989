"""dgpo: the card's worked example, its limits and invariants, and its weights inside real training. Card: dgpo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import trl_ext
from tests.methods.training import make, train
from tests.parity.test_grpo import assert_same
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext.forward import Head, per_position_detached
from trl_ext.method import HIDDEN, REFERENCE, Method
from trl_ext.methods import METHODS
from trl_ext.methods.grpo.dgpo import Dgpo, distance_and_entropy, hellinger, mean_one_weights, token_scores
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

POLICY = torch.tensor([[2.0, 0, 0, -1], [0.5, 0.4, 0.3, 0], [4.0, 0, 0, 0]]).log_softmax(-1)
REF = torch.tensor([[2.0, 0, 0, -1], [1.5, -0.5, 0, 0], [0, 4.0, 0, 0]]).log_softmax(-1)
ALL = torch.ones(1, 3)


def worked(kappa, mask=ALL):
    distance, entropy = distance_and_entropy(POLICY, REF).unbind(-1)
    return mean_one_weights(token_scores(distance, entropy, 4, kappa).unsqueeze(0), mask, 0.5)[0].tolist()


# The card's numbers


def test_worked_example_distance_and_entropy():
    distance, entropy = distance_and_entropy(POLICY, REF).unbind(-1)
    assert distance.tolist() == pytest.approx([0, 0.065245, 0.708704], abs=1e-6)
    assert entropy.tolist() == pytest.approx([0.801056, 1.370413, 0.261830], abs=1e-6)
    assert (entropy / math.log(4)).tolist() == pytest.approx([0.577840, 0.988544, 0.188871], abs=1e-6)
    assert token_scores(distance, entropy, 4, 1.0).tolist() == pytest.approx([0, 0.064497, 0.133853], abs=1e-6)


@pytest.mark.parametrize(
    "kappa, weight, advantage",
    [
        (1.0, [0.870916, 0.990827, 1.138256], [-0.696733, -0.792662, -0.910605]),
        (0.0, [0.478790, 0.545526, 1.975684], [-0.383032, -0.436421, -1.580547]),
    ],
)
def test_worked_example_weights(kappa, weight, advantage):
    assert worked(kappa) == pytest.approx(weight, abs=1e-6)
    assert [-0.8 * w for w in worked(kappa)] == pytest.approx(advantage, abs=1e-6)


def test_worked_example_third_token_masked():
    assert worked(1.0, torch.tensor([[1.0, 1.0, 0.0]])) == pytest.approx([0.935592, 1.064408, 0], abs=1e-6)


def test_effect_size_of_the_card():
    """V = 151,936, 1 nat, d = 0.05: s = 0.004191 and, against a score of 0, a weight 0.8% larger."""
    score = token_scores(torch.tensor(0.05), torch.tensor(1.0), 151_936, 1.0)
    assert score.item() == pytest.approx(0.004191, abs=1e-6)
    assert math.exp(score.item() / 0.5) - 1 == pytest.approx(0.0084, abs=1e-4)


# Limits and invariants


def test_distance_is_bounded_symmetric_and_zero_for_equals():
    p, q = torch.randn(50, 7).log_softmax(-1), (3 * torch.randn(50, 7)).log_softmax(-1)
    slow = [
        1 - sum(math.sqrt(a * b) for a, b in zip(x, y, strict=True)) for x, y in zip(p.exp(), q.exp(), strict=True)
    ]
    assert hellinger(p, q).tolist() == pytest.approx(slow, abs=1e-6)
    assert torch.equal(hellinger(p, q), hellinger(q, p))
    assert bool((hellinger(p, p) < 1e-6).all()) and bool((hellinger(p, q) <= 1).all())
    disjoint = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert hellinger(*disjoint).item() == 1.0


def test_weights_have_mean_one_and_bounds():
    scores, mask = torch.rand(6, 9), (torch.rand(6, 9) > 0.3).float()
    mask[0] = 0
    for tau in (0.05, 0.5, 1.0):
        found = mean_one_weights(scores, mask, tau)
        count = mask.sum(1)
        torch.testing.assert_close(found.sum(1), count)  # so sum_t w A = T A
        assert bool((found[mask == 0] == 0).all()) and bool((found[mask > 0] > 0).all())  # the sign of A is kept
        for row, keep in zip(found[1:], mask[1:].bool(), strict=True):
            assert row[keep].max() / row[keep].min() <= math.exp(1 / tau) * (1 + 1e-5)
        assert bool((found <= count.unsqueeze(1) * (1 + 1e-6)).all())
    assert math.exp(1 / 0.5) == pytest.approx(7.389056, abs=1e-6)


def test_weights_grow_with_the_score_and_level_out_with_tau():
    scores = torch.tensor([[0.0, 0.2, 0.5, 0.9]])
    found = mean_one_weights(scores, torch.ones(1, 4), 0.5)[0]
    assert found.tolist() == sorted(found.tolist()) and found[0] < found[-1]
    torch.testing.assert_close(mean_one_weights(scores, torch.ones(1, 4), 1e6), torch.ones(1, 4), atol=1e-5, rtol=0)


def test_kappa_lowers_confident_deviations():
    """Uniform keeps its whole distance (h = 1); a confident token loses more the larger kappa is."""
    confident = torch.tensor([0.1])
    shares = [token_scores(torch.tensor([0.7]), confident, 4, kappa).item() for kappa in (0.0, 0.5, 1.0, 2.0)]
    assert shares[0] == pytest.approx(0.7) and shares == sorted(shares, reverse=True) and shares[3] < 0.01
    assert token_scores(torch.tensor([0.7]), torch.tensor([math.log(4)]), 4, 2.0).item() == pytest.approx(0.7)


def test_blocks_are_one_block_and_small():
    """Eleven positions in blocks of two: the same values, and never more than the budget is projected at once."""
    widest = []

    class Watched(Head):
        def log_probs(self, hidden):
            widest.append(hidden.size(0) * 7)
            return super().log_probs(hidden)

    sides = [(Watched(torch.randn(7, 4), None, 0.7, None, 1.0, False), torch.randn(11, 4)) for _ in range(2)]
    whole = per_position_detached(distance_and_entropy, sides)
    widest.clear()
    torch.testing.assert_close(per_position_detached(distance_and_entropy, sides, budget=14), whole)
    assert max(widest) == 14 and whole.shape == (11, 2)
    assert per_position_detached(hellinger, [(head, states[:0]) for head, states in sides]).shape == (0,)


# In the trainer


@pytest.fixture
def recorded(monkeypatch):
    """(weights that came in, loss input, weights that went out) of every micro-batch."""
    seen = []
    original = Dgpo.token_weights

    def record(self, weights, x):
        out = original(self, weights, x)
        seen.append((weights, x, out))
        return out

    monkeypatch.setattr(Dgpo, "token_weights", record)
    return seen


@pytest.mark.parametrize("lora", [False, True])
def test_distance_is_to_the_starting_model(tmp_path, monkeypatch, lora):
    """At step 2 against the slow way: all logits of the trained and of the starting model."""
    found = []
    original = Dgpo._distance

    def spy(self, x):
        found.append(original(self, x))
        if x.step == 2:
            trainer = running[0]
            ids, mask = inputs[-1]
            trained = trainer._unwrapped()
            with torch.no_grad(), torch.random.fork_rng():
                both = [m(input_ids=ids, attention_mask=mask).logits[:, -7:-1] for m in (trained, start)]
            expected.append(1 - (both[0].softmax(-1) * both[1].softmax(-1)).sqrt().sum(-1))
        return found[-1]

    inputs, expected, running = [], [], []
    loss_input = trl_ext.GRPOTrainer._loss_input

    def keep(self, batch, forward, features):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        inputs.append((ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)))
        return loss_input(self, batch, forward, features)

    monkeypatch.setattr(trl_ext.GRPOTrainer, "_loss_input", keep)
    monkeypatch.setattr(Dgpo, "_distance", spy)
    start = AutoModelForCausalLM.from_pretrained(tiny_path()).eval()
    running.append(make(tmp_path, "dgpo", lora=lora))
    running[0].train()
    assert running[0].beta == 0 and running[0].ref_model is None
    completed = inputs[2][1][:, -6:].bool()
    torch.testing.assert_close(found[2][completed], expected[0][completed], rtol=1e-3, atol=1e-5)
    assert found[0].max() < 1e-6 and found[2].max() > 1e-3, "it starts at the reference and moves away"


def trained_adapter():
    """A model with an adapter that already does something."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_path())
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("policy", ["current", "rollout"])
def test_distance_is_to_the_adapter_that_trains_on(tmp_path, policy):
    """Passed in as a PeftModel: at step 0 d = 0, though the bare base is far; a resumed run keeps that start."""
    model, ids = trained_adapter(), torch.arange(40, 60).unsqueeze(0)
    with torch.no_grad():
        adapted = model(ids).logits[0].log_softmax(-1)
        with model.disable_adapter():
            bare = model(ids).logits[0].log_softmax(-1)
    assert hellinger(adapted, bare).max() > 1e-2

    def run(folder, resume=None):
        kwargs = {"loss_type": "grpo", "save_strategy": "steps", "save_steps": 1}
        methods = {"dgpo": {"tau": 0.05, "policy": policy}}
        args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path / folder), **kwargs), methods=methods)
        trainer = trl_ext.GRPOTrainer(trained_adapter(), letters_reward, args, prompts())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    log = whole.state.log_history
    assert "ref" not in whole.model.peft_config
    assert log[0]["dgpo/d_max"] < 1e-6 < 1e-4 < log[2]["dgpo/d_max"]
    again = run("again", resume=str(tmp_path / "whole/checkpoint-2"))
    assert_equal(weights(again), weights(whole))


def test_first_step_is_grpo(tmp_path):
    """d = 0, so w = 1: one step from the start is plain GRPO's up to rounding."""
    with_dgpo, without = (weights(train(tmp_path, m, max_steps=1)) for m in ("dgpo", None))
    for name, value in without.items():
        torch.testing.assert_close(with_dgpo[name], value, rtol=1e-4, atol=1e-6)


def test_neutral_setting_is_not_refused(tmp_path):
    kwargs = {"beta": 0.1, "importance_sampling_level": "sequence", "top_entropy_quantile": 0.5}
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"dgpo": {"tau": math.inf}})
    assert args.methods == {"dgpo": {"tau": math.inf}}


@pytest.mark.parametrize("lora", [False, True])
def test_neutral_setting_is_trl(tmp_path, lora):
    assert_same(tmp_path, lora, {"dgpo": {"tau": math.inf}}, loss_type="grpo")
    assert Dgpo(tau=math.inf).needs() == frozenset() and Dgpo().needs() == {HIDDEN, REFERENCE}


def test_weights_carry_no_gradient(tmp_path, monkeypatch, recorded):
    """Training with the recorded weights given as constants is the same training, bit for bit."""
    ours = weights(train(tmp_path, {"dgpo": {"tau": 0.05}}))
    replay = iter([out for _, _, out in recorded])
    assert not any(out.requires_grad for _, _, out in recorded)
    assert max(float(out.max()) for _, _, out in recorded) > 1.5

    @dataclass(frozen=True)
    class Constant(Method):
        name = "constant"
        title = paper = "none"

        def token_weights(self, weights, x):
            return weights * next(replay)

    monkeypatch.setitem(METHODS, "constant", Constant)
    assert_equal(weights(train(tmp_path, "constant")), ours)


def test_accumulation_does_not_matter(tmp_path):
    one = train(tmp_path, {"dgpo": {"tau": 0.05}})
    eight = train(tmp_path, {"dgpo": {"tau": 0.05}}, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(eight)[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("settings", [{"tau": 0.05}, {"tau": 0.05, "policy": "rollout"}])
@pytest.mark.parametrize("lora", [False, True])
def test_resume_is_exact(tmp_path, settings, lora):
    """The reference of a resumed run is the starting model, not the checkpoint."""
    kwargs = {"lora": lora, "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    whole = train(tmp_path / "whole", {"dgpo": settings}, **kwargs)
    checkpoint = str(tmp_path / "whole/checkpoint-3")  # inside a generation window
    assert_equal(weights(train(tmp_path / "again", {"dgpo": settings}, resume=checkpoint, **kwargs)), weights(whole))


def test_policy_of_the_rollout_is_frozen(tmp_path, recorded):
    """Two updates per rollout: recomputed, the weights move with the second; frozen, they do not."""
    kwargs = {"num_iterations": 2, "max_steps": 4}
    train(tmp_path, {"dgpo": {"tau": 0.05}}, **kwargs)
    current = [out for _, _, out in recorded]
    recorded.clear()
    train(tmp_path, {"dgpo": {"tau": 0.05, "policy": "rollout"}}, **kwargs)
    frozen = [out for _, _, out in recorded]
    assert not torch.allclose(current[2], current[3], atol=1e-3) and torch.equal(frozen[2], frozen[3])
    torch.testing.assert_close(frozen[0], current[0], rtol=0, atol=1e-5)  # step 0: d = 0 in both


def test_high_entropy_first_then_mean_one_over_kept(tmp_path, recorded):
    train(tmp_path, {"high_entropy": {"quantile": 0.5, "normalizer": "all"}, "dgpo": {"tau": 0.05}})
    for keep, x, out in recorded:
        assert set(keep.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(out.sum(1), (keep * x.mask).sum(1))
        assert bool((out[keep == 0] == 0).all())
    with pytest.raises(PlanError, match="name high_entropy before dgpo"):
        make(tmp_path, {"dgpo": {}, "high_entropy": {}})


def test_metrics(tmp_path, monkeypatch, recorded):
    """Each logged number against a mean taken by hand over the recorded tensors of step 2."""
    found = []
    original = Dgpo._distance
    monkeypatch.setattr(Dgpo, "_distance", lambda self, x: found.append(original(self, x)) or found[-1])
    trainer = train(tmp_path, {"dgpo": {"tau": 0.05}})
    entry, (_, x, out), distance = trainer.state.log_history[2], recorded[2], found[2]
    valid, vocab = x.mask.bool(), trainer.model.config.vocab_size
    rows = [(out[i][valid[i]], distance[i][valid[i]]) for i in range(8)]
    expected = {
        "d_mean": float(distance[valid].mean()),
        "d_max": sum(float(d.max()) for _, d in rows) / 8,
        "h_mean": float(x.entropy[valid].detach().mean()) / math.log(vocab),
        "weight_max": sum(float(w.max()) for w, _ in rows) / 8,
        "weight_std": sum(float(w.std(correction=0)) for w, _ in rows) / 8,
    }
    assert {name: entry[f"dgpo/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert entry["dgpo/d_mean"] > trainer.state.log_history[1]["dgpo/d_mean"] > 1e-3  # the drift


def test_4_bit_base(tmp_path):
    """As in the recipe: the reference is the 4-bit base with the adapter off."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), loss_type="grpo"), methods="dgpo")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = trl_ext.GRPOTrainer(
        tiny_path(), letters_reward, args, prompts(), peft_config=lora, quantization_config=nf4
    )
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["dgpo/d_max"] < 1e-5 < 1e-4 < log[2]["dgpo/d_max"] and trainer._reference is None


def test_recipe_for_a_real_model():
    """The card's method and clip, and 256 completions per update, every rollout on policy."""
    recipe = load_recipe(
        str(RECIPES / "dgpo_qwen2.5_32b.yaml"), [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    )
    args = recipe.training_args
    assert recipe.plan.methods == (Dgpo(),)
    assert (args.epsilon, args.beta, args.weight_decay, args.loss_type) == (0.2, 0.0, 0.1, "grpo")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    assert args.gradient_accumulation_steps % args.steps_per_generation == 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"beta": 0.1}, "set beta: 0.0"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: token"),
        ({"loss_type": "vespo"}, "loss_type: grpo"),
        ({"top_entropy_quantile": 0.5}, "name high_entropy before dgpo"),
        ({"methods": {"dgpo": {"tau": 0}}}, "tau: 0.0 must be > 0"),
        ({"methods": {"dgpo": {"policy": "rolout"}}}, "did you mean 'rollout'"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **{"methods": "dgpo"} | settings))
