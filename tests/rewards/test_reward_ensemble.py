"""The reward `reward_ensemble`: functions, models and adapters as members, in stock TRL, with what it logs."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.rewards import ensemble_worker
from tests.tiny import grpo_args, letters_reward, prompts, tiny_path
from trl_ext.recipe import load_recipe
from trl_ext.rewards import RewardError, make_reward
from trl_ext.rewards.checked import columns_of
from trl_ext.rewards.reward_ensemble import make_reward_ensemble
from trl_ext.rewards.reward_models import AdapterScorer, ModelScorer, Scoring

CPU = Scoring(device="cpu")
PROMPTS = [[{"role": "user", "content": text}] for text in ("1 + 1 =", "1 + 1 =", "a longer question?")]
REPLIES = [[{"role": "assistant", "content": text}] for text in ("2", "it is two, I think", "")]


@functools.cache
def reward_model(seed: int) -> str:
    """A saved sequence-classification model with one output."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_path(), num_labels=1)
    model.score.weight.data.normal_()
    return saved(model)


def saved(model: object) -> str:
    folder = tempfile.mkdtemp(prefix="rm-")
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)
    return folder


@functools.cache
def adapter(seed: int, base: str) -> str:
    """A saved LoRA adapter with its own head, all weights random."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.base_model.model.score.modules_to_save["default"].weight.data.normal_()
    return saved(wrapped)


def alone(path: str, base: str) -> torch.Tensor:
    """(B,) scores of one adapter on a backbone of its own, one text at a time: no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, path).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
        ids = tokenizer.apply_chat_template(prompt + reply, return_tensors="pt", return_dict=False)
        found.append(model(input_ids=ids).logits[0, 0].item())
    return torch.tensor(found)


def one(completions: list, **kwargs: object) -> list[float]:
    return [1.0, 2.0, 3.0][: len(completions)]


def three(completions: list, **kwargs: object) -> list[float | None]:
    return [3.0, None, 3.0][: len(completions)]


# Functions as members


def test_functions_are_combined_and_what_is_seen_is_logged() -> None:
    logged: dict[str, float] = {}
    reward = make_reward("reward_ensemble", {"rewards": [one, "tests.rewards.test_reward_ensemble.three"]})
    found = reward(prompts=list("abc"), completions=list("abc"), log_metric=logged.__setitem__)
    assert found == [2.0 - 0.5 * 1.0, 2.0, 3.0]
    assert logged == {
        "reward_ensemble/mean": pytest.approx(7 / 3),
        "reward_ensemble/std": pytest.approx(1 / 3),
        "reward_ensemble/min": 2.0,
        "reward_ensemble/combined": pytest.approx(6.5 / 3),
        "reward_ensemble/gap": pytest.approx(0.5 / 3),
        "reward_ensemble/lowest_differs": 0.0,
    }
    assert reward(prompts=list("ab"), completions=list("ab")) == [1.5, 2.0], "no log_metric outside of TRL"
    wco = make_reward("reward_ensemble", {"rewards": [one, three], "objective": "wco"})
    assert wco(prompts=list("abc"), completions=list("abc")) == [1.0, 2.0, 3.0]


def test_a_completion_that_no_member_scores_is_none_and_columns_are_declared() -> None:
    reward = make_reward("reward_ensemble", {"rewards": ["math_correct", "answer_correct"], "objective": "mean"})
    assert columns_of(reward) == [("answer", "solution"), ("answer",)]
    both = make_reward_ensemble([three, three])
    assert both(prompts=list("ab"), completions=list("ab")) == [3.0, None]


def test_running_z_puts_members_on_one_scale() -> None:
    def large(completions: list, **kwargs: object) -> list[float]:
        return [1000.0 * len(c) for c in completions]

    def small(completions: list, **kwargs: object) -> list[float]:
        return [-0.001 * len(c) for c in completions]

    reward = make_reward_ensemble([large, small], objective="wco", normalize="running_z")
    # lengths 1, 3: z is -1, 1 for one member and 1, -1 for the other; the minimum is -1 for both
    assert reward(prompts=["p"] * 2, completions=["a", "aaa"]) == pytest.approx([-1, -1])
    # lengths 1, 3, 5, 7 so far: mean 4, deviation sqrt 5
    assert reward(prompts=["p"] * 2, completions=["a" * 5, "a" * 7]) == pytest.approx([-1 / 5**0.5, -3 / 5**0.5])


def test_group_z_works_in_runs_of_equal_prompts_and_not_with_a_minimum_in_tiny_groups() -> None:
    ask, values = ["p"] * 2 + ["q"] * 2, [0.0, 2.0, 10.0, 30.0]
    reward = make_reward_ensemble([lambda completions, **_: values] * 2, normalize="group_z")
    z = [
        -1 / (math.sqrt(2) + 1e-4),
        1 / (math.sqrt(2) + 1e-4),
        -10 / (math.sqrt(200) + 1e-4),
        10 / (math.sqrt(200) + 1e-4),
    ]
    assert reward(prompts=ask, completions=list("abcd")) == pytest.approx(z, abs=1e-6)
    strict = make_reward_ensemble([letters_reward] * 2, objective="wco", normalize="group_z")
    with pytest.raises(ValueError, match="groups of at least 8 completions, here is one of 7"):
        strict(prompts=["p"] * 8 + ["q"] * 7, completions=["a"] * 15)
    assert strict(prompts=["p"] * 8, completions=["a"] * 8) == [0.0] * 8


def test_group_z_in_training_tells_neighbouring_groups_of_one_prompt_apart() -> None:
    """TRL's groups have one size; outside of TRL a run of equal prompts is a group of any size."""
    values = [0.0, 2.0, 10.0, 12.0, 5.0, 9.0]
    reward = make_reward_ensemble([lambda completions, **_: values[: len(completions)]] * 2, normalize="group_z")
    one = 1 / (math.sqrt(2) + 1e-4)
    last = 2 / (math.sqrt(8) + 1e-4)
    found = reward(prompts=["p"] * 4 + ["q"] * 2, completions=["a"] * 6, trainer_state=None)
    assert found == pytest.approx([-one, one, -one, one, -last, last], abs=1e-6)
    by_hand = torch.tensor(values[:4]) - 6
    by_hand = by_hand / (by_hand.square().sum().div(3).sqrt() + 1e-4)
    found = reward(prompts=["p"] * 4 + ["q"] * 2, completions=["a"] * 6)
    assert found == pytest.approx([*by_hand.tolist(), -last, last], abs=1e-6)
    with pytest.raises(ValueError, match="needs whole groups, here are 3, 2 completions of one prompt each"):
        reward(prompts=["p"] * 3 + ["q"] * 2, completions=["a"] * 5, trainer_state=None)
    with pytest.raises(ValueError, match=r"groups of at least 2 completions, here is one of 1; raise num_generations"):
        reward(prompts=["p"] * 2 + ["q"], completions=["a"] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ["json_valid"]}, "at least two members"),
        ({"rewards": "json_valid"}, "rewards: expected a list"),
        ({"models": ["a"], "adapters": "b"}, "adapters: expected a list"),
        ({"models": ["a", "b"], "backbone": "c"}, "belongs to `adapters`"),
        ({"rewards": [one, one], "batch_size": 2}, "batch_size: for `models` and `adapters`"),
        ({"models": ["a", "b"], "batch_size": 0}, "must be at least 1"),
        ({"models": ["a", "b"], "dtype": "half-ish"}, "neither auto nor a torch type"),
        ({"rewards": [one, one], "objective": "min"}, "'min' is not one of"),
        ({"rewards": [one, one], "objective": "mean", "variance_weight": 1.0}, "objective mean does not have it"),
        ({"rewards": [one, one], "soft_alpha": 1.0}, "objective uwo does not have it"),
        ({"rewards": [one, one], "variance_weight": -1.0}, "variance_weight >= 0"),
        ({"rewards": [one, one], "ddof": 2}, "ddof 0 or 1"),
        ({"rewards": [one, one], "normalize": "z"}, "'z' is not one of none, group_z, running_z"),
        ({"rewards": ["nothing", one]}, "unknown reward 'nothing'"),
    ],
)
def test_settings_that_do_not_belong_together(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reward("reward_ensemble", settings)


def test_a_member_that_gives_nonsense_is_named() -> None:
    reward = make_reward("reward_ensemble", {"rewards": [lambda completions, **_: [math.nan], one]})
    with pytest.raises(RewardError, match="'<lambda>' gave nan"):
        reward(prompts=["p"], completions=["a"])


# Models as members


def test_adapters_on_one_backbone_equal_models_loaded_one_by_one() -> None:
    base = tiny_path()
    paths = tuple(adapter(seed, base) for seed in (1, 2, 3))
    scorer = AdapterScorer(paths, None, CPU)
    found = scorer(PROMPTS, REPLIES)
    torch.testing.assert_close(found, torch.stack([alone(path, base) for path in paths]), rtol=1e-4, atol=1e-5)
    assert len({round(v, 3) for v in found[:, 0].tolist()}) == 3, "the members differ"
    model, _ = scorer.loaded
    backbones = [n for n, _ in model.named_parameters() if "embed_tokens" in n and "lora" not in n]
    assert len(backbones) == 1, "the backbone is there once"
    small = AdapterScorer(paths, base, Scoring(batch_size=1, device="cpu"))
    torch.testing.assert_close(small(PROMPTS, REPLIES), found, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad and not any(p.requires_grad for p in model.parameters())


def test_an_adapter_without_a_head_is_refused() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_path(), num_labels=1)
    bare = saved(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])))
    weights = load_file(f"{bare}/adapter_model.safetensors")
    save_file({n: w for n, w in weights.items() if "score" not in n}, f"{bare}/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lack score.weight, so that its scores would be random"):
        AdapterScorer((bare, bare), None, CPU)(PROMPTS, REPLIES)


def test_models_and_adapters_that_would_score_at_random_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lack score.weight, so that its scores would be random"):
        ModelScorer(tiny_path(), CPU)(PROMPTS, REPLIES)
    base = tiny_path()
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    headless = saved(get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type=None)))
    with pytest.raises(ValueError, match="its task is None, a reward model's is SEQ_CLS"):
        AdapterScorer((headless, headless), base, CPU)(PROMPTS, REPLIES)
    both = (adapter(1, base), adapter(1, reward_model(5)))
    with pytest.raises(ValueError, match="name different backbones"):
        AdapterScorer(both, None, CPU)(PROMPTS, REPLIES)


def test_long_texts_are_cut_at_the_end() -> None:
    scorer = ModelScorer(reward_model(5), Scoring(max_length=30, device="cpu"))
    long = [[{"role": "assistant", "content": "2" * n}] for n in (100, 100_000)]
    found = scorer(PROMPTS[:2], long)[0]
    assert found[0] == found[1]


# In stock TRL


def test_an_ensemble_of_one_model_twice_is_trls_reward_model(tmp_path: object) -> None:
    path, logs = reward_model(5), []
    ensemble = make_reward("reward_ensemble", {"models": [path, path], "device": "cpu", "batch_size": 3})
    for reward in (ensemble, path):
        args = trl.GRPOConfig(**grpo_args(f"{tmp_path}/{len(logs)}", max_steps=2, seed=3))
        trainer = trl.GRPOTrainer(tiny_path(), reward, args, prompts())
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "reward" in entry])
    for ours, theirs in zip(*logs, strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-5)
        assert ours["reward_std"] == pytest.approx(theirs["reward_std"], abs=1e-5)
        assert ours["reward_ensemble/gap"] == pytest.approx(0, abs=1e-6)
        assert ours["reward_ensemble/mean"] == pytest.approx(ours["reward"], abs=1e-5)


def test_a_recipe_names_adapters_and_is_planned_without_loading_them() -> None:
    spec = '{"reward_ensemble": {"adapters": ["org/a", "org/b"], "objective": "wco", "normalize": "running_z"}}'
    recipe = load_recipe("sandbox_grpo", ["--rewards", spec])
    assert recipe.reward_names == ["reward_ensemble"]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """running_z over all scores, and group_z where a group lies on both."""
    root = Path(__file__).parents[2]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.rewards.ensemble_worker",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for normalize in ("running_z", "group_z"):
        together = ensemble_worker.score(0, 1, normalize)
        for one, two, expected in zip(first[normalize], second[normalize], together, strict=True):
            assert one + two == pytest.approx(expected, abs=1e-6)
