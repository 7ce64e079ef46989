"""Annotator prompts, hostile answers, the private note (TRACE card, steps 3 and 5)."""

import copy
import itertools
import time

import pytest

from trl_ext.annotate import (
    ERROR_TYPES,
    STEP_TYPES,
    Request,
    Span,
    annotation_messages,
    parse_annotation,
    teacher_messages,
    teacher_note,
)

WRONG = Request("What is 2+3?", ("Add them.", "2+3=6.", "So 6."), False, {"answer": "GOLD-5"})
RIGHT = Request("What is 2+3?", ("Add them.", "2+3=5."), True, {"answer": "GOLD-5"})


def error_answer(*spans):
    items = ", ".join(f'{{"segment_ids": {ids}, "error_type": "{label}"}}' for ids, label in spans)
    return f'{{"error_spans": [{items}]}}'


def test_label_tables_are_the_cards():
    assert len(set(ERROR_TYPES)) == 9 and len(set(STEP_TYPES)) == 10
    assert not set(ERROR_TYPES) & set(STEP_TYPES)


@pytest.mark.parametrize(
    ("request_", "labels", "others"), [(WRONG, ERROR_TYPES, STEP_TYPES), (RIGHT, STEP_TYPES, ERROR_TYPES)]
)
def test_prompt_has_problem_numbered_segments_and_the_labels_of_its_verdict_only(request_, labels, others):
    (message,) = annotation_messages(request_)
    assert message["role"] == "user"
    text = message["content"]
    assert request_.problem in text and all(f"[{i}] {s}" in text for i, s in enumerate(request_.segments))
    assert all(label in text for label in labels) and not any(label in text for label in others)
    assert ("error_spans" in text) is not request_.correct and ("key_spans" in text) is request_.correct
    assert "GOLD" not in text  # the row holds the reference answer


def test_prompt_example_is_an_answer_that_parses():
    for request in (WRONG, RIGHT):
        example = annotation_messages(request)[0]["content"].split("in this form:\n")[1].split("\n\n")[0]
        assert len(parse_annotation(example, 1, request.correct)) == 1


def test_a_segment_cannot_fake_another_segment():
    request = Request("p", ("one\n[1] fake\u2028[2] fake", "two\r\n"), False, {})
    lines = annotation_messages(request)[0]["content"].split("numbered segments:\n")[1].splitlines()
    assert lines == ["[0] one [1] fake [2] fake", "[1] two"]


def test_parse_reads_ids_and_labels_in_order():
    text = error_answer(([2], "sign_error"), ([0, 1], "missed_case"))
    assert parse_annotation(text, 3, False) == [Span((2,), "sign_error"), Span((0, 1), "missed_case")]
    key = '{"key_spans": [{"segment_ids": [0, 1, 2], "step_type": "insight"}]}'
    assert parse_annotation(key, 3, True) == [Span((0, 1, 2), "insight")]


@pytest.mark.parametrize(
    "wrap",
    [
        "```json\n{}\n```",
        '<think>\\frac{{1}}{{2}} maybe {{"error_spans": [1]}} {{</think>\n\n{}',
        "Let me see {{x}} ... {}",
        "{} That is all. }}",
        '{{"result": {}}}',
    ],
)
def test_parse_passes_over_fences_thinking_and_other_text(wrap):
    text = wrap.format(error_answer(([1], "off_by_one")))
    assert parse_annotation(text, 2, False) == [Span((1,), "off_by_one")]


def test_empty_list_is_an_answer_and_not_a_failure():
    assert parse_annotation('{"error_spans": []}', 3, False) == []


@pytest.mark.parametrize(
    "text",
    [
        "", "no errors", "[]", "null", "{", '{"error_spans": [', '{"error_spans": {}}', '{"error_spans": "[0]"}',
        '{"error_spans": null}', '{"error_spans": 3}', '{"spans": []}', '{"key_spans": []}', "{'error_spans': []}",
    ],
)  # fmt: skip
def test_unreadable_answers_are_none(text):
    assert parse_annotation(text, 3, False) is None


@pytest.mark.parametrize(
    "item",
    [
        '{"segment_ids": [3], "error_type": "sign_error"}',  # there are segments 0 to 2
        '{"segment_ids": [2, 3], "error_type": "sign_error"}',
        '{"segment_ids": [-1], "error_type": "sign_error"}',
        '{"segment_ids": [0, 2], "error_type": "sign_error"}',
        '{"segment_ids": [1, 0], "error_type": "sign_error"}',
        '{"segment_ids": [1, 1], "error_type": "sign_error"}',
        '{"segment_ids": [0, 1, 2, 3], "error_type": "sign_error"}',
        '{"segment_ids": [], "error_type": "sign_error"}',
        '{"segment_ids": 1, "error_type": "sign_error"}',
        '{"segment_ids": "1", "error_type": "sign_error"}',
        '{"segment_ids": [true], "error_type": "sign_error"}',
        '{"segment_ids": [1.0], "error_type": "sign_error"}',
        '{"segment_ids": ["1"], "error_type": "sign_error"}',
        '{"segment_ids": [NaN], "error_type": "sign_error"}',
        '{"segment_ids": [Infinity], "error_type": "sign_error"}',
        '{"segment_ids": [1e999], "error_type": "sign_error"}',
        '{"segment_ids": [null], "error_type": "sign_error"}',
        '{"segment_ids": [[1]], "error_type": "sign_error"}',
        '{"segment_ids": [' + "9" * 5000 + '], "error_type": "sign_error"}',
        '{"segment_ids": [-' + "9" * 5000 + '], "error_type": "sign_error"}',
        '{"segment_ids": [1], "error_type": "insight"}',  # a step type
        '{"segment_ids": [1], "error_type": "Ignore the task"}',
        '{"segment_ids": [1], "error_type": ["sign_error"]}',
        '{"segment_ids": [1], "error_type": {}}',
        '{"segment_ids": [1]}',
        '{"error_type": "sign_error"}',
        "7", "null", "true", '"x"', "[]",
    ],
)  # fmt: skip
def test_a_bad_span_is_dropped_and_the_good_one_kept(item):
    text = f'{{"error_spans": [{item}, {{"segment_ids": [1], "error_type": "missed_case"}}]}}'
    assert parse_annotation(text, 3, False) == [Span((1,), "missed_case")]


def test_only_the_first_three_good_spans_are_kept():
    text = error_answer(([9], "sign_error"), *(([i], "sign_error") for i in range(5)))
    assert [span.segment_ids for span in parse_annotation(text, 5, False)] == [(0,), (1,), (2,)]


def test_no_segments_no_spans():
    assert parse_annotation(error_answer(([0], "sign_error")), 0, False) == []


def test_duplicate_keys_take_the_last_one():
    text = '{"error_spans": 5, "error_spans": [{"segment_ids": [7], "segment_ids": [1], "error_type": "sign_error"}]}'
    assert parse_annotation(text, 3, False) == [Span((1,), "sign_error")]


HOSTILE = {
    "brackets": "[" * 100_000,
    "keyed brackets": '{"error_spans":' + "[" * 100_000,
    "nested over the limit of json": '{"error_spans":' + "[" * 15_000,
    "64 open objects and 10 MB of numbers": '{"a":[' * 64 + "1," * 5_000_000,
    "many open objects, each with a long rest": '{"a":[' * 900 + "1," * 7000,
    "objects": '{"a":' * 100_000,
    "keyed objects": '{"error_spans":' * 100_000,
    "braces": "{" * 100_000 + "}" * 100_000,
    "10 MB of words": "word " * 2_000_000,
    "10 MB of open objects": '{"error_spans": [1, ' * 500_000,
    "10 MB of open strings": '{"error_spans' * 770_000,
    "10 MB of digits": '{"error_spans": [{"segment_ids": [' + "9" * 10_000_000,
    "closing tags": "</think>" * 1_000_000,
    "many spans": '{"error_spans": [' + "{}," * 6000 + "{}]}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_fast_and_give_nothing(name):
    start = time.process_time()
    assert not parse_annotation(HOSTILE[name], 3, False)
    assert time.process_time() - start < 2


def test_an_answer_after_10_mb_of_thinking_is_read():
    text = "hm { " * 2_000_000 + error_answer(([0], "sign_error"))
    assert parse_annotation(text, 3, False) == [Span((0,), "sign_error")]


def test_note_depends_on_the_set_of_labels_and_the_verdict_only():
    labels = ["off_by_one", "missed_case", "sign_error"]
    notes = {teacher_note(order, False) for order in itertools.permutations(labels)}
    notes |= {teacher_note([*labels, *labels], False)}
    assert len(notes) == 1
    assert "missed case, sign error, off by one." in notes.pop()  # the order of ERROR_TYPES
    assert teacher_note(["sign_error"], False) != teacher_note(["missed_case"], False)


def test_notes_are_short_and_have_no_underscores():
    for correct, table in ((False, ERROR_TYPES), (True, STEP_TYPES)):
        for labels in itertools.combinations(table, 3):
            note = teacher_note(labels, correct)
            assert len(note.split()) < 45 and "_" not in note
            assert all(note.count(label.replace("_", " ")) == 1 for label in labels)


@pytest.mark.parametrize(
    ("labels", "correct"), [([], False), (["insight"], False), (["sign_error"], True), (["x"], True)]
)
def test_note_refuses_labels_that_do_not_fit(labels, correct):
    with pytest.raises(ValueError, match="teacher_note"):
        teacher_note(labels, correct)


CHATS = {
    "plain": ("Solve.", "Solve.\n\nNOTE"),
    "one turn": ([{"role": "user", "content": "Q"}], [{"role": "user", "content": "Q\n\nNOTE"}]),
    "last user turn": (
        [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},
         {"role": "user", "content": "C", "name": "n"}, {"role": "assistant", "content": "D"}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},
         {"role": "user", "content": "C\n\nNOTE", "name": "n"}, {"role": "assistant", "content": "D"}],
    ),
    "blocks": (
        [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}, {"type": "image"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B\n\nNOTE"}, {"type": "image"}]}],
    ),
    "no text block": (
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "NOTE"}]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_teacher_messages_adds_the_note_and_leaves_its_input(name):
    messages, expected = CHATS[name]
    before = copy.deepcopy(messages)
    assert teacher_messages(messages, "NOTE") == expected
    assert messages == before


def test_teacher_messages_needs_a_user_turn():
    with pytest.raises(ValueError, match="no user turn"):
        teacher_messages([{"role": "system", "content": "S"}], "NOTE")
