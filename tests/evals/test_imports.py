"""Runs of lm-eval and lighteval: paired by document and prompt, refused when they are not the same questions."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from evals import stats
from evals.compare import Mismatch
from evals.foreign import compare_files
from evals.imports import ImportProblem, read_runs

TIME = "2026-01-02T03-04-05.000001"
BASE = {i: float(i % 3 == 0) for i in range(12)}
TUNED = {i: float(i % 3 != 1) for i in range(12)}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def line(i, score, prompt="ask", filter_name="none", **more):
    return {
        "doc_id": i,
        "doc": {"question": f"q{i}"},
        "doc_hash": digest(f"q{i}"),
        "prompt_hash": digest(f"{prompt} q{i}"),
        "filter": filter_name,
        "metrics": ["exact_match"],
        "exact_match": score,
    } | more


def samples(folder, rows, task="gsm8k", results=None):
    folder.mkdir(exist_ok=True)
    (folder / f"samples_{task}_{TIME}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if results is not None:
        (folder / f"results_{TIME}.json").write_text(json.dumps(results))
    return folder


def test_pairs_by_document_not_by_position(tmp_path):
    a = samples(tmp_path / "a", [line(i, BASE[i]) for i in range(12)])
    b = samples(tmp_path / "b", [line(i, TUNED[i], doc_id=11 - i) for i in reversed(range(12))])
    (found,) = compare_files(a, b)
    assert found.paired.comparison == stats.compare(list(BASE.values()), list(TUNED.values()))
    assert (found.task, found.metric, found.dropped, found.mismatches) == ("gsm8k", "exact_match", (0, 0), ())
    assert found.paired.p_holm == found.paired.comparison.p
    assert found.words.startswith("gsm8k (exact_match): no evidence, +33.3 points [")
    (same,) = compare_files(a, a)
    assert (same.paired.comparison.difference, same.paired.comparison.p) == (0, 1)


def test_a_question_may_hold_any_line_separator(tmp_path):
    """lm-eval writes them as they are (ensure_ascii=False); str.splitlines() splits at U+2028, U+2029 and U+0085."""
    rows = [line(i, BASE[i], doc={"question": f"q{i} \u2028 \u2029 \x85 \x0c"}) for i in range(12)]
    folder = samples(tmp_path / "a", rows)
    (path,) = folder.iterdir()
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (run,) = read_runs(folder)
    assert len(run.rows) == 12


def test_questions_of_one_run_only_are_dropped_and_counted(tmp_path):
    a = samples(tmp_path / "a", [line(i, BASE[i]) for i in range(10)])
    b = samples(tmp_path / "b", [line(i, TUNED[i]) for i in range(3, 12)])
    (found,) = compare_files(a, b)
    assert found.paired.comparison.n == 7
    assert found.dropped == (3, 2)
    assert "Left out: 3 questions that only the first run has, 2 that only the second has." in found.words
    far = samples(tmp_path / "c", [line(i, 1.0) for i in range(20, 25)])
    with pytest.raises(ImportProblem, match="share 0 questions"):
        compare_files(a, far)


def test_other_prompts_are_refused(tmp_path):
    a = samples(tmp_path / "a", [line(i, BASE[i]) for i in range(12)])
    b = samples(tmp_path / "b", [line(i, TUNED[i], prompt="ask" if i else "please") for i in range(12)])
    with pytest.raises(Mismatch, match="gsm8k: prompts: 1 of the shared questions"):
        compare_files(a, b)
    (found,) = compare_files(a, b, allow_mismatch=True)
    assert found.paired.comparison.n == 12
    assert "Not the same settings: prompts: 1" in found.words


def test_settings_from_the_results_file(tmp_path):
    def results(tokens):
        return {
            "versions": {"gsm8k": 3},
            "n-shot": {"gsm8k": 5},
            "configs": {"gsm8k": {"generation_kwargs": {"max_gen_toks": tokens}, "repeats": 1}},
            "chat_template_sha": None,
        }

    a = samples(tmp_path / "a", [line(i, BASE[i]) for i in range(12)], results=results(256))
    b = samples(tmp_path / "b", [line(i, TUNED[i]) for i in range(12)], results=results(2048))
    with pytest.raises(Mismatch, match=r"generation_kwargs: .*256\} against .*2048\}"):
        compare_files(a, b)
    c = samples(tmp_path / "c", [line(i, TUNED[i]) for i in range(12)], results=results(256))
    assert compare_files(a, c)[0].mismatches == ()


def test_filters_and_metrics_are_chosen_by_name(tmp_path):
    rows = [line(i, s, filter_name=f) for f, s in (("strict-match", 0.0), ("flexible-extract", 1.0)) for i in range(4)]
    a = samples(tmp_path / "a", rows)
    with pytest.raises(ImportProblem, match="choose one of flexible-extract, strict-match"):
        read_runs(a)
    with pytest.raises(ImportProblem, match="no filter loose; there are flexible-extract, strict-match"):
        read_runs(a, choice="loose")
    (run,) = read_runs(a, choice="flexible-extract")
    assert {row.scores for row in run.rows.values()} == {(1.0,)}
    two = [line(i, 1.0, metrics=["exact_match", "f1"], f1=0.5) for i in range(4)]
    b = samples(tmp_path / "b", two)
    with pytest.raises(ImportProblem, match="choose one of exact_match, f1"):
        read_runs(b)
    assert {row.scores for row in read_runs(b, metric="f1")[0].rows.values()} == {(0.5,)}
    with pytest.raises(ImportProblem, match="no metric bleu; there are exact_match, f1"):
        read_runs(b, metric="bleu")


def test_lists_are_replies(tmp_path):
    a = samples(tmp_path / "a", [line(i, [1, 0, 0, i % 2]) for i in range(4)])
    b = samples(tmp_path / "b", [line(i, [1, 1, 0, 1]) for i in range(4)])
    (found,) = compare_files(a, b)
    assert found.paired.comparison.difference == pytest.approx(0.375)
    assert found.paired.fixed is not None


def test_duplicates_and_bad_files(tmp_path):
    a = samples(tmp_path / "a", [line(0, 1.0), line(1, 1.0), line(0, 0.0)])
    with pytest.raises(ImportProblem, match="occurs twice"):
        read_runs(a)
    samples(tmp_path / "deep", [line(0, 1.0)])
    samples(tmp_path / "deep" / "er", [line(0, 1.0)])
    with pytest.raises(ImportProblem, match="task gsm8k occurs in"):
        read_runs(tmp_path / "deep")
    with pytest.raises(ImportProblem, match="no samples_"):
        read_runs(tmp_path / "nowhere")
    old = samples(tmp_path / "old", [{"doc_id": 0, "exact_match": 1.0}])
    with pytest.raises(ImportProblem, match=r"line 1: no doc_hash or prompt_hash"):
        read_runs(old)
    with pytest.raises(ImportProblem, match="only scores from 0 to 1"):
        read_runs(samples(tmp_path / "f", [line(0, 31.5), line(1, 2.0)]))
    x, y = (samples(tmp_path / t, [line(i, 1.0) for i in range(3)], task=t) for t in ("x", "y"))
    with pytest.raises(ImportProblem, match="no task in common: x in"):
        compare_files(x, y)


def test_holm_over_the_tasks_of_two_folders(tmp_path):
    for name, table in (("a", BASE), ("b", TUNED)):
        for task in ("one", "two"):
            samples(tmp_path / name, [line(i, table[i]) for i in range(12)], task=task)
    found = compare_files(tmp_path / "a", tmp_path / "b")
    assert [f.task for f in found] == ["one", "two"]
    assert found[0].paired.p_holm == pytest.approx(2 * found[0].paired.comparison.p)


def test_verdict_uses_the_adjusted_p(tmp_path):
    # 6 questions rise and 6 stay: p = 2 / 64 alone, 4 / 64 with a second task.
    for name, score in (("a", 0.0), ("b", 1.0)):
        for task in ("one", "two"):
            samples(tmp_path / name, [line(i, score if i < 6 else 1.0) for i in range(12)], task=task)
    first, second = (tmp_path / name / f"samples_one_{TIME}.jsonl" for name in "ab")
    assert compare_files(first, second)[0].paired.verdict == "better"
    found = compare_files(tmp_path / "a", tmp_path / "b")
    assert [f.paired.verdict for f in found] == ["no evidence", "no evidence"]
    assert found[0].paired.comparison.verdict == "better"


def test_files_that_lm_eval_wrote(tmp_path):
    from lm_eval.loggers import EvaluationTracker

    for name, table in (("a", BASE), ("b", TUNED)):
        tracker = EvaluationTracker(output_path=str(tmp_path / name))
        tracker.general_config_tracker.model_name_sanitized = "tiny"
        tracker.date_id = TIME
        rows = [
            line(i, table[i], target="1", arguments=[(f"ask q{i}", {})], resps=[["x"]], filtered_resps=["x"])
            for i in range(12)
        ]
        tracker.save_results_samples("gsm8k", rows)
    (found,) = compare_files(tmp_path / "a", tmp_path / "b")
    assert found.paired.comparison == stats.compare(list(BASE.values()), list(TUNED.values()))


def details(folder, rows):
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), folder / f"details_lighteval|aime24|0_{TIME}.parquet")
    return folder


def new_layout(table, prompt="ask"):
    return [
        {
            "doc": {"query": f"q{i}", "choices": ["1"], "gold_index": [0], "task_name": "aime24"},
            "model_response": {"input": f"{prompt} q{i}", "text": ["x"]},
            "metric": {"pass@1": score},
        }
        for i, score in table.items()
    ]


def old_layout(table, as_text):
    return [
        {
            "example": f"q{i}",
            "full_prompt": f"ask q{i}",
            "gold": ["1"],
            "predictions": ["x"],
            "metrics": str({"pass@1": score}) if as_text else {"pass@1": score},
        }
        for i, score in table.items()
    ]


@pytest.mark.parametrize(
    "layout", [new_layout, lambda t: old_layout(t, False), lambda t: old_layout(t, True)], ids=["new", "old", "text"]
)
def test_lighteval_layouts(tmp_path, layout):
    a, b = (details(tmp_path / name, layout(table)) for name, table in (("a", BASE), ("b", TUNED)))
    (found,) = compare_files(a, b)
    assert (found.task, found.metric) == ("lighteval|aime24|0", "pass@1")
    assert found.paired.comparison == stats.compare(list(BASE.values()), list(TUNED.values()))


def test_lighteval_prompts_and_unknown_columns(tmp_path):
    a, b = details(tmp_path / "a", new_layout(BASE)), details(tmp_path / "b", new_layout(TUNED, "please"))
    with pytest.raises(Mismatch, match="12 of the shared questions"):
        compare_files(a, b)
    with pytest.raises(ImportProblem, match="neither lighteval's columns"):
        read_runs(details(tmp_path / "c", [{"x": 1}]))


def test_a_metric_that_is_better_when_lower_is_read_so(tmp_path):
    """All questions go from 0 to 1: worse where the results file says that lower is better, better where it says nothing."""
    lower = {"higher_is_better": {"gsm8k": {"exact_match": False}}}
    for results, verdict in ((lower, "worse"), (None, "better")):
        folders = [
            samples(tmp_path / f"{verdict}{value}", [line(i, value) for i in range(12)], results=results)
            for value in (0.0, 1.0)
        ]
        (found,) = compare_files(*folders)
        assert found.paired.verdict == verdict and f": {verdict}, +100.0 points" in found.words
