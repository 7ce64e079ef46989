"""The commands on a real, tiny model: what is written, what is printed, and what is said about wrong requests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evals.cli import GATE_FAILED
from evals.report.files import load
from tests.evals.test_models import adapter
from tests.tiny import tiny_path
from trl_ext.cli import USAGE_ERROR, main

SMALL = ["--limit", "3", "--samples", "2", "--max-new-tokens", "8", "--preset", "offline"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(*words: str) -> int:
    return main(
        [
            "eval",
            "--model",
            tiny_path(max_position_embeddings=4096),
            "--tasks",
            "aime_synth,schema_synth",
            *SMALL,
            *words,
        ]
    )


def test_base_and_adapter_from_start_to_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = adapter(folder / "mine")
    assert ask("--adapter", str(one.folder), "--temperature", "0.9") == 0
    assert "mine: no evidence on" in capsys.readouterr().out
    result = load(folder / "evals_out" / "mine")
    assert [subject.name for subject in result.subjects] == ["base", "mine"]
    assert any("mine is active" in note for note in result.notes)
    content = json.loads((folder / "evals_out/mine/results.json").read_text())
    assert content["results"]["aime_synth"]["accuracy,all"] == result.tasks[0].scores[1].metrics["accuracy"].mean
    assert "<html" in (folder / "evals_out/mine/report.html").read_text()
    assert ask("--adapter", str(one.folder), "--temperature", "0.9") == 0
    assert (folder / "evals_out" / "mine-2").exists(), "a report is never written over"
    assert main(["regrade", "evals_out/mine"]) == 0
    assert load(folder / "evals_out" / "mine") == result
    assert main(["report", "evals_out/mine"]) == 0
    again = json.loads((folder / "evals_out/mine/results.json").read_text())
    assert again["results"] == content["results"] and again["trl_ext"] == content["trl_ext"]
    assert main(["compare", "evals_out/mine", "evals_out/mine-2", "--fail-if", "not-better"]) == GATE_FAILED


def test_an_untrained_adapter_shows_exactly_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idle = adapter(folder / "idle", scale=0)
    assert ask("--adapter", str(idle.folder)) == USAGE_ERROR
    assert "the adapter idle changes nothing" in capsys.readouterr().err
    assert ask("--adapter", str(idle.folder), "--allow-inactive") == 0
    for task in load(folder / "evals_out" / "idle").tasks:
        for paired in task.versus[0].metrics.values():
            assert (paired.comparison.difference, paired.comparison.p) == (0, 1)
            assert paired.verdict == "no evidence"


def test_several_adapters_show_the_spread_of_training(folder: Path) -> None:
    several = [
        word for seed in range(3) for word in ("--adapter", str(adapter(folder / f"s{seed}", seed=seed).folder))
    ]
    assert ask(*several) == 0
    result = load(folder / "evals_out" / "s2")
    assert [len(spread.gains) for spread in result.spread] == [3, 3]


def test_a_whole_model_can_be_the_candidate(folder: Path) -> None:
    other = tiny_path(initializer_range=0.4, max_position_embeddings=4096)
    assert ask("--candidate", other) == 0
    (found,) = (folder / "evals_out").glob("tiny-*")
    assert [subject.model for subject in load(found).subjects] == [
        Path(tiny_path(max_position_embeddings=4096)).name,
        Path(other).name,
    ]


def test_subjects_of_one_name_are_told_apart(folder: Path) -> None:
    """Two folders `x/same` and `y/same`, one never trained: each is evaluated, and neither hides the base."""
    first, second = adapter(folder / "x" / "same", seed=1), adapter(folder / "y" / "same", scale=0)
    third = adapter(folder / "base", seed=2)
    words = [word for a in (first, second, third) for word in ("--adapter", str(a.folder))]
    assert ask(*words, "--allow-inactive", "--out", "out") == 0
    result = load(folder / "out")
    assert [s.name for s in result.subjects] == ["base", "same", "same-2", "base-2"]
    assert len({s.key for s in result.subjects}) == 4
    base, trained, idle, other = zip(*(q.replies for q in result.tasks[0].questions if q.replies), strict=True)
    assert idle == base and len({base, trained, other}) == 3
    assert any("same-2 changes nothing" in note for note in result.notes)


def test_a_model_with_other_tokens_cannot_be_the_candidate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "other"
    shutil.copytree(tiny_path(max_position_embeddings=4096), other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    assert ask("--candidate", str(other)) == USAGE_ERROR
    assert "other has another vocabulary" in capsys.readouterr().err
    assert ask("--candidate", tiny_path(max_position_embeddings=4096, initializer_range=0.3), "--out", "fine") == 0


def test_end_tokens_and_tokenizer_are_part_of_the_key(folder: Path) -> None:
    model = folder / "model"
    shutil.copytree(tiny_path(max_position_embeddings=4096), model)
    words = ["eval", "--model", str(model), "--tasks", "aime_synth", *SMALL]
    assert main(words) == 0
    files = set((folder / "evals_out" / "replies").glob("*.jsonl"))
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 77]}))
    assert main(words) == 0
    assert len(set((folder / "evals_out" / "replies").glob("*.jsonl")) - files) == 1


def test_the_grammar_control_is_shown_beside_structured_tasks(folder: Path) -> None:
    assert ask("--control", "--out", "with_control", "--max-new-tokens", "60") == 0
    plain, structured = load(folder / "with_control").tasks
    assert plain.control is None and structured.control is not None
    assert structured.control.metrics["json_validity"].mean >= structured.scores[0].metrics["json_validity"].mean


def test_a_judge_chooses_among_replies(folder: Path) -> None:
    (folder / "shortest.py").write_text(
        "def score(completions, **_):\n    return [-len(c[0]['content']) for c in completions]\n"
    )
    assert ask("--judge", "shortest.score", "--out", "judged") == 0
    for task in load(folder / "judged").tasks:
        (curve,) = task.best_of
        assert curve is not None and curve.k == (1, 2)
        assert any("under shortest.score: judge's AUC" in note for note in task.notes)


def test_planning_asks_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--min-effect", "5") == 0
    said = capsys.readouterr().out
    assert "aime_synth: 5 points on 3 questions: not detectable" in said and "assumed" in said
    assert not (folder / "evals_out").exists()
    one = adapter(folder / "mine")
    assert ask("--adapter", str(one.folder)) == 0
    capsys.readouterr()
    assert ask("--min-effect", "5", "--pilot", "evals_out/mine") == 0
    assert "from the pilot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "aime25x"], "no task or group 'aime25x': did you mean 'aime25'?"),
        (["--tasks", "aime_synth", "--targets", "gsm"], "no task or group 'gsm'"),
        (["--tasks", "aime_synth", "--temperature", "-1"], "must not be negative"),
        (["--tasks", "aime_synth", "--model", "/nowhere/at/all"], "cannot load a tokenizer from '/nowhere/at/all'"),
        (["--tasks", "aime_synth", "--adapter", "/nowhere"], "adapter '/nowhere' is no local folder"),
        (["runs/none"], "runs/none is no run of `trl-ext train`"),
        (["--tasks", "aime24", "--model", tiny_path()], "no task can be run"),
        (["--tasks", "aime_synth", "--model", tiny_path(), "--backend", "vllm"], "needs vLLM"),
        (["x", "--model", "y"], "name runs, or --model"),
        (["--tasks", "aime_synth", "--model", tiny_path(), "--checkpoints"], "--checkpoints is for runs"),
        (["--tasks", "aime_synth", "--pilot", "x"], "--pilot is for --min-effect"),
        (["--tasks", "aime_synth", "--looks", "8,4"], "expected increasing numbers of samples"),
    ],
)
def test_wrong_requests_end_with_words(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["eval", *words]) == USAGE_ERROR
    assert said in capsys.readouterr().err


def test_files_that_are_no_reports_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert main(["report", "empty"]) == USAGE_ERROR
    assert main(["regrade", "empty"]) == USAGE_ERROR
    assert main(["compare", "empty", "empty"]) == USAGE_ERROR
    assert capsys.readouterr().err.count("empty") >= 3


def test_the_list_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--tasks", "help"]) == 0
    said = capsys.readouterr().out
    assert "gpqa_diamond" in said and "group offline: " in said
