"""RL-Struct's five terms as reward functions: the card's worked example, profiles, sources of a schema, gold, recipes."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path

import pydantic
import pytest
import trl
import yaml

from evals.data import gsm8k
from tests.test_real_recipes import FOLDER, load
from tests.tiny import grpo_args, prompts, tiny_path
from trl_ext import memory
from trl_ext.data import DataError, load_data
from trl_ext.recipe import RecipeError, load_recipe
from trl_ext.rewards import make_reward, make_rewards
from trl_ext.rewards.checked import columns_of
from trl_ext.rewards.structure import make_rl_struct, schema_of
from trl_ext.sandbox import dataset

KEYS = ["reasoning", "answer"]
ONE = '{"reasoning": "2+2 is 4", "answer": 4}'
SIX = [
    ONE,
    f"```json\n{ONE}\n```",
    ONE[:-1],
    '{"reasoning": "2+2 is 5", "answer": 5, "note": "x"}',
    '{"answer": 4}',
    "The answer is 4.",
]
NESTED = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "meal": {"type": "object", "properties": {"kcal": {"type": "integer"}}, "required": ["kcal"]},
    },
    "required": ["name", "meal"],
}


class Meal(pydantic.BaseModel):
    kcal: int


class Dish(pydantic.BaseModel):
    name: str
    meal: Meal
    note: str = ""


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def totals(texts: list[str], gold: str, **settings: object) -> list[float]:
    """R_total by the weights that the functions bring, as TRL adds them up."""
    made = make_rl_struct(**settings)  # type: ignore[arg-type]
    columns = [reward(completions=[chat(t) for t in texts], answer=[gold] * len(texts)) for reward in made]
    return [sum(r.default_weight * v for r, v in zip(made, row, strict=True)) for row in zip(*columns, strict=True)]  # type: ignore[attr-defined]


# The card's numbers


def test_the_worked_example() -> None:
    made = make_rewards("rl_struct", {"schema": gsm8k.SCHEMA, "l_max": 200})
    assert [r.__name__ for r in made] == [f"rl_struct_{t}" for t in ("valid", "struct", "format", "correct", "length")]
    assert [r.default_weight for r in made] == [1.0, 1.0, 0.5, 0.5, 0.1]  # type: ignore[attr-defined]
    found = [reward(completions=[chat(t) for t in SIX], answer=[ONE] * 6) for reward in made]
    expected = [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0.8, 0, 0, 0, 0], [1, 1, 0, 0.5, 0.4, 0], [0] * 6]
    for values, wanted in zip(found, expected, strict=True):
        assert values == pytest.approx(wanted, abs=1e-6)
    for settings in ({"keys": KEYS}, {"schema": gsm8k.SCHEMA}):
        total = totals(SIX, ONE, l_max=200, **settings)
        assert total == pytest.approx([2.5, 2.9, 1.0, 2.25, 1.2, 0.0], abs=1e-6)
    mean, std = statistics.fmean(total), statistics.stdev(total)
    card = [0.783993, 1.149350, -0.586092, 0.555646, -0.403414, -1.499482]
    assert [(v - mean) / (std + 1e-4) for v in total] == pytest.approx(card, abs=1e-6)


def test_the_total_lies_in_its_range() -> None:
    worst = totals(["", "x" * 5_000, "[" * 3_000, "{}"], ONE, keys=KEYS)
    assert worst == pytest.approx([-0.01, -0.01, -0.01, 0.99], abs=1e-6)
    assert max(totals(SIX, ONE, keys=KEYS)) == pytest.approx(2.9)


def test_identical_replies_have_no_advantage_and_a_missing_key_never_helps() -> None:
    group = totals([SIX[3]] * 4, ONE, keys=KEYS)
    assert [(v - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4) for v in group] == [0.0] * 4
    struct = make_reward("rl_struct_struct", {"keys": KEYS})
    assert struct(completions=["x", 'x "answer"', 'x "answer" "reasoning"']) == [0, 0, 1]


def test_ranking_by_correctness_alone_is_by_f1_and_white_space_and_key_order_do_not_count() -> None:
    valid, correct = make_reward("rl_struct_valid"), make_reward("rl_struct_correct")
    texts = [
        '{"answer": 4, "reasoning": "2+2 is 4"}',
        '{"reasoning":"2+2   is 4",\n"answer":4}',
        SIX[3],
        SIX[4],
        SIX[5],
    ]
    assert valid(completions=texts) == [1, 1, 1, 1, 0]
    assert correct(completions=texts, answer=[ONE] * 5) == pytest.approx([1, 1, 0.5, 0.4, 0])


# Struct: text or object


def test_nested_keys_on_the_text_and_in_their_place() -> None:
    texts = [
        '{"name": "a", "meal": {"kcal": 1}}',
        '{"name": "a", "kcal": 1, "meal": {}}',
        '"name" "meal" "kcal"',
        '<think>"name" "meal" "kcal"</think>{"name": "a"}',
        '{"name": "a", "meal": {"kcal": 1}',
        "[]",
    ]
    on_text = make_reward("rl_struct_struct", {"schema": NESTED})
    on_value = make_reward("rl_struct_struct", {"schema": NESTED, "struct_on": "parsed"})
    assert on_text(completions=texts) == [1, 1, 1, 0, 1, 0]
    assert on_value(completions=texts) == [1, 0, 0, 0, 0, 0]


def test_sources_of_a_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dish.json"
    file.write_text(json.dumps(NESTED))
    for source in (NESTED, str(file), Dish, "tests.rewards.test_structure.Dish"):
        assert schema_of(source).required_keys == {"name", "meal", "kcal"}  # type: ignore[arg-type]
    (tmp_path / "broken.json").write_text("{")
    wrong = {
        str(tmp_path / "none.json"): "cannot read",
        str(tmp_path / "broken.json"): "cannot read",
        "tests.rewards.test_structure.Nothing": "cannot import",
        "tests.rewards.test_structure.chat": "no Pydantic model",
    }
    for source, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            make_rl_struct(source)
    with pytest.raises(ValueError, match="not a usable JSON Schema"):
        make_rl_struct({"type": "objekt"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name either `schema`"),
        ({"schema": NESTED, "keys": KEYS}, "name either `schema`"),
        ({"keys": "answer"}, "keys: expected a list"),
        ({"schema": {"type": "object"}}, "requires no key"),
        ({"keys": KEYS, "struct_on": "object"}, "neither text nor parsed"),
        ({"keys": KEYS, "profile": "json"}, "neither fenced nor raw"),
        ({"keys": KEYS, "gold_format": "xml"}, "not one of json, gsm8k"),
        ({"keys": KEYS, "content_keys": "answer"}, "content_keys: expected a list"),
        ({"keys": KEYS, "gold": None, "content_keys": ["answer"]}, "gold is none"),
        ({"schema": gsm8k.SCHEMA, "content_keys": ["anser"]}, "the schema has no key 'anser'"),
        ({"keys": KEYS, "l_min": 5, "l_max": 4}, "l_min <= l_max"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rl_struct(**settings)


# Profiles


def test_profiles() -> None:
    fenced, raw = make_reward("rl_struct_format"), make_reward("rl_struct_format", {"profile": "raw"})
    texts = [ONE, f"```json\n{ONE}\n```", f"```\n{ONE}\n```", "<think>```json\n1\n```</think>x"]
    assert fenced(completions=texts) == pytest.approx([0, 0.8, 0.5, 0])
    assert raw(completions=texts) == pytest.approx([0.8, 0, 0, 0])


@pytest.mark.parametrize(
    ("prompt", "warns"),
    [
        (gsm8k.SYSTEM, True),
        ("Answer in JSON, without any Markdown.", True),
        ("Do not use code blocks.", True),
        ("Return only valid JSON.", True),
        ("Answer as JSON in a Markdown code block.", False),
        ("No problem is too hard. Write your JSON inside a fence.", False),
    ],
)
def test_a_prompt_that_forbids_the_fence_is_warned_about_once(
    prompt: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    message = [{"role": "system", "content": prompt}, {"role": "user", "content": "q"}]
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        for profile in ("fenced", "raw"):
            reward = make_reward("rl_struct_format", {"profile": profile})
            for given in ([message], [prompt]):
                reward(completions=[ONE], prompts=given)
    assert sum("profile: raw" in record.message for record in caplog.records) == int(warns)


# Gold


def test_gold_as_text_as_object_from_gsm8k_and_by_keys() -> None:
    replies = [ONE, '{"answer": 4}', '{"reasoning": "2+2 is 4", "answer": 5}']
    solution = "2+2 is <<2+2=4>>4\n#### 4"
    full = [1.0, 0.4, 0.75]  # 2 * 1 / (1 + 4) and 2 * 3 / (4 + 4) of the tokens 2+2, is, 4, 4
    answer = [1.0, 1.0, 0.0]
    for given, gold_format in ((ONE, "json"), (json.loads(ONE), "json"), (solution, "gsm8k")):
        for keys, expected in ((None, full), (["answer"], answer)):
            settings = {"gold": "solution", "gold_format": gold_format, "content_keys": keys}
            reward = make_reward("rl_struct_correct", settings)
            assert columns_of(reward) == [("solution",)]
            assert reward(completions=replies, solution=[given] * 3) == pytest.approx(expected)


def test_rows_without_gold_are_left_out() -> None:
    reward = make_reward("rl_struct_correct", {"content_keys": ["answer"]})
    golds = [ONE, None, "no JSON", '{"reasoning": "x"}', "[1]"]
    assert reward(completions=[ONE] * 5, answer=golds) == [1.0, None, None, None, None]
    gsm = make_reward("rl_struct_correct", {"gold_format": "gsm8k"})
    golds = ["x #### 1,200", "x #### -2.5", "x", "x ####"]
    replies = [f'{{"reasoning": "x", "answer": {n}}}' for n in (1200, -2.5, 1, 1)]
    assert gsm(completions=replies, answer=golds) == [1.0, 1.0, None, None]
    assert [r.__name__ for r in make_rl_struct(keys=KEYS, gold=None)] == [
        f"rl_struct_{t}" for t in ("valid", "struct", "format", "length")
    ]


def test_json_schema_judges_types_too() -> None:
    reward = make_reward("json_schema", {"schema": gsm8k.SCHEMA})
    texts = [ONE, f"```json\n{ONE}\n```", SIX[3], ONE.replace("4}", '"4"}'), ONE[:-1], ""]
    assert reward(completions=texts) == [1, 1, 0, 0, 0, 0]


def test_hostile_replies_are_judged_and_not_obeyed() -> None:
    hostile = [
        "[" * 100_000,
        '{"answer": ' * 50_000,
        '"' + "\\" * 200_000,
        "1" * 100_000,
        "\ud800",
        '{"answer": 1e999}',
    ]
    found = totals(hostile, ONE, keys=KEYS, profile="raw", struct_on="parsed")
    assert found == pytest.approx([-0.01, -0.01, -0.01, -0.01, -0.01, 0.0])


# Recipes


def write(tmp_path: Path, **keys: object) -> str:
    base = yaml.safe_load((FOLDER / "sandbox_rl_struct.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(base | keys))
    return str(path)


def test_one_entry_expands_to_five_with_the_cards_weights(tmp_path: Path) -> None:
    recipe = load_recipe(str(FOLDER / "sandbox_rl_struct.yaml"))
    assert recipe.reward_names == [f"rl_struct_{t}" for t in ("valid", "struct", "format", "correct", "length")]
    assert recipe.training_args.reward_weights == recipe.resolved()["reward_weights"] == [1.0, 1.0, 0.5, 0.5, 0.1]
    mixed = load_recipe(write(tmp_path), ["--rewards.answer_correct", "--rewards.rl_struct.gold", "null"])
    assert mixed.training_args.reward_weights == [1.0, 1.0, 0.5, 0.1, 1.0]
    own = load_recipe(write(tmp_path, reward_weights=[1, 0, 0.5, 0.5, 0.1]))
    assert own.training_args.reward_weights == [1.0, 0.0, 0.5, 0.5, 0.1]
    alone = load_recipe(write(tmp_path, rewards={"rl_struct_valid": None, "rl_struct_length": {"l_max": 90}}))
    assert alone.training_args.reward_weights is None, "named alone, they have TRL's weight"


def test_problems_of_a_recipe(tmp_path: Path) -> None:
    cases = {
        "weights for 5 rewards (rl_struct_valid, ": {"reward_weights": [1.0, 1.0]},
        "rewards: rl_struct: name either `schema`": {"rewards": ["rl_struct"]},
        "rl_struct_length) no longer counts: set reward_weights": {
            "multi_objective_aggregation": "normalize_then_sum"
        },
        "unexpected keyword argument 'shema'": {"rewards": {"rl_struct": {"shema": {}}}},
        "two rewards are called 'rl_struct_valid'": {
            "rewards": {"rl_struct": {"keys": ["a"]}, "rl_struct_valid": None}
        },
    }
    for message, keys in cases.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(write(tmp_path, **keys))
        assert message in str(caught.value)
    decided = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1, 1, 0.5, 0.5, 0.01]}
    assert load_recipe(write(tmp_path, **decided)).training_args.reward_weights[-1] == 0.01
    with pytest.raises(ValueError, match="'rl_struct' is a set of rewards: name one of rl_struct_valid"):
        make_reward("rl_struct", {"keys": KEYS})


def test_the_sandboxs_own_solutions_get_all_but_the_fence() -> None:
    recipe = load_recipe(str(FOLDER / "sandbox_rl_struct.yaml"))
    rows = dataset("math", n=8)
    columns = {name: rows[name] for name in rows.column_names if name != "prompt"}
    values = [r(prompts=rows["prompt"], completions=rows["solution"], **columns) for r in recipe.rewards]  # type: ignore[operator]
    assert values == [[1.0] * 8, [1.0] * 8, [0.8] * 8, [1.0] * 8, [0.0] * 8]


def test_the_recipe_for_qwen_reads_gsm8k(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    row = {"question": "What is 2+2?", "answer": "2+2 is <<2+2=4>>4\n#### 4"}
    path.write_text(json.dumps(row) + "\n")
    recipe = load("rl_struct_qwen3_4b", "--dataset_name", str(path))
    data = load_data(recipe)
    assert data.train[0]["prompt"] == [
        {"role": "system", "content": gsm8k.SYSTEM},
        {"role": "user", "content": row["question"]},
    ]
    values = [
        r(prompts=[[]] * 2, completions=[chat(SIX[0]), chat(SIX[3])], answer=[row["answer"]] * 2)
        for r in recipe.rewards
    ]  # type: ignore[operator]
    assert values == [[1, 1], [1, 1], [0.8, 0.8], [1, 0.5], [0, 0]]
    (schema,) = {json.dumps(spec["schema"]) for spec in recipe.raw["rewards"].values()}
    assert json.loads(schema) == gsm8k.SCHEMA, "training and evaluation ask for the same"
    path.write_text(json.dumps({"question": "q", "solution": "s"}) + "\n")
    with pytest.raises(DataError, match="'rl_struct_correct' reads the column 'answer'"):
        load_data(load("rl_struct_qwen3_4b", "--dataset_name", str(path)))


CARD = {
    "num_generations": 6,
    "learning_rate": 5e-6,
    "max_steps": 250,
    "beta": 0.04,
    "epsilon": 0.2,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "max_grad_norm": 0.1,
    "warmup_steps": 25,
}


def test_the_recipe_for_qwen_has_the_cards_values_and_fits() -> None:
    # same geometry under the name whose configuration is known without a network
    recipe = load("rl_struct_qwen3_4b", "--model_name_or_path", "Qwen/Qwen3-4B")
    args = recipe.training_args
    assert {key: getattr(args, key) for key in CARD} == CARD
    assert args.reward_weights == [1.0, 1.0, 0.5, 0.5, 0.1]
    assert (recipe.model_args.lora_r, recipe.model_args.lora_alpha, recipe.model_args.load_in_4bit) == (32, 32, True)
    assert memory.predict(recipe).fits(22) == []
    lines = (FOLDER / "rl_struct_qwen3_4b.yaml").read_text().splitlines()
    for key in CARD:
        (line,) = [x for x in lines if x.strip().startswith(f"{key}:")]
        assert "card" in line, line


# Stock TRL


def test_in_stock_trl_each_term_is_logged_and_the_weighted_sum_is_the_reward(tmp_path: Path) -> None:
    made = make_rl_struct(keys=["answer"], l_min=1, l_max=3)
    weights = [r.default_weight for r in made]  # type: ignore[attr-defined]
    args = trl.GRPOConfig(**grpo_args(str(tmp_path), reward_weights=weights, max_steps=1))
    trainer = trl.GRPOTrainer(tiny_path(), list(made), args, prompts())
    trainer.train()
    log = trainer.state.log_history[0]
    means = [log[f"rewards/{r.__name__}/mean"] for r in made]
    assert log["reward"] == pytest.approx(sum(w * m for w, m in zip(weights, means, strict=True)), abs=1e-6)
    assert means[-1] < 0, "six tokens are more than three characters"
