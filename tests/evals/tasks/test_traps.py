"""The faults that were found in lm-eval's tasks (EVALS.md section 1.3, by number): our path does not have them."""

import json
import os
import re
from pathlib import Path

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from evals.data import json_schema_bench
from evals.data.build import canonical
from evals.task import Item, Sampling, Source
from evals.tasks import TASKS
from evals.tasks.lm_eval import as_lm_eval, from_doc, gold_text, to_doc, user_text, yaml_folder
from tests.evals.data import stand_ins
from tests.evals.tasks.test_lm_eval import SAMPLING, Scripted, evaluate


@pytest.mark.parametrize("seed", [0, 1])
def test_1_gpqa_scores_the_right_letter_of_the_prompt_that_was_asked(tmp_path: Path, seed: int) -> None:
    """A model that finds the right option's text in its own prompt scores 100 %; one that finds a wrong one, 0 %."""
    task = TASKS["gpqa_diamond"]
    folder = str(stand_ins.make("gpqa_diamond", tmp_path))
    truth = {row["Record ID"]: row for row in stand_ins.gpqa()}
    for column, expected in (("Correct Answer", 1.0), ("Incorrect Answer 2", 0.0)):

        def reply(doc: dict, k: int, column: str = column) -> str:
            wanted = re.escape(truth[doc["question"]][column].strip())
            return "Answer: " + re.search(rf"^([A-D])\) {wanted}$", doc["user"], re.MULTILINE)[1]  # type: ignore[index]

        # Loaded anew each time, as lm-eval's constructor, request building and scoring do.
        items = task.load(Source(folder, seed=seed))
        assert items == task.load(Source(folder, seed=seed))
        result = evaluate(Scripted(reply), as_lm_eval(task, items, 2, SAMPLING))
        assert result["results"][task.name]["accuracy,all"] == expected
        assert len(result["samples"][task.name]) == 4 * 8


def test_1_the_option_order_follows_the_seed(tmp_path: Path) -> None:
    folder = str(stand_ins.make("gpqa_diamond", tmp_path))
    orders = {canonical([i.messages for i in TASKS["gpqa_diamond"].load(Source(folder, seed=s))]) for s in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("picked", [[4, 1], [1, 4]])
def test_4_rows_are_paired_by_our_id_whatever_lm_eval_numbers_them(picked: list[int]) -> None:
    task = TASKS["gsm_json_synth"]
    items = {item.id: item for item in task.load(Source(limit=6))}

    def reply(doc: dict, k: int) -> str:
        return doc["gold"]

    result = evaluate(
        Scripted(reply), as_lm_eval(task, list(items.values()), 1, SAMPLING), samples={task.name: picked}
    )
    rows = result["samples"][task.name]
    assert len(rows) == 2
    for row in rows:
        item = items[row["doc"]["id"]]
        assert json.loads(row["arguments"][0][0]) == item.messages
        assert json.loads(row["resps"][0][0]) == item.gold
        assert row["valid_and_correct"] == 1


def test_10_a_limit_of_one_point_zero_is_refused_not_one_document(tmp_path: Path) -> None:
    for name, folder in (("aime_synth", None), ("aime25", str(stand_ins.make("aime25", tmp_path)))):
        with pytest.raises(ValueError, match=r"limit is 1\.0"):
            TASKS[name].load(Source(folder, limit=1.0))  # type: ignore[arg-type]


def test_11_a_task_object_carries_its_own_repeats() -> None:
    task = TASKS["aime_synth"]
    made = as_lm_eval(task, task.load(Source(limit=1)), 8, Sampling(3, 1.0))
    assert isinstance(made, ConfigurableTask)
    assert made.config.repeats == 8
    assert made.config.filter_list == [{"name": "all", "filter": [{"function": "take_first_k", "k": 8}]}]


def test_12_twins_load_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=str(yaml_folder()), include_defaults=False)
    assert set(TASKS) <= set(manager.all_tasks)
    # Data of a real task arrive by `--metadata`, edits included.
    folder = stand_ins.make("aime25", tmp_path / "data")
    for n in (30, 29):
        stand_ins.jsonl(stand_ins.aime25(n), folder / "test.jsonl")
        manager = TaskManager(
            include_path=str(yaml_folder()), include_defaults=False, metadata={"data_folder": os.fspath(folder)}
        )
        task = manager.load(["aime25"])["tasks"]["aime25"]
        assert len(task.eval_docs) == n


def structured_item(schema: dict, tmp_path: Path) -> Item:
    row = {"json_schema": json.dumps(schema), "unique_id": "one"}
    for config in json_schema_bench.CONFIGS:
        stand_ins.jsonl([row], tmp_path / config / "test.jsonl")
    return TASKS["structured"].load(Source(str(tmp_path)))[0]


def test_13_structured_prompts_and_verdicts(tmp_path: Path) -> None:
    task = TASKS["structured"]
    item = structured_item({"type": ["object", "number", "array"], "properties": {"a": {"type": "number"}}}, tmp_path)
    assert all("\\n" not in message["content"] for message in item.messages)
    assert "\n" in item.messages[1]["content"]
    for text in ('{"a": 1}', '```json\n{"a": 1}\n```', "3"):
        assert task.grade(item, text).scores["schema_valid"] == 1, text
    # Constants that are no JSON, characters that lm-eval strips, deep nesting, a number of 5,000 digits, two values.
    for text in (
        "NaN",
        '{"a": Infinity}',
        'json{"a": 1}',
        '`{"a": 1}`',
        'son{"a": 1}nos',
        "[" * 10_000 + "]" * 10_000,
    ):
        assert task.grade(item, text).scores["schema_valid"] == 0, text[:20]
    for text in ("9" * 5000, '{"a": 1} {"a": 2}', '{"a": 1, "a": 2}', "[" * 10_000):
        assert task.grade(item, text).scores["json_validity"] == 0, text[:20]


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("25", "\\boxed{025}", 1),
        ("25", "The answer is 025.", 1),
        ("204", "\\boxed{204.0}", 1),
        ("1080", "\\boxed{1,080}", 1),  # no AIME answer, but GSM8K has such
        ("204", "204", 1),
        ("204", "I tried 204 and 205.", 0),
        ("204", "\\boxed{205}, not 204", 0),
    ],
)
def test_14_spellings_of_an_integer(gold: str, text: str, right: int) -> None:
    item = Item("a", "a", [{"role": "user", "content": "?"}], gold)
    assert TASKS["aime25"].grade(item, text).scores["accuracy"] == right


@pytest.mark.parametrize("gold", [[1, 2], "[1, 2]", "['a']", "user", "{{id}}", {"a": "[x]"}, "{% raw %}"])
def test_15_golds_and_prompts_that_look_like_code_are_left_alone(gold: object) -> None:
    text = "{{ 7 * 7 }} {% if %} gold"
    item = Item("a", "a", [{"role": "system", "content": "{{id}}"}, {"role": "user", "content": text}], gold)
    task = as_lm_eval(TASKS["gsm8k_json"], [item], 1, SAMPLING)
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == user_text(doc) == text
    assert task.doc_to_target(doc) == gold_text(doc)
    assert json.loads(gold_text(doc)) == gold
    assert from_doc(to_doc(item, "x")).gold == gold
    model = Scripted(lambda doc, k: "x")
    evaluate(model, task)
    assert json.loads(model.requests[0].args[0]) == item.messages


def test_15_a_prompt_equal_to_a_column_s_name_stays_itself() -> None:
    item = Item("a", "a", [{"role": "user", "content": "gold"}], "secret")
    model = Scripted(lambda doc, k: "x")
    evaluate(model, as_lm_eval(TASKS["gsm8k_json"], [item], 1, SAMPLING))
    assert json.loads(model.requests[0].args[0]) == [{"role": "user", "content": "gold"}]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#### 18", 1),
        ("#### 18.00", 1),
        ("The answer is $18.00.", 1),
        ("So 3 * 6 is ... well ...", 0),
        ("We have 18 eggs, and then ...", 0),
        ("#### ...", 0),
    ],
)
def test_16_dots_are_no_number_and_18_00_is_18(text: str, right: int) -> None:
    item = Item("a", "a", [{"role": "user", "content": "?"}], "18")
    assert TASKS["gsm8k"].grade(item, text).scores["accuracy"] == right


@pytest.mark.parametrize(
    ("answer", "right"), [("18", 1), ("18.00", 1), ('"18.00"', 1), ('"$18"', 1), ('"..."', 0), ("1.8e1", 1), ("17", 0)]
)
def test_16_the_same_for_json_answers(answer: str, right: int) -> None:
    item = Item("a", "a", [{"role": "user", "content": "?"}], {"reasoning": "r", "answer": 18})
    reply = f'{{"reasoning": "r", "answer": {answer}}}'
    assert TASKS["gsm8k_json"].grade(item, reply).scores["answer_accuracy"] == right
