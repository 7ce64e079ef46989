"""Recipes: TRL's YAML unchanged, overrides, every problem at once with its key, and the resolved form."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import trl
import yaml
from trl.scripts.grpo import GRPOScriptArguments

from trl_ext.recipe import RecipeError, find_recipe, load_recipe, without_secrets
from trl_ext.settings import read_overrides, read_yaml

SHIPPED = [  # pipelines are planned in tests/loops/test_stages.py
    path
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if "\nstages:" not in path.read_text()
]
BASE = {
    "model_name_or_path": "somewhere",
    "dataset_name": "sandbox/math",
    "rewards": ["answer_correct"],
    "bf16": False,
    "activation_checkpointing": False,
}


def write(tmp_path: Path, **keys: object) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BASE | keys))
    return str(path)


def problems(tmp_path: Path, *overrides: str, **keys: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, **keys), overrides)
    return caught.value.problems


TRL_YAML = """
env: {TRL_EXT_TEST_VARIABLE: 7}
model_name_or_path: Qwen/Qwen3-0.6B
dtype: bfloat16
use_peft: true
lora_target_modules: [q_proj, v_proj]
dataset_name: trl-lib/tldr
reward_funcs: [think_format_reward, get_soft_overlong_punishment]
learning_rate: 1e-5
beta: 0
bf16: false
scale_rewards: false
gradient_checkpointing: false
per_device_train_batch_size: 4
num_generations: 4
num_train_epochs: 1
eval_strategy: 'no'
save_strategy: steps
save_steps: 0.25
lr_scheduler_type: cosine
lr_scheduler_kwargs: {num_cycles: 0.4}
reward_weights: [1, 0.5]
chat_template_kwargs: '{"enable_thinking": false}'
report_to: none
output_dir: here
"""


def test_a_trl_yaml_gives_what_trls_own_parser_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRL_EXT_TEST_VARIABLE", raising=False)
    path = tmp_path / "trl.yaml"
    path.write_text(TRL_YAML)
    recipe = load_recipe(str(path))
    assert os.environ["TRL_EXT_TEST_VARIABLE"] == "7"
    types = (GRPOScriptArguments, trl.GRPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    script, args, model, mixture = trl.TrlParser(types).parse_args_and_config(["--config", str(path)])
    ours = recipe.training_args.to_dict()
    assert {key: ours[key] for key in args.to_dict()} == args.to_dict()
    assert dataclasses.asdict(recipe.model_args) == dataclasses.asdict(model)
    assert dataclasses.asdict(recipe.script_args) == dataclasses.asdict(script)
    assert dataclasses.asdict(recipe.dataset_args) == dataclasses.asdict(mixture)
    assert recipe.reward_names == ["think_format_reward", "soft_overlong_punishment_reward"]


def test_values_get_the_type_of_their_field(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, learning_rate="1e-6", save_strategy=False, model_init_kwargs={"a": 1}, reward_weights=["0.5"])
    )
    args = recipe.training_args
    assert args.learning_rate == 1e-6
    assert args.save_strategy == "no", "a bare `no` is false in YAML"
    assert args.model_init_kwargs == {"a": 1}
    assert args.reward_weights == [0.5]


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, methods=["high_entropy"], log_completions=True)
    words = [
        "--max-steps",
        "3",
        "--learning_rate=2e-3",
        "--no_log_completions",
        "--use_peft",
        "--reward_weights",
        "0.25",
    ]
    words += ["--methods.trace.weight", "0.3", "--methods.trace.clip", "none", "--methods.trace.annotator", "sandbox"]
    words += ["--lora_target_modules", "q_proj", "v_proj", "--chat_template_kwargs", '{"x": true}']
    recipe = load_recipe(path, words)
    args = recipe.training_args
    assert (args.max_steps, args.learning_rate, args.log_completions) == (3, 2e-3, False)
    assert args.reward_weights == [0.25]
    assert recipe.model_args.use_peft and recipe.model_args.lora_target_modules == ["q_proj", "v_proj"]
    assert args.chat_template_kwargs == {"x": True}
    assert [m.name for m in recipe.plan.methods] == ["high_entropy", "trace"]
    trace = recipe.plan.methods[1]
    assert (trace.weight, trace.clip, trace.annotator) == (0.3, None, "sandbox")


def test_a_dotted_key_alone_switches_a_method_or_a_reward_on(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["--methods.high_entropy", "--rewards.json_valid"])
    assert [m.name for m in recipe.plan.methods] == ["high_entropy"]
    assert recipe.reward_names == ["answer_correct", "json_valid"]


def test_read_overrides_by_hand() -> None:
    assert read_overrides(["--a", "1", "--b", "--c.d", "none", "--e", "x", "y", "--f=-1"]) == [
        (["a"], "1"),
        (["b"], True),
        (["c", "d"], "none"),
        (["e"], ["x", "y"]),
        (["f"], "-1"),
    ]
    with pytest.raises(ValueError, match="'1' belongs to no key"):
        read_overrides(["1"])


def test_all_problems_at_once_with_file_key_and_suggestion(tmp_path: Path) -> None:
    keys = {"learning_rat": 1, "lora_r": "many", "methods": {"tracee": None, "high_entropy": {"quantil": 1}}}
    with pytest.raises(RecipeError, match=r"mine\.yaml cannot run") as caught:
        load_recipe(write(tmp_path, rewards=["answer_corect"], loss_type="dappo", **keys))
    text = str(caught.value)
    for part in (
        "unknown key 'learning_rat', did you mean 'learning_rate'?",
        "lora_r: expected int, got 'many'",
        "loss_type: 'dappo' is not one of",
        "unknown reward 'answer_corect', did you mean 'answer_correct'?",
        "unknown method 'tracee', did you mean 'trace'?",
        "unknown setting 'quantil', did you mean 'quantile'?",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"save_strategy": "stepz"},
            "save_strategy: 'stepz' is not one of no, steps, epoch, best, did you mean 'steps'?",
        ),
        ({"dtype": "bf16"}, "dtype: 'bf16' is not one of auto, bfloat16, float16, float32"),
        ({"use_peft": "maybe"}, "use_peft: expected bool, got 'maybe'"),
        ({"max_steps": 1.5}, "max_steps: expected int, got 1.5"),
        ({"chat_template_kwargs": "{x"}, "chat_template_kwargs: not valid JSON"),
        ({"trainer": "grop"}, "trainer: 'grop' is not one of grpo, dpo, kto, sft, did you mean 'grpo'?"),
        ({"rewards": None}, "rewards: name at least one reward"),
        ({"rewards": 3}, "rewards: expected a name, a list of names or a mapping"),
        (
            {"rewards": {"math_correct": {"second": 1}}},
            "rewards: math_correct: got an unexpected keyword argument 'second'",
        ),
        ({"rewards": ["no_module_x.f"]}, "rewards: no_module_x.f: cannot import 'no_module_x.f'"),
        ({"reward_funcs": ["answer_correct"]}, "rewards: two rewards are called 'answer_correct'"),
        ({"reward_weights": [1, 2]}, "reward_weights: 2 weights for 1 rewards"),
        ({"model_name_or_path": None}, "model_name_or_path: name a model"),
        ({"dataset_name": None}, "dataset_name: name a data set"),
        ({"datasets": [{"path": "x"}]}, "dataset_name and datasets are both set"),
        ({"dataset_name": None, "datasets": [{"pth": "x"}]}, "datasets[0]: unknown key 'pth', did you mean 'path'?"),
        ({"dataset_name": "x", "dataset_options": {"n": 1}}, "dataset_options: belongs to the sandbox's data sets"),
        ({"dataset_name": "x", "eval_rows": 5}, "eval_rows: nothing is evaluated"),
        ({"dataset_streaming": True}, "max_steps: a stream has no length"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens: 0 must be at least 1"),
        ({"load_in_4bit": True}, "set use_peft: true to train an adapter"),
        ({"methods": {"trace": {"coverage": 1.5}}}, "methods: trace: coverage: 1.5 must be <= 1"),
        ({"num_generations": 1}, "num_generations 1: an advantage compares"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_one_bad_value(tmp_path: Path, keys: dict, message: str) -> None:
    assert any(message in problem for problem in problems(tmp_path, **keys)), problems(tmp_path, **keys)


def test_a_group_that_does_not_fit_names_the_nearest_sizes(tmp_path: Path) -> None:
    keys = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "num_generations": 4}
    (problem,) = problems(tmp_path, **keys)
    assert "6 x one process x steps_per_generation 1 = 6 completions per rollout" in problem
    assert "4 or 8 for per_device_train_batch_size, or 3 or 6 for num_generations" in problem


def test_dpo_keys_are_not_grpo_keys(tmp_path: Path) -> None:
    found = problems(tmp_path, trainer="dpo", num_generations=4)
    assert any(p.startswith("unknown key 'num_generations'") for p in found)
    assert any(p.startswith("rewards: the dpo trainer") for p in found)
    recipe = load_recipe(
        write(tmp_path, trainer="dpo", rewards=None, loss_type=["sigmoid"], dataset_name="sandbox/preferences")
    )
    assert recipe.trainer == "dpo" and recipe.training_args.loss_type == ["sigmoid"]


def test_a_loss_may_be_a_methods_own(tmp_path: Path) -> None:
    keys = {"rewards": None, "dataset_name": "sandbox/preferences", "methods": {"bco": {"shift": "none"}}}
    dpo = load_recipe(write(tmp_path, trainer="dpo", loss_type=["sigmoid", "bco"], loss_weights=[0.8, 0.2], **keys))
    assert dpo.training_args.loss_type == ["sigmoid", "bco"] and dpo.training_args.loss_weights == [0.8, 0.2]
    assert dpo.training_args.methods == keys["methods"] and dpo.plan.methods[0].shift == "none"
    kto = load_recipe(write(tmp_path, trainer="kto", loss_type="bco", **keys))
    assert kto.training_args.loss_type == "bco" and kto.trainer == "kto"


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ({"loss_type": "bco"}, ["loss_type: 'bco' is neither a loss of TRL nor a method"]),
        ({"methods": "bco"}, ["bco: replaces or joins TRL's loss, so name it"]),
        ({"methods": {"bcoo": None}, "loss_type": "bcoo"}, ["methods: unknown method 'bcoo', did you mean 'bco'?"]),
        ({"methods": {"bco": {"shift": "x"}}, "loss_type": "bco"}, ["methods: bco: shift: 'x' is not one of"]),
        ({"methods": {"bco": {"udm": True}}, "loss_type": "bco"}, ["udm has nothing to match on pairs"]),
        ({"trainer": "kto", "methods": "bco"}, ["bco: replaces TRL's loss, so name it"]),
        ({"trainer": "kto", "tools": "calculator"}, ["only the grpo trainer calls tools; this is kto"]),
        ({"trainer": "sft", "methods": "bco"}, ["bco: runs in the dpo or kto trainer, this is sft"]),
        ({"trainer": "sft", "beta": 0.1}, ["unknown key 'beta'"]),
        ({"trainer": "sft", "rewards": ["json_valid"]}, ["rewards: the sft trainer learns from demonstrations"]),
    ],
)
def test_problems_of_the_other_trainers_are_told_once(tmp_path: Path, keys: dict, messages: list[str]) -> None:
    found = problems(tmp_path, **{"trainer": "dpo", "rewards": None, **keys})
    assert len(found) == len(messages), found
    assert all(any(m in f for f in found) for m in messages), found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "the key 'a' occurs twice"),
        ("methods:\n  trace: {weight: 1, weight: 2}\n", "the key 'weight' occurs twice"),
        ("a: [1\n", "not valid YAML"),
        ("- a\n", "a recipe is a mapping"),
        ("x: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml") as caught:
        load_recipe(str(path))
    assert message in str(caught.value)


def test_yaml_anchors_and_merges_still_work() -> None:
    assert read_yaml("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\n")["b"] == {"p": 1, "q": 3}


def test_an_unknown_recipe_is_named_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="unknown recipe, did you mean 'sandbox_grpo'"):
        find_recipe("sandbox_gprpo")
    with pytest.raises(RecipeError, match="there is no such file"):
        find_recipe("nowhere/x.yaml")


def test_half_precision_without_an_accelerator_can_be_planned_but_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    recipe = load_recipe(write(tmp_path, bf16=None))
    assert recipe.not_here is not None and "set bf16: false" in recipe.not_here
    assert "use_cpu" not in recipe.values and recipe.resolved()["use_cpu"] is False
    assert load_recipe(write(tmp_path, bf16=None, use_cpu=True)).not_here is None
    assert load_recipe(write(tmp_path)).not_here is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_plans_and_its_resolved_form_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False))
    second = load_recipe(str(again))
    assert second.resolved() == recipe.resolved()
    assert second.plan == recipe.plan
    assert second.reward_names == recipe.reward_names


def test_the_resolved_recipe_holds_no_secret(tmp_path: Path) -> None:
    env = {"WANDB_API_KEY": "hidden-1"}
    init = {"token": "hidden-2", "nested": {"api_key": "hidden-3", "kept": 1}}
    recipe = load_recipe(write(tmp_path, env=env, hub_token="hidden-4", model_init_kwargs=init))
    text = yaml.safe_dump(recipe.resolved())
    assert "hidden" not in text
    assert recipe.resolved()["model_init_kwargs"] == {"nested": {"kept": 1}}
    assert recipe.resolved()["learning_rate"] == 1e-6, "defaults are written too"
    assert without_secrets({1: {"token": "hidden"}, "difficulty": {2: 0.5}}) == {1: {}, "difficulty": {2: 0.5}}
