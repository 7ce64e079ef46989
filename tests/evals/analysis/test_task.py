"""From graded replies to a task's result, on tables small enough to work out by hand."""

from __future__ import annotations

import pytest

from evals import stats
from evals.analysis.tables import Graded, build_table
from evals.analysis.task import analyse
from evals.task import Grade, Item, Metric
from tests.evals.made import SAMPLING, make_items, make_task, replies, reply, subject

BASE = [[1, 0], [0, 0], [1, 1], [0, 1]]
TUNED = [[1, 1], [0, 0], [1, 1], [1, 1]]
SUBJECTS = [subject("base"), subject("tuned")]


def run(task=None, items=None, base=None, tuned=None, **settings):
    graded = {"base": base or replies(BASE), "tuned": tuned or replies(TUNED)}
    return analyse(task or make_task(), items or make_items(4), graded, SUBJECTS, SAMPLING, **settings)


def test_scores_and_comparison_are_those_of_the_tables():
    found = run()
    assert found.samples == 2
    assert found.scores[0].metrics["right"] == stats.estimate(BASE)
    paired = found.versus[0].metrics["right"]
    assert paired.comparison == stats.compare(BASE, TUNED)
    assert (paired.p_holm, paired.fixed) == (None, None)  # Holm comes later; two replies tell nothing of their noise
    assert found.versus[0].candidate == "tuned"
    assert found.sampling["temperature"] == 0.6


def test_the_same_replies_are_no_evidence():
    found = run(tuned=replies(BASE)).versus[0]
    comparison = found.metrics["right"].comparison
    assert (comparison.difference, comparison.low, comparison.high, comparison.p) == (0, 0, 0, 1)
    assert found.metrics["right"].verdict == "no evidence"
    assert (found.split.from_format, found.split.from_content) == (0, 0)


def test_majority_and_pass_at_k_by_hand():
    scores = run().scores
    # q0 r,w: a tie, r came first: 1; q1 w,w: 0; q2 r,r: 1; q3 w,r: w came first: 0.
    assert scores[0].majority.mean == 0.5
    assert scores[0].pass_at.k == (1, 2)
    assert scores[0].pass_at.mean == (0.5, 0.75)
    assert scores[1].majority.mean == 0.75


def test_lengths_truncation_and_missing_answers():
    base = {
        "q0": [reply(1, 0, "r", tokens=10), reply(0, 1, None, tokens=100, truncated=True)],
        "q1": [reply(0, 0, "w", tokens=30), reply(0, 1, "w", tokens=20)],
        "q2": [reply(1, 0, "r", tokens=20), reply(1, 1, "r", tokens=30)],
        "q3": [reply(0, 0, "w", tokens=10), reply(1, 1, "r", tokens=40)],
    }
    found = run(base=base)
    scores = found.scores[0]
    assert scores.lengths == (10, 100, 30, 20, 20, 30, 10, 40)
    assert (scores.truncated, scores.no_answer) == (0.125, 0.125)
    assert (scores.tokens_right, scores.tokens_wrong) == (25, 40)
    assert [note for note in found.notes if "limit of 100 tokens" in note] == [
        "base: 12% of replies hit the limit of 100 tokens; a longer limit may change the score."
    ]
    assert run(tuned=replies([[1, 1]] * 4)).scores[1].tokens_wrong is None


def test_tasks_without_votes_have_no_majority_and_count_broken_formats():
    rows = {f"q{i}": [reply(0, s, None, valid=int(s == 0)) for s in range(2)] for i in range(4)}
    found = run(base=rows, tuned=rows)
    assert found.scores[0].majority is None
    assert found.scores[0].no_answer == 0.5
    silent = {f"q{i}": [reply(0, s, None) for s in range(2)] for i in range(4)}
    assert run(base=silent).scores[0].majority.mean == 0  # the other subject votes: silence loses


def test_split_and_the_content_factor():
    # Base: half of the replies valid, half of those right; tuned: all valid, three of four right.
    base = {f"q{i}": [reply(int(i < 1), s, valid=int(i < 2)) for s in range(2)] for i in range(4)}
    tuned = {f"q{i}": [reply(int(i < 3), s, valid=1) for s in range(2)] for i in range(4)}
    found = run(base=base, tuned=tuned).versus[0]
    assert found.split.base == (0.5, 0.5)
    assert found.split.candidate == (1.0, 0.75)
    assert found.split.from_format + found.split.from_content == pytest.approx(0.75 - 0.25)
    content = found.metrics["right given valid"]
    assert content.comparison.difference == pytest.approx(0.25)


def test_lower_is_better_turns_the_verdict():
    task = make_task(
        metrics={
            "right": Metric("right"),
            "valid": Metric("valid"),
            "rambling": Metric("long for nothing", higher_is_better=False),
        }
    )
    graded = [
        {f"q{i}": [reply(1, s, "r", rambling=value) for s in range(2)] for i in range(10)} for value in (1.0, 0.0)
    ]
    found = analyse(task, make_items(10), dict(zip(("base", "tuned"), graded, strict=True)), SUBJECTS, SAMPLING)
    paired = found.versus[0].metrics["rambling"]
    assert (paired.comparison.verdict, paired.verdict) == ("worse", "better")


def test_ratio_metrics_are_pooled_and_left_out_when_undefined():
    task = make_task(
        metrics={"right": Metric("right"), "valid": Metric("valid"), "precision": Metric("keys", ratio=("hit", "all"))}
    )
    base = {f"q{i}": [reply(1, s, "r", hit=i, all=4) for s in range(2)] for i in range(4)}
    none = {f"q{i}": [reply(1, s, "r", hit=0, all=0) for s in range(2)] for i in range(4)}
    found = run(task, base=base, tuned=none)
    assert found.scores[0].metrics["precision"].mean == (0 + 1 + 2 + 3) / 16
    assert "precision" not in found.scores[1].metrics
    assert "precision" not in found.versus[0].metrics
    assert "precision: unknown for tuned, nothing to divide by (all is 0 in all replies)." in found.notes


def test_parts_by_level_and_family():
    items = [Item(f"q{i}", f"q{i}", [], "x", group="ab"[i // 2], level=[1, 10, 1, 2][i]) for i in range(4)]
    parts = run(items=items).parts
    assert [(p.name, p.questions, p.means) for p in parts["level"]] == [
        ("1", 2, (0.75, 1.0)),
        ("2", 1, (0.5, 1.0)),
        ("10", 1, (0.0, 0.0)),
    ]
    assert [(p.name, p.means) for p in parts["family"]] == [("a", (0.25, 0.5)), ("b", (0.75, 1.0))]
    assert run().parts == {}


def rotated(question, rotation):
    names = ["gold", "x", "y", "z"]
    order = names[rotation:] + names[:rotation]
    options = dict(zip("ABCD", order, strict=True))
    return Item(f"{question}/{rotation}", question, [], "ABCD"[order.index("gold")], details={"options": options})


def test_rotated_choices_vote_for_options_and_show_letters():
    items = [rotated(q, r) for q in ("q0", "q1") for r in range(2)]  # gold at A, then at D
    letters = {"q0/0": "A", "q0/1": "A", "q1/0": "B", "q1/1": "A"}  # options gold, x; x, x
    rows = {
        item.id: [
            Graded(
                Grade({"right": float(letters[item.id] == item.gold), "valid": 1}, letters[item.id]), "", 5, False, 0
            )
        ]
        for item in items
    }
    found = run(make_task(kind="choice"), items, rows, rows)
    assert (found.samples, [q.scores[0] for q in found.questions]) == (2, [0.5, 0.0])
    assert found.scores[0].majority.mean == 0.5  # q0: gold first; q1: x twice, though under two letters
    assert [(p.name, p.questions, p.means[0]) for p in found.parts["gold letter"]] == [("A", 2, 0.5), ("D", 2, 0.0)]
    assert any(
        note.startswith("Letters: right A 50%, B 0%, D 50%; given by base A 75%, B 25%, D 0%") for note in found.notes
    )


def test_items_of_a_question_are_merged_by_sample_then_item():
    items = [rotated("q0", 0), rotated("q0", 1)]
    rows = {
        item.id: [Graded(Grade({"right": 0}, None), f"{item.id} {s}", 1, False, s) for s in (1, 0)] for item in items
    }
    table = build_table(items, rows, "base")
    assert [r.text for _, r in table.flat] == ["q0/0 0", "q0/1 0", "q0/0 1", "q0/1 1"]


def test_many_templates_become_the_unit_and_few_are_noted():
    items = [Item(f"q{i}", f"q{i}", [], "x", group=str(i // 2)) for i in range(16)]
    rows = [[i % 2, 1] for i in range(16)]
    groups = [str(i // 2) for i in range(16)]
    found = run(make_task(generated=True), items, replies(rows), replies([[1, 1]] * 16))
    assert found.scores[0].metrics["right"] == stats.estimate(rows, groups)
    assert found.versus[0].metrics["right"].comparison == stats.compare(rows, [[1, 1]] * 16, groups=groups)
    assert any("8 templates are the unit" in note for note in found.notes)
    few = run(make_task(generated=True), items[:14], replies(rows[:14]), replies(rows[:14]))
    assert few.scores[0].metrics["right"] == stats.estimate(rows[:14])
    assert any("come from 7 templates" in note for note in few.notes)
    own = [Item(f"q{i}", f"q{i}", [], "x", group=f"own {i}") for i in range(16)]
    assert run(make_task(generated=True), own, replies(rows), replies(rows)).notes == ()  # nothing to merge
    real = run(make_task(), items, replies(rows), replies(rows))  # subjects of a real benchmark are no templates
    assert real.scores[0].metrics["right"] == stats.estimate(rows) and real.notes == ()


def test_texts_are_kept_only_where_allowed():
    kept = run().questions[1]
    assert (kept.prompt, kept.gold, kept.replies) == ("what is 1 + 1?", "2", ("reply 0", "reply 0"))
    found = run(make_task(gated=True))
    assert all((q.prompt, q.gold, q.replies) == (None, None, None) for q in found.questions)
    assert found.questions[1].scores == (0.0, 0.0)


def test_notes_of_the_task_and_the_caller():
    found = run(make_task(memorable="published in 2024"), notes=["the limit is 90 tokens"])
    assert found.notes == ("the limit is 90 tokens", "published in 2024")


def test_base_alone():
    found = analyse(make_task(), make_items(4), {"base": replies(BASE)}, SUBJECTS[:1], SAMPLING)
    assert found.versus == ()
    assert len(found.scores) == 1


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({k: v for k, v in replies(BASE).items() if k != "q2"}, "subject base, item q2: samples \\[\\]"),
        (replies([[1, 0], [0], [1, 1], [0, 1]]), "item q1: samples \\[0\\] where \\[0, 1\\]"),
        (replies([[1], [0], [1], [0]]), "different numbers of replies"),
        ({f"q{i}": [Graded(Grade({"valid": 1}, None), "", 1, False, s) for s in (0, 1)] for i in range(4)}, "'right'"),
    ],
)
def test_incomplete_replies(base, message):
    with pytest.raises(ValueError, match=message):
        run(base=base)


def test_impossible_tasks():
    with pytest.raises(ValueError, match="headline must be a mean"):
        run(make_task(metrics={"right": Metric("", higher_is_better=False), "valid": Metric("")}))
    with pytest.raises(ValueError, match="no replies of tuned"):
        analyse(make_task(), make_items(4), {"base": replies(BASE)}, SUBJECTS, SAMPLING)


def test_reliability_is_told_from_eight_replies_on():
    """4 of 8 right: 4 drawn hold at least 2 right in 1 - (C(4,0) C(4,4) + C(4,1) C(4,3)) / C(8,4) = 53/70; all right: 1."""
    rows = [[1.0] * 4 + [0.0] * 4, [1.0] * 8]
    found = run(make_task(), make_items(2), replies(rows), replies(rows))
    share = (53 / 70 + 1) / 2
    assert f"G-Pass@4, at least half of 4 replies right: base {share:.1%}, tuned {share:.1%}." in found.notes
