"""The page: self-contained, complete, every number that of the Result, and no foreign text that acts as markup."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from evals.report.html import page
from evals.report.markdown import markdown
from evals.report.text import text
from evals.result import Result
from tests.evals.report.example import HOSTILE, result

VOID = {"meta"}


class Page(HTMLParser):
    """Tags in order, with a check that they nest; the text; cells of each table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.tables, self.links = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return "".join(self.words)

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def show(made: Result) -> Page:
    return Page(page(made, "A title"))


def changed(value, change):
    """The same Result with every string, keys included, changed alike; verdicts and headlines stay consistent."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, tuple):
        return tuple(changed(item, change) for item in value)
    if isinstance(value, Mapping):
        return {change(key): changed(item, change) for key, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: changed(getattr(value, f.name), change) for f in fields(value)})
    return value


def first_task(made: Result, **changes) -> Result:
    return replace(made, tasks=(replace(made.tasks[0], **changes), *made.tasks[1:]))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_nothing_is_fetched_and_nothing_runs(number):
    text = page(result(number), "A title")
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(found.tags)
    assert not re.search(r"https?:|//|url\(|@import|javascript:|\bon\w+=", text.replace("</", ""))
    assert not [key for _, key, _ in found.attributes if key in ("src", "srcset", "style") or key.startswith("on")]
    assert all(link.startswith("#") and link[1:] in found.values("id") for link in found.values("href"))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_headings_ids_and_names_for_screen_readers(number):
    text = page(result(number), "A title")
    found = Page(text)
    levels = [int(tag[1]) for tag in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(set(found.values("id"))) == len(found.values("id"))
    assert set(found.values("aria-labelledby")) <= set(found.values("id"))
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == found.tags.count("svg") > 5
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img" and root.get("aria-label")
    assert '<html lang="en">' in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_table_of_tasks_says_the_numbers_of_the_result():
    made = result(3)
    rows = show(made).tables[0][1:]
    expected = []
    for task in made.tasks:
        for i, versus in enumerate(task.versus, 1):
            c, p = versus.metrics[task.headline].comparison, versus.metrics[task.headline].p_holm
            low, high = f"{100 * c.low:+.1f}", f"{100 * c.high:+.1f}"
            expected.append(
                [
                    versus.candidate,
                    f"{100 * task.scores[0].metrics[task.headline].mean:.1f}%",
                    f"{100 * task.scores[i].metrics[task.headline].mean:.1f}%",
                    f"{100 * c.difference:+.1f} [{low}, {high}]".replace("-", "−"),
                    "< 0.001" if p < 0.001 else f"{p:.3f}",
                    f"{100 * c.detectable:.1f}",
                ]
            )
    assert [row[1:-1] for row in rows] == expected
    assert [row[-1].lstrip("▲▼ ") for row in rows] == [
        versus.metrics[task.headline].verdict for task in made.tasks for versus in task.versus
    ]
    assert [row[0] for row in rows][::2] == ["Competition integers generated", "GSM8K as JSON", "GPQA-Diamond gated"]


def test_sections_say_the_numbers_of_the_result():
    made = result(3)
    sections = page(made, "A title").split("<h2")[2:5]
    for task, markup in zip(made.tasks, sections, strict=True):
        found = Page("<main><h2" + markup.rpartition("</section>")[0] + "</main>").text
        for i, scores in enumerate(task.scores):
            e = scores.metrics[task.headline]
            assert f"{100 * e.mean:.1f}% [{100 * e.low:.1f}, {100 * e.high:.1f}]" in found
            assert f"{made.subjects[i].name} {100 * scores.truncated:.1f}%" in found
            assert f"pass@4: {100 * scores.pass_at.mean[2]:.1f}%" in found
        for versus in task.versus:
            paired, split = versus.metrics[task.headline], versus.split
            c = paired.comparison
            assert f"{c.n} questions: {c.wins} up, {c.losses} down, {c.ties} equal" in found
            low, high = (f"{100 * v:+.1f}".replace("-", "−") for v in paired.fixed)
            assert f"On these very questions (sampling noise only): [{low}, {high}]" in found
            parts = (
                f"{n} {100 * v:+.1f}" for n, v in (("format", split.from_format), ("content", split.from_content))
            )
            assert all(part.replace("-", "−") in found for part in parts) and split.words in found
        for parts in task.parts.values():
            for part in parts:
                assert f"{part.name} ({part.questions})" in found
                assert " → ".join(f"{100 * mean:.1f}%" for mean in part.means) in found


def test_base_alone_shows_scores_intervals_and_no_comparison():
    made = result(1)
    found = show(made)
    score = made.tasks[2].scores[0].metrics["correct"]
    assert found.tables[0][0] == ["Task", "Score", "95% interval", "Questions × replies", "Chance"]
    assert found.tables[0][3][1:] == [
        f"{100 * score.mean:.1f}%",
        f"{100 * score.low:.1f} to {100 * score.high:.1f}",
        "120 × 8",
        "25.0%",
    ]
    for absent in ("Holm", "Newly solved", "Each question", "Could have seen"):
        assert absent not in found.text


def test_everything_is_on_the_page():
    found = show(result(2)).text
    for wanted in (
        "dapo-r16 is better on Competition integers",
        "aime25: The Hub cannot be reached",
        "GPQA-Diamond, beside the target, lost points",
        "shares no 13-gram",
        "replies were cut at the token limit",
        "trl-ext eval --model Qwen/Qwen3-0.6B",
        "gumbel-1",
        "2.13.0",
        "base-5f1c0a9e",
        "By gold letter",
        "By level",
        "pass@k",
        "Several training runs",
        "60 questions × 8 replies, temperature 0.6, up to 4,096 tokens, top_p 0.95, top_k 20, seed 0",
    ):
        assert wanted in found
    assert "Checkpoints" not in found


def test_metrics_table_has_lengths_and_votes_of_every_subject():
    made = result(2)
    rows = {row[0]: row[1:3] for row in show(made).tables[1][1:]}
    scores = made.tasks[0].scores
    assert rows["mean tokens"] == [f"{sum(s.lengths) / len(s.lengths):,.0f}" for s in scores]
    assert rows["cut at the token limit"] == ["4.6%", "5.8%"]
    assert rows["mean tokens, wrong replies"] == ["1,830", "2,288"]
    vote = scores[1].majority
    assert rows["maj@8"][1] == f"{100 * vote.mean:.1f}% [{100 * vote.low:.1f}, {100 * vote.high:.1f}]"


def test_the_grammar_control_stands_beside_the_subjects():
    made = result(2)
    task = made.tasks[1]
    control = first_task(replace(made, tasks=made.tasks[1:]), control=task.scores[1], control_versus=task.versus[0])
    found = show(control)
    score, c = task.scores[1].metrics["valid_and_correct"], task.versus[0].metrics["valid_and_correct"].comparison
    estimate = f"{100 * score.mean:.1f}% [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    assert f"A grammar alone gives the base {estimate}: {100 * c.difference:+.1f} [" in found.text
    assert found.tables[1][0][:4] == ["Metric", "Qwen3-0.6B", "dapo-r16", "Qwen3-0.6B, grammar alone"]
    assert found.tables[1][1][3] == estimate
    assert f"A grammar alone gives the base {estimate}" in text(control)
    assert "A grammar alone" in markdown(control) and "A grammar alone" not in show(made).text


def test_checkpoints_of_a_run_become_a_curve():
    made = result(3)
    steps = (None, 250, 1500)
    subjects = tuple(replace(s, step=step) for s, step in zip(made.subjects, steps, strict=True))
    text = page(replace(made, subjects=subjects), "A title")
    assert "Checkpoints of one run" in text and "step 1,500: " in text and "step 250: " in text


def test_single_replies_have_no_curve_and_no_interval_of_sampling():
    found = show(result(2, samples=1)).text
    assert "pass@k" not in found and "On these very questions" not in found
    assert "60 questions × 1 reply" in found
    assert "On these very questions" in show(result(2)).text


def test_missing_pieces_leave_a_page():
    made = result(2)
    scores = tuple(
        replace(s, pass_at=None, majority=None, tokens_right=None, tokens_wrong=None, lengths=())
        for s in made.tasks[0].scores
    )
    versus = tuple(replace(v, split=None) for v in made.tasks[0].versus)
    bare = first_task(made, scores=scores, versus=versus, parts={}, questions=(), notes=(), sampling={})
    bare = replace(bare, spread=(), guard=None, skipped=(), notes=(), environment={})
    found = show(bare)
    assert "maj@8" not in [row[0] for row in found.tables[1]]
    assert "No task was run." in show(replace(result(1), tasks=(), verdict=("nothing",))).text


def test_no_spread_shows_a_dash_for_what_could_have_been_seen():
    made = result(2)
    task = made.tasks[0]
    paired = task.versus[0].metrics["correct"]
    flat = replace(paired.comparison, difference=0.0, low=0.0, high=0.0, standard_error=0.0, p=1.0, detectable=0.0)
    metrics = {"correct": replace(paired, comparison=flat, p_holm=1.0, verdict="no evidence")}
    versus = (replace(task.versus[0], metrics=metrics),)
    row = show(first_task(made, versus=versus)).tables[0][1]
    assert row[3:] == ["0.0 [0.0, 0.0]", "1.000", "–", "no evidence"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_hostile_text_in_every_field_changes_no_tag(number):
    harmless = page(changed(result(number), lambda text: text + "x"), "A titlex")
    hostile = page(changed(result(number), lambda text: text + HOSTILE), "A title" + HOSTILE)
    hostile.encode("utf-8")
    assert Page(hostile).tags == Page(harmless).tags
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufffe\ud800-\udfff]", hostile
    )
    assert "⟨U+202E⟩" in hostile and "␀" in hostile and "⟨U+D800⟩" in hostile
    for drawing in re.findall(r"<svg.*?</svg>", hostile, re.S):
        ElementTree.fromstring(drawing)


def test_long_texts_and_many_questions_are_cut_with_a_note():
    made = result(2)
    question = replace(
        made.tasks[0].questions[0], scores=(0.0, 1.0), replies=("a" * 1_000_000 + "end of base", "b" * 1_000_000)
    )
    questions = tuple(replace(question, id=f"id-{i}") for i in range(1319))
    text = page(first_task(made, questions=questions), "A title")
    assert len(text) < 1_000_000
    assert "id-14<" in text and "id-15<" not in text and "and 1,304 more, in results.json" in text
    assert "[… 996,011 characters left out …]" in text and "end of base" in text


def test_texts_of_a_gated_task_do_not_reach_the_page():
    made = result(2)
    task = made.tasks[0]
    secret = "The secret question of forty characters!"
    leaking = tuple(
        replace(q, prompt=secret, gold="gold of the secret question", replies=(secret, secret)) for q in task.questions
    )
    made = replace(first_task(made, gated=True, questions=leaking), notes=(f"first prompt: {secret}",))
    text = page(made, "A title")
    assert "secret" not in text and "first prompt: (gated)" in text
    assert task.questions[44].id in text and "ids and scores only" in text


def test_paths_and_tokens_do_not_reach_the_page():
    environment = {"command": "eval --adapter /home/jo/runs/a7", "HF_TOKEN": "hf_abcdefghijklmnop"}
    text = page(replace(result(2), environment=environment), "A title")
    assert "/home/jo" not in text and "hf_abc" not in text and "--adapter …/a7" in text
