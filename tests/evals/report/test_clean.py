"""What is hidden, shown and cut: paths, tokens, gated texts, control characters, long replies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals.report.clean import cut, gated_texts, publishable, scrub, scrub_text, visible
from tests.evals.report.example import result


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ntext\twith tab", "plain\ntext\twith tab"),
        ("a\r\nb\rc", "a\nb␍c"),
        ("\x00\x1b[31m\x7f\x85", "␀␛[31m␡⟨U+0085⟩"),
        ("\u202eabc\u2066\u200b\ufeff", "⟨U+202E⟩abc⟨U+2066⟩⟨U+200B⟩⟨U+FEFF⟩"),
        ("\ud800\udfff\ufffe\U0001ffff\u2028", "⟨U+D800⟩⟨U+DFFF⟩⟨U+FFFE⟩⟨U+1FFFF⟩⟨U+2028⟩"),
        ("é, 数学, 😀, ∑", "é, 数学, 😀, ∑"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown
    shown.encode("utf-8")


def test_cut_keeps_both_ends_and_counts_what_is_left_out():
    assert cut("abcdef", 6) == "abcdef"
    assert cut("a" * 5 + "x" * 1_000 + "b" * 5, 10) == "aaaaa\n[… 1,000 characters left out …]\nbbbbb"


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("/home/jo/runs/a7", "…/a7"),
        ("--data=/mnt/x/gpqa.csv, then", "--data=…/gpqa.csv, then"),
        ('open("/tmp/a/b.json")', 'open("…/b.json")'),
        ("~/models/qwen", "…/qwen"),
        ("~jo", "~jo"),
        ("file:///home/jo/x", "…/x"),
        ("C:\\Users\\jo\\adapter", "…/adapter"),
        ("https://huggingface.co/Qwen/Qwen3-8B", "https://huggingface.co/Qwen/Qwen3-8B"),
        ("https://jo:pw@host/a/b", "https://host/a/b"),
        ("Qwen/Qwen3-0.6B outputs/run/a and/or 1/2 ./x/y", "Qwen/Qwen3-0.6B outputs/run/a and/or 1/2 ./x/y"),
        ("/no_think", "/no_think"),
        ("token hf_AbCdEfGh1234 and sk-proj-1234567890", "token <token> and <token>"),
        ("<function f at 0x7f00aa>", "<function f>"),
        ("task-specific risk-averse-people", "task-specific risk-averse-people"),
    ],
)
def test_scrub_text(text, scrubbed):
    assert scrub_text(text) == scrubbed
    assert scrub_text(scrubbed) == scrubbed


def test_scrub_hides_home_and_working_folder(monkeypatch, tmp_path):
    folder = tmp_path / "my folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert str(tmp_path) not in scrub_text(f"in {folder}, {folder}/a, {Path.home()} and {Path.home()}/b/c")
    assert str(Path.home()) not in scrub_text(f"{Path.home()}")


def test_scrub_gives_plain_data_without_code_and_samples():
    found = scrub(
        {
            "a": Path("/home/jo/x"),
            "process_results": "def score(doc, results):\n    return 1",
            "custom": test_cut_keeps_both_ends_and_counts_what_is_left_out,
            "samples": ["a question"],
            "nested": {"/home/jo/key": (1, np.float64(0.5), {"hf_AbCdEfGh1234"})},
            "none": None,
            "yes": True,
        }
    )
    assert found == {
        "a": "…/x",
        "nested": {"…/key": [1, 0.5, ["<token>"]]},
        "none": None,
        "yes": True,
    }


def test_publishable_twice_is_publishable_once_and_keeps_texts_of_open_tasks():
    made = replace(result(2), notes=("see /home/jo/notes/a.txt",))
    once = publishable(made)
    assert publishable(once) == once
    assert once.notes == ("see …/a.txt",)
    assert once.tasks[0].questions == made.tasks[0].questions


def test_publishable_drops_texts_of_gated_tasks_wherever_they_occur():
    made = result(2)
    secret = "a long enough secret prompt"
    gated = made.tasks[2]
    carried = tuple(replace(q, prompt=secret, gold="A", replies=("x", "y")) for q in gated.questions)
    made = replace(made, tasks=(*made.tasks[:2], replace(gated, questions=carried, notes=(f"see {secret}",))))
    assert gated_texts(made) == [secret]
    found = publishable(made)
    assert {(q.prompt, q.gold, q.replies) for q in found.tasks[2].questions} == {(None, None, None)}
    assert found.tasks[2].notes == ("see (gated)",)
    assert secret not in repr(found)
