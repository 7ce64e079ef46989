"""Loaders of the real data sets on local stand-ins in their layout, and what they say when the data cannot be had."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError

from evals.data import aime, gpqa, gsm8k, json_schema_bench
from evals.data.hub import HubData, data_files, from_hub, refused, rows
from evals.task import DataError, Source
from evals.tasks import TASKS
from tests.evals.data import stand_ins

REAL = [task.name for task in TASKS.values() if not task.generated]


def load(name: str, tmp_path: Path, **source: object):
    return TASKS[name].load(Source(str(stand_ins.make(name, tmp_path / name)), **source))  # type: ignore[arg-type]


def test_aime24_from_parquet(tmp_path: Path) -> None:
    items = load("aime24", tmp_path)
    assert len(items) == 30
    assert (items[3].id, items[3].question, items[3].gold) == ("aime24-2024-I-3", "aime24-2024-I-3", "6")
    assert items[3].messages[0]["content"].startswith("Find 3+3.\n\nReason step by step")
    assert len(load("aime24", tmp_path, limit=5)) == 5


def test_aime25_from_jsonl(tmp_path: Path) -> None:
    items = load("aime25", tmp_path)
    assert [item.gold for item in items] == [str(i + 1) for i in range(30)]


@pytest.mark.parametrize(("raw", "gold"), [("025", "25"), ("204.0", "204"), ("000", "0"), (" 7 ", "7")])
def test_aime_golds_are_plain_integers(tmp_path: Path, raw: str, gold: str) -> None:
    stand_ins.jsonl([{"id": "1", "problem": "?", "answer": raw}], tmp_path / "test.jsonl")
    assert aime.load("aime25", aime.AIME25, Source(str(tmp_path)))[0].gold == gold


@pytest.mark.parametrize("raw", ["1000", "-1", "1/2", "12 or 13", "x"])
def test_other_aime_golds_are_refused(tmp_path: Path, raw: str) -> None:
    stand_ins.jsonl([{"id": "9", "problem": "?", "answer": raw}], tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="aime25: the answer of problem 9 is no integer from 0 to 999"):
        aime.load("aime25", aime.AIME25, Source(str(tmp_path)))


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    stand_ins.jsonl(stand_ins.aime25(2), tmp_path / "test.jsonl")
    stand_ins.jsonl(stand_ins.aime25(2), tmp_path / "other" / "test.jsonl")
    with pytest.raises(DataError, match="same id"):
        aime.load("aime25", aime.AIME25, Source(str(tmp_path)))


@pytest.mark.parametrize("seed", range(3))
def test_gpqa_from_csv(tmp_path: Path, seed: int) -> None:
    items = load("gpqa_diamond", tmp_path, seed=seed)
    assert len(items) == 4 * 8
    truth = {row["Record ID"]: row["Correct Answer"].strip() for row in stand_ins.gpqa()}
    for item in items:
        options = dict(re.findall(r"^([A-D])\) (.*)$", item.messages[0]["content"], re.MULTILINE))
        assert options[item.gold] == truth[item.question]
        assert not set(item.details) - {"options", "position", "rotation"}
    assert {item.gold for item in items[:4]} == set("ABCD")
    assert truth["rec00"] == "None"
    assert len(load("gpqa_diamond", tmp_path, limit=2)) == 8


def test_gpqa_from_parquet_gives_the_same_items(tmp_path: Path) -> None:
    stand_ins.parquet(stand_ins.gpqa(), tmp_path / "p" / "gpqa_diamond" / "train-00000-of-00001.parquet")
    assert gpqa.load(Source(str(tmp_path / "p"))) == load("gpqa_diamond", tmp_path)


def test_gsm8k_golds(tmp_path: Path) -> None:
    item = load("gsm8k_json", tmp_path)[2]
    assert item.gold == {"reasoning": "There are 2+1200=1202 pens.\nDone.", "answer": 1202}
    assert [m["content"] for m in item.messages] == [gsm8k.SYSTEM, "A box holds 2 pens and 1,200 more. How many?"]
    assert len(load("gsm8k_json_platinum", tmp_path)) == 6
    prose = load("gsm8k", tmp_path)[2]
    assert prose.gold == "1202"
    assert len(prose.messages) == 1


def test_gsm8k_answers_split_as_stated() -> None:
    assert gsm8k.split_answer("here", "a <<1+1=2>>b\n#### -1,234.5") == ("a b", "-1234.5")
    assert gsm8k.split_answer("here", "x #### y\n#### 18") == ("x #### y", "18")
    for bad in ("no mark 18", "#### eighteen", "#### ", "#### 1 8"):
        with pytest.raises(DataError, match="here: the answer column has no number"):
            gsm8k.split_answer("here", bad)


def test_structured_takes_the_sizes_in_turn(tmp_path: Path) -> None:
    items = load("structured", tmp_path)
    assert [item.level for item in items] == [1, 2, 3] * 4
    assert {item.details["config"] for item in items} == {"Github_easy", "Github_medium", "Github_hard"}
    assert all(item.gold is None and item.details["left_out"] == 0 for item in items)
    assert items[0].details["schema"] in items[0].messages[1]["content"]
    assert [i.level for i in load("structured", tmp_path, limit=2)] == [1, 2]


def test_structured_subset_is_fixed_whatever_the_order_of_rows() -> None:
    import hashlib

    schemas = [{"schema": row["json_schema"], "id": row["unique_id"]} for row in stand_ins.schemas(50)]
    chosen, left_out = json_schema_bench.select(schemas, 10)
    assert (json_schema_bench.select(schemas[::-1], 10)) == (chosen, left_out)
    keys = sorted(hashlib.sha256(s["id"].encode()).hexdigest() for s in schemas)[:10]
    assert [hashlib.sha256(c["id"].encode()).hexdigest() for c in chosen] == keys
    assert left_out == 0


BAD = ["{", "[]", "3", '{"type": "nonsense"}', '{"$ref": "https://example.org/x.json"}', '{"pattern": "("}']


@pytest.mark.parametrize("bad", [*BAD, json.dumps({"title": "x" * 16_000})])
def test_schemas_that_cannot_be_used_are_left_out_and_counted(bad: str) -> None:
    good = [{"schema": "{}", "id": str(i)} for i in range(10)]
    assert json_schema_bench.usable("{}")
    assert not json_schema_bench.usable(bad)
    chosen, left_out = json_schema_bench.select([*good, {"schema": bad, "id": "bad"}], 11)
    assert sorted(c["id"] for c in chosen) == [str(i) for i in range(10)]
    assert left_out == 1


@pytest.mark.parametrize("text", ['{"$ref": "#"}', '{"allOf": [{"$ref": "#"}]}', '{"items": {"$ref": "#"}}', "true"])
def test_recursive_schemas_do_not_end_the_load(text: str) -> None:
    assert json_schema_bench.usable(text) in (True, False)


@pytest.mark.parametrize("name", REAL)
def test_without_network_the_error_says_what_to_do(name: str) -> None:
    with pytest.raises(DataError) as caught:
        TASKS[name].load(Source())
    text = str(caught.value)
    path = re.search(r"[\w-]+/[\w.-]+", TASKS[name].origin)[0]  # type: ignore[index]
    assert text.startswith(f"{name}: the data set {path} cannot be had")
    assert f"hf download --repo-type dataset {path} --local-dir DIR" in text
    assert "--data DIR" in text
    assert str(TASKS[name].stand_in) in text
    assert ("hf auth login" in text and f"huggingface.co/datasets/{path}" in text) == (name == "gpqa_diamond")


class Response:
    """What the Hub client keeps of an answer."""

    def __init__(self, status: int) -> None:
        self.status_code, self.headers, self.request, self.text = status, {}, None, ""


@pytest.mark.parametrize("status", [401, 403])
def test_refusal_is_told_from_absence(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = OSError("no")
        error.response = Response(status)  # type: ignore[attr-defined]
        try:
            raise error
        except OSError as cause:
            raise FileNotFoundError("Dataset cannot be found") from cause

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"ask for access at https://huggingface\.co/datasets/a/b") as caught:
        from_hub("task", HubData("a/b", "test", None, {}), None)
    assert caught.value.gated


def test_a_gated_task_keeps_its_mark_through_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError("Access to dataset Idavidrein/gpqa is restricted", response=Response(403))  # type: ignore[arg-type]

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match="mcq_synth") as caught:
        TASKS["gpqa_diamond"].load(Source())
    assert caught.value.gated


def test_being_offline_is_no_refusal() -> None:
    assert not refused(ConnectionError("Couldn't reach a/b on the Hub (OfflineModeIsEnabled)"))
    assert not refused(ValueError("row 401x"))
    assert refused(OSError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub."))
    assert refused(OSError("403 Client Error: Forbidden"))


def test_rows_by_load_dataset_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` takes a folder where it takes a Hub name: the same call, without network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    stand_ins.jsonl(stand_ins.aime25(3), tmp_path / "repo" / "test.jsonl")
    by_hub = HubData(str(tmp_path / "repo"), "test", None, aime.COLUMNS)
    items = aime.load("aime25", by_hub, Source())
    assert items == aime.load("aime25", aime.AIME25, Source(str(tmp_path / "repo")))


def test_code_of_a_data_set_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or [])
    assert from_hub("task", HubData("a/b", "test", "main", {}), "main") == []
    assert calls == [(("a/b", "main"), {"split": "test"})]


def test_errors_of_a_folder(tmp_path: Path) -> None:
    data = HubData("a/b", "test", None, {"id": ("ID", "id")})
    for folder, message in ((tmp_path / "no", "is not a folder"), (tmp_path, r"holds no \.parquet")):
        with pytest.raises(DataError, match=f"{message}.*hf download --repo-type dataset a/b"):
            rows("task", data, Source(str(folder)))
    stand_ins.jsonl([{"name": 1}], tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="task: no column 'ID' or 'id'; the data has 'name'"):
        rows("task", data, Source(str(tmp_path)))
    stand_ins.jsonl([{"id": 1}, {"id": None}], tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="task: row 1 has nothing in column 'id'"):
        rows("task", data, Source(str(tmp_path)))
    (tmp_path / "test.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(DataError, match=r"test.jsonl is not a readable jsonl file"):
        rows("task", data, Source(str(tmp_path)))
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"test.parquet is not a readable parquet file"):
        rows("task", data, Source(str(tmp_path)))
    (tmp_path / "test.parquet").unlink()
    stand_ins.jsonl([], tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        rows("task", data, Source(str(tmp_path)))


def test_files_of_a_split(tmp_path: Path) -> None:
    names = [
        "main/test-0-of-2.parquet",
        "main/test-1-of-2.parquet",
        "main/latest.csv",
        "other/test.csv",
        "main/train.csv",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [f.relative_to(tmp_path).as_posix() for f in data_files(tmp_path, "test", "main")]
    assert found == ["main/test-0-of-2.parquet", "main/test-1-of-2.parquet"]


def test_edits_of_a_folder_are_noticed(tmp_path: Path) -> None:
    stand_ins.jsonl(stand_ins.aime25(3), tmp_path / "test.jsonl")
    first = aime.load("aime25", aime.AIME25, Source(str(tmp_path)))
    stand_ins.jsonl(stand_ins.aime25(4), tmp_path / "test.jsonl")
    assert len(aime.load("aime25", aime.AIME25, Source(str(tmp_path)))) == len(first) + 1
