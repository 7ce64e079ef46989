"""pgpo: the card's worked example, its limits and invariants, what is hidden, and training with text and images."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

import trl_ext
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, tiny_tokenizer, weights
from tests.tiny_vlm import NO_VISION, image_prompts, tiny_processor, tiny_vlm_path
from trl_ext import memory
from trl_ext.annotate import token_offsets
from trl_ext.data import load_data
from trl_ext.method import HIDE_PROMPT, POLICY, Setup
from trl_ext.methods.grpo.pgpo import (
    Pgpo,
    dependency,
    exact_dependency,
    gate,
    matches,
    places,
    relative,
    token_weights,
    user_text,
)
from trl_ext.plan import PlanError
from trl_ext.recipe import load_recipe
from trl_ext.sandbox import dataset, ensure_model

LOGPS = torch.tensor([[-0.10, -0.50, -1.20, -0.05, -0.30, -0.80]])
BLIND = torch.tensor([[-0.12, -2.50, -1.00, -0.05, -1.10, -4.00]])
ONES = torch.ones(1, 6)
DIGITS = {"pattern": "[0-9]+ \\+ [0-9]+"}


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=atol)


def test_worked_example():
    scores = dependency(LOGPS, BLIND)
    close(scores, [0.000199, 1.135335, 0.021403, 0.000000, 0.249329, 2.240762])
    close(torch.log1p(scores), [0.000199, 0.758624, 0.021177, 0.000000, 0.222607, 1.175809])
    importance, alike = relative(scores, ONES)
    close(importance, [0.000169, 0.645193, 0.018011, 0.000000, 0.189322, 1.000000])
    close(gate(importance, 0.4, 2.0), [0.000422, 1.817311, 0.045026, 0.000000, 0.473305, 3.000000])
    found = token_weights(scores, ONES, 0.4, 2.0)
    close(found, [0.000475, 2.043428, 0.050629, 0.000000, 0.532196, 3.373272])
    close(-0.7 * found, [-0.000332, -1.430400, -0.035440, 0.000000, -0.372537, -2.361291])
    assert not alike.any() and found.sum().item() == pytest.approx(6, abs=1e-6)


def random_scores(rows=20, width=9):
    scores = torch.rand(rows, width).pow(3) * 4
    mask = (torch.arange(width) < torch.randint(1, width + 1, (rows, 1))).float()
    return scores, mask


@pytest.mark.parametrize("threshold, boost", [(0.4, 2.0), (0.2, 1.0), (0.6, 0.0), (0.0, 2.0), (1.0, 2.0)])
def test_mass_sign_and_bounds(threshold, boost):
    scores, mask = random_scores()
    found = token_weights(scores, mask, threshold, boost)
    count = mask.sum(1)
    torch.testing.assert_close((found * mask).sum(1), count, rtol=1e-5, atol=1e-5)
    raw = (gate(relative(scores, mask)[0], threshold, boost) * mask).sum(1)
    assert bool((found >= 0).all())
    several = count > 1
    top = (found * mask).amax(1)[several]
    assert bool((top <= ((1 + boost) * count / raw)[several] * 1.0001).all())


def test_weights_follow_the_dependency():
    scores, mask = random_scores(rows=50)
    found = token_weights(scores, mask, 0.4, 2.0)
    for s, w, m in zip(scores, found, mask.bool(), strict=True):
        ordered = w[m][s[m].argsort()]
        assert bool((ordered.diff() >= -1e-6).all()), "not decreasing in S"
        if int(m.sum()) > 1:
            assert ordered[0] == 0, "the least dependent token gets exactly 0"


def test_two_tokens():
    assert token_weights(torch.tensor([[0.1, 0.9]]), torch.ones(1, 2), 0.4, 2.0).tolist() == [[0.0, 2.0]]


def test_limits():
    """tau = 1: suppression only; tau = 0: boost only; both off: 1 everywhere; without Eq. 7: w itself."""
    scores = dependency(LOGPS, BLIND)
    importance, _ = relative(scores, ONES)
    raw = token_weights(scores, ONES, 1.0, 2.0, conserve=False)
    torch.testing.assert_close(raw[:, :5], importance[:, :5])
    boosted = token_weights(scores, ONES, 0.0, 2.0, conserve=False)
    torch.testing.assert_close(boosted, 1 + 2 * importance)
    assert torch.equal(token_weights(scores, ONES, 0.0, 0.0), ONES)
    close(token_weights(scores, ONES, 0.4, 2.0, conserve=False), [0.000422, 1.817311, 0.045026, 0, 0.473305, 3.0])


def test_gate_is_continuous():
    below, above = gate(torch.tensor([0.4 - 1e-6, 0.4]), 0.4, 2.0)
    assert below.item() == pytest.approx(above.item(), abs=1e-5) == pytest.approx(1, abs=1e-5)


def test_degenerate_rows_get_one():
    """All alike (noise of float32 included), one token, none, and no evidence: 0/0 in Eq. 7."""
    scores = torch.tensor([[0.3, 0.3, 0.3], [1e-12, 3e-13, 0.0], [5.0, 0.1, 0.2], [0.5, 0.1, 0.9], [0.0, 1.0, 2.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).float()
    shown = torch.tensor([False, False, False, False, True])
    assert torch.equal(token_weights(scores, mask, 0.4, 2.0, True, shown), torch.ones(5, 3))


def test_padding_changes_nothing():
    """Neither padding nor tool output in the middle enters minimum, maximum, sum or count."""
    scores = dependency(LOGPS, BLIND)
    wide = torch.cat([scores[:, :2], torch.tensor([[99.0]]), scores[:, 2:], torch.zeros(1, 3)], 1)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 0, 0]]).float()
    found = token_weights(wide, mask, 0.4, 2.0)
    torch.testing.assert_close(found[mask.bool()], token_weights(scores, ONES, 0.4, 2.0)[0])


def test_large_ratios_stay_finite():
    scores = dependency(torch.tensor([[-90.0, -0.1]]), torch.tensor([[-0.1, -90.0]]))
    torch.testing.assert_close(scores, torch.tensor([[math.exp(20) - 21, math.exp(-20) + 19]]))


def test_sampled_estimate_is_unbiased():
    """Card: the mean of S over samples of one position approaches the exact KL."""
    log_p, log_q = torch.randn(2, 1, 7).log_softmax(-1)
    exact = exact_dependency(log_p, log_q)
    expected = (log_p.exp() * dependency(log_p, log_q)).sum(-1)  # over all outcomes: no sampling noise
    torch.testing.assert_close(expected, exact)
    assert exact.item() == pytest.approx(torch.nn.functional.kl_div(log_q[0], log_p[0].exp(), reduction="sum").item())


# What is hidden

TEXT = "user\nSam has 3 pens. Ann has 3 cups. How many pens?assistant\n"
CONTENT = "Sam has 3 pens. Ann has 3 cups. How many pens?"


@pytest.mark.parametrize(
    "evidence, expected",
    [
        ("Ann has 3 cups.", ["Ann has 3 cups."]),
        ("3", ["3", "3"]),
        (["3 cups", "Sam"], ["3 cups", "Sam"]),
        ([0, 15], ["Sam has 3 pens."]),
        ([[0, 3], [16, 19]], ["Sam", "Ann"]),
        ([[0, 3], "cups"], ["Sam", "cups"]),
        (None, []),
        ("", []),
        ([], []),
    ],
)
def test_places(evidence, expected):
    assert [TEXT[a:b] for a, b in places(TEXT, evidence, CONTENT)] == expected


@pytest.mark.parametrize(
    "evidence, content, words",
    [
        ("Tom", CONTENT, "'Tom' does not stand in the prompt"),
        ([0, 99], CONTENT, "no span"),
        ([5, 5], CONTENT, "no span"),
        (7, CONTENT, "expected a text, a span"),
        ([[0, 3], 7.5], CONTENT, "expected a text, a span"),
        ([0, 3], "Sam  has", "give the evidence as text"),
    ],
)
def test_evidence_that_is_not_there(evidence, content, words):
    with pytest.raises(ValueError, match=words):
        places(TEXT, evidence, content)


def test_pattern():
    assert [TEXT[a:b] for a, b in matches(TEXT, "[0-9] \\w+")] == ["3 pens", "3 cups"]
    with pytest.raises(ValueError, match="does not match"):
        matches(TEXT, "[0-9]{5}")


def test_user_text():
    blocks = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert user_text("plain") == "plain"
    assert user_text([{"role": "user", "content": "no"}, {"role": "user", "content": blocks}]) == "ab"


# Training


def train(folder, methods, data=None, cls=trl_ext.GRPOTrainer, config=trl_ext.GRPOConfig, resume=None, **kwargs):
    extra = {"methods": methods} if config is trl_ext.GRPOConfig else {}
    args = config(**grpo_args(str(folder), **kwargs), **extra)
    trainer = cls(tiny_path(), letters_reward, args, prompts() if data is None else data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def seen(monkeypatch):
    """What the method got and gave in each micro-batch: (LossInput, its weights)."""
    found = []
    original = Pgpo.token_weights

    def spy(self, weights_in, x):
        if x.logps.requires_grad:
            x.logps.retain_grad()
        found.append((x, original(self, weights_in, x)))
        return found[-1][1]

    monkeypatch.setattr(Pgpo, "token_weights", spy)
    return found


def with_evidence(evidence):
    rows = prompts()
    return rows.add_column("evidence", [evidence(row["prompt"][0]["content"]) for row in rows])


@pytest.mark.parametrize(
    "settings, evidence, expected",
    [
        ({"pattern": "[0-9]+ \\+"}, lambda text: text, lambda text: text.split("+")[0] + "+"),
        ({"evidence": "evidence"}, lambda text: text.split("=")[0].strip(), lambda text: text.split("=")[0].strip()),
        ({"evidence": "evidence"}, lambda text: [0, 1], lambda text: text[0]),
    ],
)
def test_the_tokens_that_are_hidden(tmp_path, monkeypatch, settings, evidence, expected):
    original, found = Pgpo.hidden, []

    def spy(self, rollout):
        hide = original(self, rollout)
        texts = [tiny_tokenizer().decode(ids[mask]) for ids, mask in zip(rollout.prompt_ids, hide, strict=True)]
        found.extend(zip(texts, [row["prompt"][0]["content"] for row in rollout.rows], strict=True))
        return hide

    monkeypatch.setattr(Pgpo, "hidden", spy)
    train(tmp_path, {"pgpo": settings}, with_evidence(evidence), max_steps=1)
    assert len(found) == 8 and all(text == expected(content) for text, content in found)


def test_a_token_that_holds_a_part_is_hidden():
    ids, decode = [0, 1, 2], {0: "12", 1: "34", 2: "56"}.get
    offsets = token_offsets(ids, decode, "123456")
    assert [any(max(a, x) < min(b, y) for x, y in [(3, 4)]) for a, b in offsets] == [False, True, False]


def test_rows_that_name_nothing_keep_weight_one(tmp_path, seen):
    rows = prompts()
    first = set(rows["answer"][:8])
    data = rows.add_column("evidence", [None if a in first else "=" for a in rows["answer"]])
    trainer = train(tmp_path, {"pgpo": {"evidence": "evidence"}}, data)
    shown = torch.cat([x.streams["shown"] for x, _ in seen])
    found = torch.cat([w for _, w in seen])
    assert 0 < shown.sum() < len(shown) and bool((found[shown] == 1).all()) and bool((found[~shown] != 1).any())
    logged = [entry["pgpo/degenerate_rows"] for entry in trainer.state.log_history[:3]]
    assert sum(logged) / 3 == pytest.approx(shown.float().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    "settings, data, words",
    [
        ({"evidence": "proof"}, prompts, "no column 'proof' .it has: prompt, answer"),
        ({"pattern": "zzz"}, prompts, "row 0 of the rollout: the pattern 'zzz' does not match"),
        ({"evidence": "evidence"}, lambda: with_evidence(lambda text: "zzz"), "row 0 .*'zzz' does not stand"),
    ],
)
def test_evidence_that_cannot_be_found_is_an_error(tmp_path, settings, data, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, {"pgpo": settings}, data())


def test_weights_come_from_the_policy_that_sampled(tmp_path, seen):
    """With two passes over a rollout both use the same S: log-probs with and without evidence at its start."""
    train(tmp_path, {"pgpo": DIGITS}, num_iterations=2, max_steps=4)
    (first, first_weights), (second, second_weights) = seen[:2]
    assert torch.equal(first.completion_ids, second.completion_ids) and torch.equal(first_weights, second_weights)
    assert not torch.allclose(first.logps, second.logps, atol=1e-3), "the policy has moved in between"
    expected = token_weights(dependency(first.old_logps, first.streams["blind"]), first.mask.float(), 0.4, 2.0)
    assert torch.equal(first_weights, expected)
    assert not torch.equal(seen[2][1], first_weights)


def test_weights_carry_no_gradient(tmp_path, seen):
    """The gradient on the log-probs is that of the clipped loss with A_i w~ as a constant: -A_i w~ / tokens."""
    train(tmp_path, {"pgpo": DIGITS}, max_steps=1, loss_type="bnpo")
    x, found = seen[0]
    assert not found.requires_grad
    expected = -x.advantages.unsqueeze(1) * found * x.mask / x.mask.sum()
    torch.testing.assert_close(x.logps.grad, expected)
    zero = (found == 0) & x.mask.bool()
    assert zero.any() and bool((x.logps.grad[zero] == 0).all())


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_accumulation_does_not_matter(tmp_path, estimator, loss_type):
    settings = {"pgpo": DIGITS | {"estimator": estimator}}
    one = weights(train(tmp_path, settings, max_steps=2, loss_type=loss_type))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    many = weights(train(tmp_path, settings, max_steps=2, loss_type=loss_type, **split))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"beta": 0.1, "num_iterations": 2, "loss_type": "grpo"}], ids=str)
def test_neutral_setting_is_trl(tmp_path, lora, kwargs):
    peft = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    found = []
    for cls, config, extra in (
        (trl.GRPOTrainer, trl.GRPOConfig, {}),
        (trl_ext.GRPOTrainer, trl_ext.GRPOConfig, {"methods": {"pgpo": {"threshold": 0, "boost": 0} | DIGITS}}),
    ):
        args = config(**grpo_args(str(tmp_path), **kwargs), **extra)
        trainer = cls(tiny_path(), letters_reward, args, prompts(), peft_config=peft)
        trainer.train()
        found.append(weights(trainer))
    assert_equal(*found)


def test_resume_inside_a_generation_window(tmp_path):
    kwargs = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "a", {"pgpo": DIGITS}, **kwargs)
    again = train(tmp_path / "b", {"pgpo": DIGITS}, resume=str(tmp_path / "a/checkpoint-1"), **kwargs)
    assert_equal(weights(whole), weights(again))


def test_metrics(tmp_path, seen):
    """Each logged number against the slow way."""
    entry = train(tmp_path, {"pgpo": DIGITS}, max_steps=1).state.log_history[0]
    x, found = seen[0]
    mask, scores = x.mask.bool(), dependency(x.logps, x.streams["blind"])
    rows = range(8)
    importance, shares = [], []
    for i in rows:
        s = torch.log1p(scores[i][mask[i]])
        part = (s - s.min()) / (s.max() - s.min() + 1e-8)
        importance.append(part)
        shares.append((part >= 0.4).float())
    expected = {
        "dependency": scores[mask].mean(),
        "dependency_squashed": torch.log1p(scores[mask]).mean(),
        "dependency_max": sum(scores[i][mask[i]].max() for i in rows) / 8,
        "dependency_squashed_max": sum(torch.log1p(scores[i][mask[i]]).max() for i in rows) / 8,
        "importance": torch.cat(importance).mean(),
        "above_threshold": torch.cat(shares).mean(),
        "weight_max": sum(found[i][mask[i]].max() for i in rows) / 8,
        "degenerate_rows": 0.0,
    }
    lengths = [len(row["prompt"][0]["content"]) - 2 for row in prompts()]  # without " ="
    assert min(lengths) <= entry["pgpo/hidden_tokens"] <= max(lengths)
    for name, value in expected.items():
        assert entry[f"pgpo/{name}"] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_exact_is_the_full_kl(tmp_path, seen, monkeypatch):
    """Against KL from all log-probs of both forwards, at the sampling temperature."""
    kept = []
    original = Pgpo.streams

    def spy(self, rollout):
        hide = self.hidden(rollout)
        every = torch.ones_like(rollout.mask).bool()
        p, q = (rollout.other(POLICY, **extra).log_probs_at(every) for extra in ({}, {"hide": hide}))
        kept.append((p.exp() * (p - q)).sum(-1).view_as(rollout.mask))
        found = original(self, rollout)
        torch.testing.assert_close(found["dependency"], kept[-1] * rollout.mask, rtol=1e-4, atol=1e-6)
        return found

    monkeypatch.setattr(Pgpo, "streams", spy)
    train(tmp_path, {"pgpo": DIGITS | {"estimator": "exact"}}, max_steps=1, temperature=0.7)
    assert len(kept) == 1 and kept[0].max() > 0.01
    assert "blind" not in seen[0][0].streams


@pytest.mark.parametrize(
    "peft", [None, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"])], ids=["full", "lora"]
)
def test_images(tmp_path, seen, peft):
    """Two steps with images: image tokens are hidden, the weights average 1, and training differs from plain GRPO."""

    def run(methods):
        args = trl_ext.GRPOConfig(
            **grpo_args(str(tmp_path), max_steps=2, generation_kwargs=NO_VISION, beta=0.1), methods=methods
        )
        trainer = trl_ext.GRPOTrainer(
            tiny_vlm_path(),
            letters_reward,
            args,
            image_prompts(),
            processing_class=tiny_processor(),
            peft_config=peft,
        )
        trainer.train()
        return trainer

    trainer = run("pgpo")
    assert len(seen) == 2
    for x, found in seen:
        torch.testing.assert_close((found * x.mask).sum(1), x.mask.sum(1).float(), rtol=1e-5, atol=1e-5)
    entry = trainer.state.log_history[0]
    assert 4 <= entry["pgpo/hidden_tokens"] <= 6, "2 x 2, 3 x 2 or 2 x 3 tokens"
    assert entry["pgpo/dependency"] > 0.01
    plain = weights(run(None))
    assert any(not torch.equal(value, plain[name]) for name, value in weights(trainer).items())


EQUATION = re.compile(r"(\d+)([+*-])(\d+)=\d+")


def reads_the_prompt(text):
    """Characters of a sandbox reply that come from the problem: both numbers of the first equation, then one each.

    What follows from the reply itself is left out: results, results that the next equation starts from, the answer.
    """
    found = list(EQUATION.finditer(text))
    return [(m.start(1 if i == 0 else 2), m.end(3)) for i, m in enumerate(found)]


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_numbers_of_the_problem_depend_on_it(tmp_path, seen, estimator):
    """Card: on a small model the tokens that need the hidden span have the larger S. Measured: four times as large."""
    recipe = load_recipe("sandbox_pgpo")
    settings = recipe.raw["methods"]["pgpo"] | {"estimator": estimator}
    size = {"per_device_train_batch_size": 64, "num_generations": 8, "max_completion_length": 64, "max_steps": 1}
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **size), methods={"pgpo": settings})
    data = dataset("math", n=64, seed=0)
    trainer = trl_ext.GRPOTrainer(ensure_model(), list(recipe.rewards), args, data)
    trainer.train()
    (x, found), tokenizer = seen[0], trainer._tokenizer
    scores = x.streams["dependency"] if estimator == "exact" else dependency(x.logps, x.streams["blind"])
    reading = torch.zeros_like(x.mask, dtype=torch.bool)
    for i, row in enumerate(x.completion_ids):
        ids = row[x.mask[i].bool()].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        spans = reads_the_prompt(text)
        for t, (a, b) in enumerate(token_offsets(ids, trainer.decode_one, text)):
            reading[i, t] = any(max(a, s) < min(b, e) for s, e in spans)
    other = x.mask.bool() & ~reading
    assert 0.1 < reading.float().sum() / x.mask.sum() < 0.5
    assert scores[reading].mean() > 3 * scores[other].mean()
    assert found[reading].mean() > 2 * found[other].mean(), "so they get more of the advantage"


@pytest.mark.parametrize(
    "settings, kwargs, words",
    [
        (DIGITS, {"importance_sampling_level": "sequence"}, "importance_sampling_level: token"),
        (DIGITS | {"evidence": "x"}, {}, "name only one of them"),
        ({"pattern": "("}, {}, "is not a regular expression"),
        ({"threshold": 1.5}, {}, "must be <= 1"),
    ],
)
def test_clashes_name_the_flag(tmp_path, settings, kwargs, words):
    with pytest.raises(PlanError, match=words):
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods={"pgpo": settings})


@pytest.mark.parametrize("order", [("pgpo", "velocity_rank"), ("velocity_rank", "pgpo")], ids="+".join)
def test_a_bonus_at_the_last_token_is_refused(tmp_path, order):
    def config(pgpo, bonus_on):
        settings = {"pgpo": pgpo, "velocity_rank": {"bonus_on": bonus_on}}
        trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods={name: settings[name] for name in order})

    with pytest.raises(PlanError, match="set velocity_rank's bonus_on: response"):
        config(DIGITS, "last_token")
    config(DIGITS, "response")
    config(DIGITS | {"threshold": 0, "boost": 0}, "last_token")


def test_a_text_model_needs_evidence(tmp_path):
    with pytest.raises(PlanError, match="this model takes none; name what to hide"):
        train(tmp_path, "pgpo")
    assert Pgpo().check(Setup(None, images=True)) == Pgpo().check(Setup(None)) == []


# The recipe for a real model

CARD = {
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "num_generations": 5,
    "max_completion_length": 2048,
    "num_train_epochs": 2,
    "reward_weights": [0.9, 0.1],
    "lr_scheduler_type": "constant",
}
REAL = "recipes/pgpo_qwen2.5_vl_3b.yaml"


def real(*overrides):
    device = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    return load_recipe(str(Path(__file__).parents[2] / REAL), [*device, *overrides])


def test_recipe_has_the_cards_values():
    recipe = real()
    args = recipe.training_args
    assert {key: getattr(args, key) for key in CARD} == CARD
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128 * 5
    assert args.gradient_accumulation_steps % args.steps_per_generation == 0, "every rollout is on policy"
    (method,) = recipe.plan.methods
    assert method == Pgpo() and method.needs() == {HIDE_PROMPT}
    assert (method.threshold, method.boost, method.evidence, method.pattern) == (0.4, 2.0, None, None)


@pytest.mark.parametrize("tokens, gib", [(512, 24), (2048, 48)])
def test_recipe_fits(tokens, gib):
    """Text and image of a prompt together."""
    assert memory.predict(real("--max_prompt_tokens", str(tokens))).fits(gib) == []


def test_recipe_reads_its_data_and_trains(tmp_path, monkeypatch):
    """The preparation that the recipe's comment shows, on rows of our own, then one step of the tiny model."""
    folder = tmp_path / "virl39k"
    folder.mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (16, 16 + 8 * (i % 2)), (30 * i, 0, 0)).save(folder / f"{i}.png")
        rows.append(
            {"question": f"<image>\nHow red is {i}?", "answer": f"\\boxed{{{i}}}", "image": [f"{i}.png"], "qid": "x"}
        )
    Dataset.from_list(rows).to_parquet(folder / "all.parquet")
    monkeypatch.chdir(tmp_path)
    comment = (Path(__file__).parents[2] / REAL).read_text().split("themselves:\n")[1].split("# A picture")[0]
    exec("\n".join(line.removeprefix("#   ") for line in comment.splitlines()), {})
    recipe = real("--per_device_train_batch_size", "10", "--gradient_accumulation_steps", "1", "--max_steps", "1")
    data = load_data(recipe).train
    assert data[1]["prompt"][0]["content"].startswith("How red is 1?\n\nThink first") and data[1]["images"][
        0
    ].size == (16, 24)
    args = trl_ext.GRPOConfig(
        **grpo_args(str(tmp_path), max_steps=1, generation_kwargs=NO_VISION)
        | {"per_device_train_batch_size": 10, "num_generations": 5, "steps_per_generation": 1},
        methods=recipe.raw["methods"],
        reward_weights=[0.9, 0.1],
    )
    trainer = trl_ext.GRPOTrainer(tiny_vlm_path(), list(recipe.rewards), args, data, processing_class=tiny_processor())
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["pgpo/hidden_tokens"] >= 4 and entry["rewards/math_correct/mean"] == 0.0
