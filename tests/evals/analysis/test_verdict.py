"""The last step: Holm over everything, sentences, spread of runs, checkpoints, the guard and the AIME gap."""

from __future__ import annotations

import json

import pytest

from evals import stats
from evals.analysis.task import analyse
from evals.analysis.verdict import checkpoint_curve, finish_result
from evals.result import Skipped
from evals.statistics.multiple import band
from tests.evals.made import SAMPLING, make_items, make_task, replies, subject

LOW, HIGH = [[0, 0]] * 12, [[1, 1]] * 12
MIXED = [[1, 0]] * 6 + [[0, 0]] * 3 + [[1, 1]] * 3
BETTER = [[1, 1]] * 6 + [[0, 0]] * 3 + [[1, 1]] * 3


def task_result(subjects, tables, **changes):
    graded = {s.name: replies(table) for s, table in zip(subjects, tables, strict=True)}
    return analyse(make_task(**changes), make_items(len(tables[0])), graded, subjects, SAMPLING)


def test_holm_over_tasks_and_candidates_by_hand():
    subjects = [subject("base"), subject("a"), subject("b")]
    # 6 questions rise: p = 2 / 64; 12 rise: 2 / 4096; none: 1.
    first = task_result(subjects, [MIXED, BETTER, MIXED], name="first")
    second = task_result(subjects, [LOW, HIGH, LOW], name="second")
    found = finish_result(subjects, [first, second], {})
    raw = [v.metrics["right"].comparison.p for task in (first, second) for v in task.versus]
    assert raw == [2 / 64, 1, 2 / 4096, 1]
    holm = [v.metrics["right"].p_holm for task in found.tasks for v in task.versus]
    assert holm == pytest.approx([3 * 2 / 64, 1, 4 * 2 / 4096, 1])
    assert [v.metrics["right"].verdict for task in found.tasks for v in task.versus] == [
        "no evidence",  # alone it would have been "better"
        "no evidence",
        "better",
        "no evidence",
    ]
    assert first.versus[0].metrics["right"].verdict == "better"
    assert first.versus[0].split.words.startswith("the gain is content")
    assert found.tasks[0].versus[0].split.words.startswith("the difference is content")
    seen = 100 * first.versus[0].metrics["right"].comparison.detectable
    assert found.verdict == (
        "a: better on second: +100.0 points [100.0, 100.0], p (Holm) = 0.002; "
        f"no evidence on first (could have seen {seen:.1f} points)",
        "b: no evidence on first, second (no question changed)",
    )
    json.dumps(found.as_json())


def test_no_op_adapter_says_nothing():
    subjects = [subject("base"), subject("noop")]
    found = finish_result(subjects, [task_result(subjects, [MIXED, MIXED])], {})
    assert found.verdict == ("noop: no evidence on sums (no question changed)",)
    assert (found.spread, found.guard, found.notes) == ((), None, ())


def test_spread_of_training_runs():
    subjects = [subject("base"), subject("s1"), subject("s2"), subject("later", step=10)]
    found = finish_result(subjects, [task_result(subjects, [MIXED, BETTER, MIXED, MIXED])], {}).spread
    assert len(found) == 1
    assert (found[0].task, found[0].gains) == ("sums", (0.25, 0.0))
    assert (found[0].mean, found[0].sd) == pytest.approx((0.125, 0.25 / 2**0.5))
    assert found[0].low < -1 < 1 < found[0].high  # two runs say little


def test_guard_names_losses_beside_the_target():
    subjects = [subject("base"), subject("a")]
    target = task_result(subjects, [LOW, HIGH], name="target")
    beside = task_result(subjects, [HIGH, LOW], name="beside")
    found = finish_result(subjects, [target, beside], {}, targets=["target"])
    assert found.guard == "a lost beside its target: beside -100.0 points [-100.0, -100.0]."
    fine = task_result(subjects, [MIXED, MIXED[::-1]], name="beside")
    blind = 100 * fine.versus[0].metrics["right"].comparison.detectable
    assert finish_result(subjects, [target, fine], {}, targets=["target"]).guard == (
        f"a: no loss seen beside the target on beside (could have seen {blind:.1f} points on beside)."
    )
    assert finish_result(subjects, [target], {}, targets=["target"]).guard is None
    with pytest.raises(ValueError, match="targets \\['other'\\]"):
        finish_result(subjects, [target], {}, targets=["other"])
    skipped = [Skipped("other", "gated")]
    assert finish_result(subjects, [target], {}, skipped, ["other"]).skipped == tuple(skipped)


def test_checkpoints_are_a_curve_with_a_simultaneous_band():
    subjects = [subject("base"), subject("c20", step=20), subject("c10", step=10)]
    task = task_result(subjects, [LOW, BETTER, MIXED])
    curve = checkpoint_curve(subjects, task)
    assert curve.k == (10, 20)
    assert curve.mean == (0.5, 0.75)
    means = [stats.question_scores(table).mean(1) for table in (MIXED, BETTER)]
    low, high = band(means)
    assert (curve.low, curve.high) == (tuple(low.tolist()), tuple(high.tolist()))
    single = stats.compare(LOW, BETTER)
    assert curve.high[1] - curve.low[1] > single.high - single.low
    notes = finish_result(subjects, [task], {}).notes
    assert notes[0].startswith("sums by checkpoint, points above the base, all at once at 95%: step 10 +50.0 [")
    assert checkpoint_curve(subjects[:2], task_result(subjects[:2], [LOW, BETTER])) is None


def test_checkpoints_of_templates_use_clusters():
    subjects = [subject("base"), subject("c1", step=1), subject("c2", step=2)]
    items = [i.__class__(**(vars(i) | {"group": str(n // 2)})) for n, i in enumerate(make_items(16))]
    rows = [[0, 0]] * 16, [[n % 3 > 0, 1] for n in range(16)], [[n % 2, 1] for n in range(16)]
    graded = {s.name: replies(row) for s, row in zip(subjects, rows, strict=True)}
    task = analyse(make_task(generated=True), items, graded, subjects, SAMPLING)
    curve = checkpoint_curve(subjects, task)
    low, _ = band([stats.question_scores(row).mean(1) for row in rows[1:]], groups=[str(n // 2) for n in range(16)])
    assert curve.low == tuple(low.tolist())
    assert curve.mean == tuple(v.metrics["right"].comparison.difference for v in task.versus)


def test_aime_gap_by_hand():
    subjects = [subject("base"), subject("a")]
    old = task_result(subjects, [HIGH, HIGH], name="aime24")
    new = task_result(subjects, [HIGH, MIXED], name="aime25")
    notes = finish_result(subjects, [old, new], {}).notes
    assert notes[0] == "base: AIME 2024 minus AIME 2025 is +0.0 points [0.0, 0.0]."
    error = stats.standard_error(stats.question_scores(MIXED).mean(1))
    half = 100 * stats.t_quantile(11) * error
    assert notes[1] == (
        f"a: AIME 2024 minus AIME 2025 is +50.0 points [{50 - half:.1f}, {50 + half:.1f}]; it may have seen AIME 2024."
    )
    assert finish_result(subjects, [old], {}).notes == ()
