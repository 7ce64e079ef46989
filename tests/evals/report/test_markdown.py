"""The model card's Markdown and the Hub's metadata."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results

from evals.report.markdown import escape, markdown, model_index
from tests.evals.report.example import HOSTILE, result


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_says_the_numbers():
    made = result(3)
    lines = markdown(made).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| task"))
    rows = [cells(line) for line in lines[start + 2 : start + 8]]
    found = [(t, i, v) for t in made.tasks for i, v in enumerate(t.versus, 1)]
    for row, (task, index, versus) in zip(rows, found, strict=True):
        c, score = versus.metrics[task.headline].comparison, task.scores[index].metrics[task.headline]
        assert row[1] == versus.candidate and row[-1] == versus.metrics[task.headline].verdict
        assert row[3] == f"{100 * score.mean:.1f}% \\[{100 * score.low:.1f}, {100 * score.high:.1f}\\]"
        assert row[4].startswith(f"{100 * c.difference:+.1f} ") and row[6] == f"{100 * c.detectable:.1f}"
    assert rows[0][0] == "Competition integers (generated)" and rows[2][0] == "GSM8K as JSON"


def test_verdict_protocol_and_versions_but_no_questions():
    text = markdown(result(2))
    for wanted in ("**dapo-r16 is better", "temperature 0.6", "versions torch: 2.13.0", "aime25 was not run", "Holm"):
        assert wanted in text
    assert "lattice" not in text and "boxed" not in text
    assert "Holm" not in markdown(result(1))


def test_foreign_text_has_no_meaning():
    assert escape("a|b\n# c <b> _d_ `e` [f](g) *h* under_score") == (
        "a\\|b \\# c &lt;b&gt; \\_d\\_ \\`e\\` \\[f\\](g) \\*h\\* under_score"
    )
    made = result(2)
    bad = replace(made, tasks=(replace(made.tasks[0], title=HOSTILE + "|", notes=(HOSTILE,)), *made.tasks[1:]))
    text = markdown(bad)
    text.encode("utf-8")
    assert "<script" not in text and "<img" not in text
    widths = {len(line.replace("\\|", "").split("|")) for line in text.splitlines() if line.startswith("|")}
    assert widths == {10}  # eight columns between nine bars


def test_model_index_is_what_the_hub_reads():
    made = result(2)
    index = model_index(made, "jo/dapo-r16")
    name, entries = model_index_to_eval_results(json.loads(json.dumps(index)))
    assert name == "jo/dapo-r16"
    assert [e.dataset_name for e in entries[::2]] == [
        "Competition integers (generated)",
        "GSM8K as JSON",
        "GPQA-Diamond",
    ]
    assert entries[0].dataset_type == "generated/aime_synth" and entries[2].dataset_type == "gsm8k_json"
    for task, score, gain in zip(made.tasks, entries[::2], entries[1::2], strict=True):
        paired = task.versus[0].metrics[task.headline]
        assert score.metric_value == round(100 * task.scores[1].metrics[task.headline].mean, 2)
        assert gain.metric_value == round(100 * paired.comparison.difference, 2)
        assert gain.metric_name == f"gain over Qwen3-0.6B, points: {paired.verdict}"


def test_model_index_of_the_base_alone_and_of_several():
    (entry,) = model_index(result(1), "base")
    assert [len(r["metrics"]) for r in entry["results"]] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"which of Qwen3-0\.6B, dapo-r16, grpo-r16"):
        model_index(result(3), "x")
    (second,) = model_index(result(3), "x", subject="grpo-r16")
    expected = result(3).tasks[0].scores[2].metrics["correct"].mean
    assert second["results"][0]["metrics"][0]["value"] == round(100 * expected, 2)
