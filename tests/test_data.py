"""Training data: sources, columns, templates, long prompts, and every way in which data cannot be used."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from trl_ext.data import DataError, load_data, template_fields
from trl_ext.loops.labels import balance_warning
from trl_ext.recipe import Recipe, load_recipe

ROWS = [{"problem": f"What is {i} + 1?", "expected": str(i + 1), "kind": "sum"} for i in range(6)]
COLUMNS = {"prompt": "problem", "answer": "expected"}


def recipe(tmp_path: Path, dataset: object, **keys: object) -> Recipe:
    settings = {
        "model_name_or_path": "somewhere",
        "dataset_name": str(dataset),
        "rewards": ["math_correct"],
        "bf16": False,
        "activation_checkpointing": False,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings | keys))
    return load_recipe(str(path))


def save(tmp_path: Path, ending: str, rows: list[dict] = ROWS, stem: str = "data") -> Path:
    path = tmp_path / f"{stem}{ending}"
    data = Dataset.from_list(rows)
    if ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif ending == ".json":
        path.write_text(json.dumps(rows))
    elif ending == ".csv":
        data.to_csv(path)
    else:
        data.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".csv"])
def test_local_files_with_columns_mapped(tmp_path: Path, ending: str) -> None:
    data = load_data(recipe(tmp_path, save(tmp_path, ending), columns=COLUMNS))
    assert data.rows == 6
    row = data.train[2]
    assert row["prompt"] == [{"role": "user", "content": "What is 2 + 1?"}]
    assert str(row["answer"]) == "3"
    assert "expected" not in row and row["kind"] == "sum", "other columns stay for rewards and methods"
    assert data.held_out is None and data.eval is None


def test_a_folder_with_a_file_for_each_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    save(folder, ".jsonl", stem="train")
    save(folder, ".jsonl", ROWS[:4], stem="test")
    data = load_data(recipe(tmp_path, folder, columns=COLUMNS, eval_strategy="steps", eval_rows=3))
    assert data.rows == 6 and len(data.eval) == 3
    assert data.eval[0]["prompt"] == [{"role": "user", "content": "What is 0 + 1?"}]


def test_a_folder_with_one_file_is_the_train_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    save(folder, ".parquet", stem="anything")
    assert load_data(recipe(tmp_path, folder, columns=COLUMNS)).rows == 6
    save(folder, ".csv", stem="more")
    with pytest.raises(DataError, match="2 data files of 2 formats"):
        load_data(recipe(tmp_path, folder, columns=COLUMNS))


def test_the_sandbox_with_options_and_held_out_problems(tmp_path: Path) -> None:
    options = {"n": 12, "difficulty": {"1": 1.0}, "seed": 3}
    data = load_data(
        recipe(tmp_path, "sandbox/math", dataset_options=options, rewards=["answer_correct"], eval_rows=7)
    )
    assert data.rows == 12 and set(data.train["level"]) == {1}
    assert len(data.held_out) == 7 and set(data.held_out["level"]) == {1}
    assert not set(data.train["problem"]) & set(data.held_out["problem"])
    without = load_data(
        recipe(tmp_path, "sandbox/math", dataset_options=options, rewards=["answer_correct"], eval_rows=0)
    )
    assert without.held_out is None
    with pytest.raises(DataError, match=r"unknown .dificulty., did you mean .difficulty."):
        load_data(recipe(tmp_path, "sandbox/math", dataset_options={"dificulty": 1}))


def test_a_mixture_goes_through_trl(tmp_path: Path) -> None:
    first, second = save(tmp_path, ".jsonl"), save(tmp_path, ".jsonl", ROWS[:2], stem="second")
    mixture = [{"path": "json", "data_files": str(f), "columns": ["problem", "expected"]} for f in (first, second)]
    made = recipe(tmp_path, "x", datasets=mixture, dataset_name=None, columns=COLUMNS)
    assert load_data(made).rows == 8


def test_streaming(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        save(tmp_path, ".jsonl"),
        columns=COLUMNS,
        dataset_streaming=True,
        max_steps=5,
        max_train_rows=4,
        max_prompt_tokens=99,
    )
    data = load_data(made, count_tokens=lambda prompt: 100 if "2 + 1" in prompt[0]["content"] else 1)
    assert data.rows is None and data.dropped is None
    assert [row["answer"] for row in data.train] == ["1", "2", "4", "5"]


def test_template_and_system_prompt(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        save(tmp_path, ".jsonl"),
        columns={"answer": "expected"},
        prompt_template="{problem} ({kind}, {answer}) {{}}",
        system_prompt="Be brief.",
    )
    assert load_data(made).train[1]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1? (sum, 2) {}"},
    ]


def test_a_prompt_of_messages_stays_and_keeps_its_own_system_turn(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    other = [{"role": "user", "content": "Hi"}]
    file = save(tmp_path, ".jsonl", [{"prompt": own, "answer": "1"}, {"prompt": other, "answer": "1"}])
    train = load_data(recipe(tmp_path, file, system_prompt="Ours.")).train
    assert train[0]["prompt"] == own
    assert train[1]["prompt"] == [{"role": "system", "content": "Ours."}, *other]


def test_a_mapped_column_replaces_one_of_the_same_name(tmp_path: Path) -> None:
    rows = [{"prompt": "wrong", "problem": "right", "answer": "wrong", "expected": "right"}]
    row = load_data(recipe(tmp_path, save(tmp_path, ".jsonl", rows), columns=COLUMNS)).train[0]
    assert row["prompt"][0]["content"] == "right" and row["answer"] == "right"


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    made = recipe(tmp_path, save(tmp_path, ".jsonl"), columns=COLUMNS, max_prompt_tokens=10, max_train_rows=3)
    data = load_data(made, count_tokens=lambda prompt: 10 + int(prompt[0]["content"][8]) % 2)
    assert data.dropped == 3 and data.rows == 3
    assert list(data.train["answer"]) == ["1", "3", "5"]
    with pytest.raises(DataError, match="all 6 prompts are longer than max_prompt_tokens 10"):
        load_data(made, count_tokens=lambda prompt: 11)
    assert load_data(made).dropped is None, "a dry run has no tokenizer"


def test_preference_pairs_become_messages(tmp_path: Path) -> None:
    rows = [{"question": "Hi?", "good": "Hello.", "bad": "No."}]
    made = recipe(
        tmp_path,
        save(tmp_path, ".jsonl", rows),
        trainer="dpo",
        rewards=None,
        columns={"prompt": "question", "chosen": "good", "rejected": "bad"},
    )
    row = load_data(made).train[0]
    assert row["prompt"] == [{"role": "user", "content": "Hi?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "Hello."}]
    assert row["rejected"] == [{"role": "assistant", "content": "No."}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_labelled_replies_become_messages(tmp_path: Path) -> None:
    rows = [{"question": "Hi?", "reply": "Hello.", "good": True}, {"question": "Hi?", "reply": "No.", "good": False}]
    columns = {"prompt": "question", "completion": "reply", "label": "good"}
    path = save(tmp_path, ".jsonl", rows)
    data = load_data(recipe(tmp_path, path, trainer="kto", rewards=None, columns=columns, system_prompt="Be kind."))
    row = data.train[1]
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}]
    assert row["prompt"] == turns and row["completion"] == reply("No.") and row["label"] is False


@pytest.mark.parametrize("prompt", [True, False])
def test_pairs_become_labelled_replies(tmp_path: Path, prompt: bool) -> None:
    """With the prompt in a column of its own, or in both replies; the count is that of the replies."""
    turn = [{"role": "user", "content": "Hi?"}]
    row = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}
    if not prompt:
        row = {"chosen": turn + reply("Hello."), "rejected": turn + reply("No.")}
    data = load_data(recipe(tmp_path, save(tmp_path, ".jsonl", [row] * 2), trainer="kto", rewards=None))
    assert data.rows == 4 and data.train["label"][:] == [True, False, True, False]
    assert data.train[1]["prompt"] == turn and data.train[1]["completion"] == reply("No.")


def many_pairs(n: int) -> list[dict]:
    """The prompt's number is in both replies, and in a column of its own."""
    return [{"prompt": f"What is {i}?", "chosen": f"good {i}", "rejected": f"bad {i}", "n": i} for i in range(n)]


@pytest.mark.parametrize("limit", [None, 20, 21])
def test_labels_alternate_and_pairs_stay_whole(tmp_path: Path, limit: int | None) -> None:
    keys = {"trainer": "kto", "rewards": None, "max_train_rows": limit, "eval_rows": limit, "eval_strategy": "epoch"}
    folder = tmp_path / "data"
    folder.mkdir()
    for stem in ("train", "test"):
        save(folder, ".jsonl", many_pairs(40), stem=stem)
    data = load_data(recipe(tmp_path, folder, **keys))
    for rows in (data.train, data.eval):
        n = len(rows) // 2
        assert n == (10 if limit else 40) and rows["label"][:] == [True, False] * n
        for row in rows:
            kind = "good" if row["label"] else "bad"
            assert row["completion"] == reply(f"{kind} {row['n']}") and f"{row['n']}?" in row["prompt"][0]["content"]
        for good in (True, False):
            assert sorted(row["n"] for row in rows if row["label"] is good) == list(range(n))
        numbers = rows["n"][:]
        assert all(a != b for a, b in itertools.pairwise(numbers)), "neighbours share no prompt"
    with pytest.raises(DataError, match="max_train_rows: 1 is less than one pair"):
        load_data(recipe(tmp_path, folder, **{**keys, "max_train_rows": 1}))


def test_long_prompts_take_both_replies_with_them(tmp_path: Path) -> None:
    path = save(tmp_path, ".jsonl", many_pairs(12))
    made = recipe(tmp_path, path, trainer="kto", rewards=None, max_prompt_tokens=10)
    data = load_data(made, lambda prompt: len(prompt[0]["content"]))  # "What is 10?" has 11 letters
    assert (data.rows, data.dropped) == (20, 4) and data.train["label"][:] == [True, False] * 10


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("wrong", [-1, None, 2])
def test_every_label_is_checked(tmp_path: Path, streaming: bool, wrong: object) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (1, 0, 1, wrong, 0)]
    keys = {"trainer": "kto", "rewards": None, "dataset_streaming": streaming, "max_steps": 1}
    made = recipe(tmp_path, save(tmp_path, ".jsonl", rows), **keys)
    with pytest.raises(DataError, match=rf"label: expected true or false .*, row 3 \(from 0\) has {wrong}"):
        list(load_data(made).train)


def test_streamed_pairs_alternate(tmp_path: Path) -> None:
    path = save(tmp_path, ".jsonl", many_pairs(5))
    keys = {"trainer": "kto", "rewards": None, "dataset_streaming": True, "max_steps": 1}
    rows = list(load_data(recipe(tmp_path, path, **keys, max_train_rows=6)).train)
    assert [row["label"] for row in rows] == [True, False] * 3
    assert {row["completion"][0]["content"] for row in rows} == {f"{k} {i}" for i in range(3) for k in ("good", "bad")}
    assert set(rows[0]) == {"prompt", "completion", "label", "n"}


@pytest.mark.parametrize(("loss_type", "warned"), [("kto", True), ("bco", True), ("apo_zero_unpaired", False)])
def test_unbalanced_labels_are_said(tmp_path: Path, loss_type: str, warned: bool) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": i > 0} for i in range(10)]
    keys = {"methods": ["bco"]} if loss_type == "bco" else {}
    path = save(tmp_path, ".jsonl", rows)
    made = recipe(tmp_path, path, trainer="kto", rewards=None, loss_type=loss_type, **keys)
    assert bool(balance_warning(made, load_data(made))) == warned


def test_demonstrations(tmp_path: Path) -> None:
    def load(row: dict, **keys: object) -> Dataset:
        return load_data(recipe(tmp_path, save(tmp_path, ".jsonl", [row]), trainer="sft", rewards=None, **keys)).train

    row = load({"q": "Hi?", "completion": "Hello."}, prompt_template="{q} Answer.")[0]
    assert row["prompt"][0]["content"] == "Hi? Answer." and row["completion"] == reply("Hello.")
    talk = [{"role": "user", "content": "Hi?"}, *reply("Hello.")]
    assert load({"talk": talk}, columns={"messages": "talk"})[0] == {"messages": talk}
    assert load({"text": "Once."})[0] == {"text": "Once."}
    with pytest.raises(DataError, match="there is no column 'prompt'"):
        load({"text": "Once."}, max_prompt_tokens=5)


@pytest.mark.parametrize(
    ("trainer", "row", "message"),
    [
        ("kto", {"prompt": "a", "completion": "b"}, "the kto trainer: there is no column 'label'"),
        (
            "kto",
            {"prompt": "a", "completion": "b", "label": "good"},
            "label: expected true or false .* row 0 .* has 'good'",
        ),
        ("sft", {"prompt": "a"}, "the sft trainer: there is no column 'completion'"),
    ],
)
def test_data_that_another_trainer_cannot_learn_from(tmp_path: Path, trainer: str, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(recipe(tmp_path, save(tmp_path, ".jsonl", [row]), trainer=trainer, rewards=None))


def test_sandbox_labels_with_other_prompts_for_the_bad_ones(tmp_path: Path) -> None:
    options = {"n": 60, "difficulty": {1: 1}, "bad_difficulty": {"4": 1}, "bad_share": 0.25}
    made = recipe(tmp_path, "sandbox/labels", trainer="kto", rewards=None, dataset_options=options, eval_rows=3)
    data = load_data(made)
    assert {(row["label"], row["level"]) for row in data.train} == {(True, 1), (False, 4)}
    assert len(data.held_out) == 3 and {row["level"] for row in data.held_out} == {1}
    with pytest.raises(DataError, match="unknown 'bad_difficulty'"):
        load_data(recipe(tmp_path, "sandbox/demos", trainer="sft", rewards=None, dataset_options=options))
    with pytest.raises(DataError, match="bad_share 2 is not a share"):
        load_data(recipe(tmp_path, "sandbox/labels", trainer="kto", rewards=None, dataset_options={"bad_share": 2}))


def test_pairs_that_hold_their_prompt_are_left_to_trl(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi?"}]
    rows = [{"chosen": [*turns, {"role": "assistant", "content": c}], "rejected": turns} for c in "ab"]
    made = recipe(tmp_path, save(tmp_path, ".jsonl", rows), trainer="dpo", rewards=None)
    assert load_data(made).train.column_names == ["chosen", "rejected"]
    keys = {"trainer": "dpo", "rewards": None, "max_prompt_tokens": 5}
    with pytest.raises(DataError, match="there is no column 'prompt'"):
        load_data(recipe(tmp_path, tmp_path / "data.jsonl", **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {},
            r"reward 'math_correct' reads the column 'answer' or 'solution', the data set has: problem, expected, kind",
        ),
        ({"columns": {"prompt": "problm", "answer": "expected"}}, r"no column 'problm', did you mean 'problem'\?"),
        (
            {"columns": {"answer": "expected"}},
            r"there is no column 'prompt'.*the data set has: problem, expected, kind",
        ),
        ({"columns": COLUMNS, "prompt_template": "{question}"}, r"prompt_template: there is no column 'question'"),
        ({"columns": COLUMNS, "dataset_train_split": "trian"}, r"x"),
        ({"columns": COLUMNS, "eval_strategy": "steps"}, r"no split 'test' \(it has: train\)"),
        (
            {"trainer": "dpo", "rewards": None, "columns": {"prompt": "problem"}},
            r"the dpo trainer: there is no column 'chosen'",
        ),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, keys: dict, message: str) -> None:
    made = recipe(tmp_path, save(tmp_path, ".jsonl"), **keys)
    if keys.get("dataset_train_split"):  # a single file is whatever split was asked for
        assert load_data(made).rows == 6
        return
    with pytest.raises(DataError, match=message):
        load_data(made)


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{}", "{0}", "{a", "{__class__.x}"])
def test_a_template_can_only_name_columns(template: str) -> None:
    with pytest.raises(DataError, match="prompt_template"):
        template_fields(template)


def test_an_empty_file_and_an_empty_stream(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        load_data(recipe(tmp_path, empty))
    header = tmp_path / "header.csv"
    header.write_text("prompt,answer\n")
    for streaming in (False, True):
        with pytest.raises(DataError, match="empty"):
            load_data(recipe(tmp_path, header, dataset_streaming=streaming, max_steps=5))


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(DataError, match=r"is not one of \.jsonl"):
        load_data(recipe(tmp_path, text))
    with pytest.raises(DataError, match="cannot load the data set 'nobody/nothing'"):
        load_data(recipe(tmp_path, "nobody/nothing"))
    with pytest.raises(DataError, match=r"sandbox/maths: unknown kind .maths.: expected one of"):
        load_data(recipe(tmp_path, "sandbox/maths"))
