"""All generated suites: fixed content, prefix stability, seeds, distinct questions, limits."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from evals.data import aime_synth, gsm_json_synth, mcq_synth, sandbox_json, schema_synth
from evals.data.build import Redraw, agree, draw_all, fingerprint, first
from evals.data.suites import FINGERPRINTS
from evals.task import Item, Source

SUITES = {m.NAME: m.load for m in (aime_synth, gsm_json_synth, mcq_synth, sandbox_json, schema_synth)}
suites = pytest.mark.parametrize("name", sorted(SUITES))


def questions(items: list[Item]) -> list[str]:
    return list(dict.fromkeys(item.question for item in items))


@suites
def test_content_is_the_published_one(name: str) -> None:
    assert fingerprint(SUITES[name](Source(limit=200))) == FINGERPRINTS[name]


def test_content_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from evals.data import schema_synth, mcq_synth; from evals.data.build import fingerprint; "
        "from evals.task import Source; print(*(fingerprint(m.load(Source(limit=200))) for m in (mcq_synth, schema_synth)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [FINGERPRINTS["mcq_synth"], FINGERPRINTS["schema_synth"]]


@suites
@pytest.mark.parametrize("seed", [0, 1])
def test_first_questions_do_not_depend_on_how_many_are_asked(name: str, seed: int) -> None:
    everything = SUITES[name](Source(limit=120, seed=seed))
    for n in (1, 7, 24, 119):
        some = SUITES[name](Source(limit=n, seed=seed))
        assert some == everything[: len(some)]
        assert len(questions(some)) == n


@suites
def test_two_hundred_questions_by_default_all_different(name: str) -> None:
    items = SUITES[name](Source())
    assert len(questions(items)) == 200
    assert len({item.id for item in items}) == len(items)
    assert len({json.dumps(item.messages) for item in items}) == len(items)


@suites
def test_seeds_share_no_id_and_hardly_a_question(name: str) -> None:
    one, two = (SUITES[name](Source(limit=60, seed=seed)) for seed in (0, 1))
    assert not {i.id for i in one} & {i.id for i in two}
    texts = [{i.messages[-1]["content"] for i in items} for items in (one, two)]
    assert len(texts[0] & texts[1]) < 0.1 * len(texts[0])


@suites
def test_items_survive_json(name: str) -> None:
    for item in SUITES[name](Source(limit=16)):
        for value in (item.gold, item.details, item.messages):
            assert json.loads(json.dumps(value)) == value


@suites
def test_no_id_holds_text_of_its_question(name: str) -> None:
    for item in SUITES[name](Source(limit=16)):
        assert item.id.removeprefix(item.question) in ("", "/r0", "/r1", "/r2", "/r3")
        assert item.question.removeprefix(f"{name}-0-").isdigit()


@pytest.mark.parametrize("limit", [0, -1, 1.0, 0.5, True, "3"])
@suites
def test_a_limit_is_a_whole_number_of_questions(name: str, limit: object) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        SUITES[name](Source(limit=limit))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, 1.0])
def test_rows_are_cut_by_the_same_rule(limit: object) -> None:
    assert first([1, 2, 3], 2) == [1, 2]
    assert first([1, 2, 3], None) == [1, 2, 3]
    assert first([1, 2, 3], 9) == [1, 2, 3]
    with pytest.raises(ValueError, match="whole number"):
        first([1, 2, 3], limit)  # type: ignore[arg-type]


def test_a_family_that_has_run_out_is_an_error_not_a_loop() -> None:
    seen: set[int] = set()

    def draw(i: int) -> int:
        if i % 3 in seen:
            raise Redraw
        seen.add(i % 3)
        return i % 3

    assert draw_all("three", 3, draw) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"three: no new question 1 in 2000 draws: ask for 0 or fewer"):
        draw_all("three", 4, draw)


def test_solvers_that_disagree_stop_the_build() -> None:
    assert agree("here", 3, 3) == 3
    with pytest.raises(RuntimeError, match="here: the two solvers disagree, 3 against 4"):
        agree("here", 3, 4)


def test_families_take_turns() -> None:
    for name, size in (("aime_synth", 12), ("gsm_json_synth", 24), ("mcq_synth", 8), ("schema_synth", 8)):
        items = SUITES[name](Source(limit=24))
        counts = Counter(item.group for item in items if not item.id.endswith(("/r1", "/r2", "/r3")))
        assert set(counts.values()) == {24 // size}, name
        assert len(counts) == size


def test_fingerprint_sees_every_field() -> None:
    base = Item("a", "q", [{"role": "user", "content": "x"}], 1)
    others = [
        Item("b", "q", base.messages, 1),
        Item("a", "r", base.messages, 1),
        Item("a", "q", [{"role": "user", "content": "y"}], 1),
        Item("a", "q", base.messages, 2),
        Item("a", "q", base.messages, 1, "g"),
        Item("a", "q", base.messages, 1, "", 2),
        Item("a", "q", base.messages, 1, "", None, {"k": 1}),
    ]
    assert len({fingerprint([item]) for item in [base, *others]}) == 8
    assert fingerprint([base, others[0]]) != fingerprint([others[0], base])
    assert fingerprint([Item("a", "q", [{"content": "x", "role": "user"}], 1)]) == fingerprint([base])
