"""Replies on disk: what a kill leaves is used, what cannot be trusted is refused, and the key knows every setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.generation.store import ABOUT, Reply, Store, StoreError, text_hash

ABOUT_ONE = {name: name for name in ABOUT} | {"task": "t", "sampling": {"temperature": 0.6}}


def reply(item: str, sample: int = 0, text: str = "hello", prompt: str = "p") -> Reply:
    return Reply(item, sample, text_hash(prompt), text, 3, "stop")


def written(folder: Path, *replies: Reply, rank: int = 0) -> Store:
    store = Store(folder, ABOUT_ONE, rank)
    with store.writing():
        store.append(replies)
    return store


def test_what_is_written_is_read_by_item_sample_and_prompt(tmp_path: Path) -> None:
    odd = reply("b", 1, 'lone \ud800 surrogate, "quotes"\nand lines\x00')
    changed = reply("a", 0, "other words", prompt="p2")
    store = written(tmp_path, reply("a"), odd, changed)
    found = Store(tmp_path, ABOUT_ONE).read()
    assert found == {
        ("a", 0, text_hash("p")): reply("a"),
        ("b", 1, text_hash("p")): odd,
        ("a", 0, text_hash("p2")): changed,
    }
    about = json.loads(next(tmp_path.glob("t-*.json")).read_text())
    assert about == ABOUT_ONE | {"key": store.key}


def test_a_half_written_line_is_cut_off_and_writing_goes_on(tmp_path: Path) -> None:
    written(tmp_path, reply("a"), reply("b"))
    path = next(tmp_path.glob("*.jsonl"))
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert set(Store(tmp_path, ABOUT_ONE).read()) == {("a", 0, text_hash("p"))}
        written(tmp_path, reply("b"))
        assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    written(tmp_path, reply("a"), reply("b"))
    path = next(tmp_path.glob("*.jsonl"))
    path.write_text(path.read_text().replace('"item": "a"', '"item "a"'))
    with pytest.raises(StoreError, match=r"jsonl, line 1 is damaged: remove the line"):
        Store(tmp_path, ABOUT_ONE).read()


def test_two_answers_to_one_question_are_refused(tmp_path: Path) -> None:
    written(tmp_path, reply("a"), reply("a"))
    assert len(Store(tmp_path, ABOUT_ONE).read()) == 1, "the same words twice are one reply"
    written(tmp_path, reply("a", text="other"))
    with pytest.raises(StoreError, match="item a, sample 0 was answered before, in other words"):
        Store(tmp_path, ABOUT_ONE).read()


def test_processes_write_files_of_their_own_and_read_all(tmp_path: Path) -> None:
    written(tmp_path, reply("a"))
    written(tmp_path, reply("b"), rank=1)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert {name[0] for name in Store(tmp_path, ABOUT_ONE, 1).read()} == {"a", "b"}


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, ABOUT_ONE)
    with store.writing(), pytest.raises(StoreError, match="another evaluation is writing"):
        with Store(tmp_path, ABOUT_ONE).writing():
            pass


@pytest.mark.parametrize("name", ABOUT)
def test_every_setting_changes_the_key(tmp_path: Path, name: str) -> None:
    assert Store(tmp_path, ABOUT_ONE).key != Store(tmp_path, ABOUT_ONE | {name: "other"}).key
    with pytest.raises(ValueError, match=f"a store needs {name}"):
        Store(tmp_path, {k: v for k, v in ABOUT_ONE.items() if k != name})
