"""The whole path with models of known accuracy: data, replies, store, grading, lm-eval's numbers, verdict, files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from evals import cli
from evals.generation.collect import fitted
from evals.generation.store import StoreError
from evals.models import ModelError
from evals.report.files import load
from evals.result import Result
from evals.run import ready_tasks
from evals.score import score
from evals.session import Session, load_session
from evals.settings import Settings, SettingsError, sampling_for
from evals.task import DataError, Sampling
from evals.tasks import TASKS, get_tasks
from tests.evals.data import stand_ins
from tests.evals.scripted import Script, Scripted, ScriptedEngine, plan

NAMES = ("aime_synth", "gsm_json_synth", "mcq_synth", "schema_synth", "sandbox_json")


def evaluation(settings: Settings, base: float, **candidates: float) -> Scripted:
    ready, skipped = ready_tasks(settings)
    items = {item.id: (one.task, item) for one in ready for item in one.items}
    scripts = {name: Script(items, p) for name, p in {None: base, **candidates}.items()}
    one = Scripted(plan(*candidates), settings, ready, skipped, lambda count, total: None)
    identity = {"base": "b"} | {name: f"w-{name}-{p}" for name, p in candidates.items()}
    one.engine = ScriptedEngine(scripts, one.plan.base, identity)
    return one


def settings(folder: Path, *names: str, samples: int = 2, **changes: object) -> Settings:
    tasks = tuple(get_tasks(names or NAMES))
    given = {"limit": 20, "preset": "offline", "store": str(folder / "replies"), "samples": samples}
    return Settings(tasks, **given | changes)


def result_of(session: Session) -> Result:
    return score(session).result


def test_known_accuracies_are_found_and_the_verdicts_have_the_right_sign(tmp_path: Path) -> None:
    covered = 0
    for name in NAMES:  # one report each: Holm over many candidates and tasks would hide what 8 families can show
        chosen = settings(tmp_path, name, limit=100, samples=4)
        (task,) = result_of(evaluation(chosen, 0.5, better=0.7, same=0.5, worse=0.3).go()).tasks
        for scores, p in zip(task.scores, (0.5, 0.7, 0.5, 0.3), strict=True):
            found = scores.metrics[task.headline]
            covered += found.low <= p <= found.high
        verdicts = {v.candidate: v.metrics[task.headline] for v in task.versus}
        assert [verdicts[c].verdict for c in ("better", "same", "worse")] == ["better", "no evidence", "worse"], name
        same = verdicts["same"].comparison
        assert (same.difference, same.low, same.high, same.p, same.ties) == (0, 0, 0, 1, same.n), "no-op is exactly 0"
    assert covered >= 17, "of 20 intervals of 95 %; fewer than 17 has a chance of 2 in 100"


def test_a_small_difference_has_the_right_sign(tmp_path: Path) -> None:
    result = result_of(evaluation(settings(tmp_path, "gsm_json_synth", limit=200, samples=4), 0.5, c=0.6).go())
    found = result.tasks[0].versus[0].metrics["valid_and_correct"].comparison
    assert found.low <= 0.1 <= found.high and found.difference > 0


def test_lm_evals_own_numbers_are_ours(tmp_path: Path) -> None:
    one = evaluation(settings(tmp_path, samples=3), 0.4, c=0.8)
    session = one.go()
    scored = score(session, one.tokenizer, {})
    for index, subject in enumerate(session.subjects):
        theirs = scored.lm_eval[subject.name]["results"]
        for task in scored.result.tasks:
            grouped = any(question.group for question in task.questions) and task.name != "gsm_json_synth"
            for name, found in task.scores[index].metrics.items():
                if f"{name},all" in theirs[task.name] and not (grouped and TASKS[task.name].metrics[name].ratio):
                    mean = sum(q.scores[index] for q in task.questions) / len(task.questions)
                    expected = mean if name == task.headline else found.mean
                    if not grouped or name == task.headline:
                        assert theirs[task.name][f"{name},all"] == pytest.approx(expected, abs=1e-9), (task.name, name)
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"} <= set(
        scored.lm_eval["c"]
    )


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = evaluation(settings(tmp_path / "whole"), 0.4, c=0.8)
    expected = result_of(whole.go())
    asked = {name: len(script.asked) for name, script in whole.engine.scripts.items()}
    for name, dies_after in ((None, 0), (None, 2), ("c", 1)):
        broken = evaluation(settings(tmp_path / "killed"), 0.4, c=0.8)
        broken.engine.scripts[name].dies_after = dies_after
        with pytest.raises(KeyboardInterrupt):
            broken.go()
    again = evaluation(settings(tmp_path / "killed"), 0.4, c=0.8)
    found = result_of(again.go())
    assert dataclasses.replace(found, environment={}) == dataclasses.replace(expected, environment={})
    for path in (tmp_path / "whole" / "replies").glob("*.jsonl"):
        other = tmp_path / "killed" / "replies" / path.name
        assert sorted(path.read_text().splitlines()) == sorted(other.read_text().splitlines())
    assert len(again.engine.scripts[None].asked) == 0 < len(again.engine.scripts["c"].asked) < asked["c"]


def test_more_samples_and_questions_ask_only_for_what_is_missing(tmp_path: Path) -> None:
    evaluation(settings(tmp_path, "gsm_json_synth", limit=10, samples=2), 0.5, c=0.6).go()
    more = evaluation(settings(tmp_path, "gsm_json_synth", limit=15, samples=3), 0.5, c=0.6)
    more.go()
    asked = more.engine.scripts[None].asked
    assert len(asked) == 15 * 3 - 10 * 2
    assert len({(job.item, job.sample) for job in asked}) == len(asked)


def test_another_adapter_asks_the_base_nothing_again(tmp_path: Path) -> None:
    evaluation(settings(tmp_path), 0.5, c=0.6).go()
    other = evaluation(settings(tmp_path), 0.5, d=0.7)
    other.go()
    assert other.engine.scripts[None].asked == [] and other.engine.scripts["d"].asked


def test_every_setting_that_changes_replies_asks_anew(tmp_path: Path) -> None:
    evaluation(settings(tmp_path, "aime_synth"), 0.5).go()
    for change in ({"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}, {"max_new_tokens": 50}, {"seed": 3}):
        again = evaluation(settings(tmp_path, "aime_synth", **change), 0.5)
        again.go()
        assert again.engine.scripts[None].asked, change
    same = evaluation(settings(tmp_path, "aime_synth"), 0.5)
    same.go()
    assert same.engine.scripts[None].asked == []


def test_regrading_gives_the_same_files_without_a_model(tmp_path: Path) -> None:
    session = evaluation(settings(tmp_path), 0.4, c=0.8).go()
    folder = tmp_path / "report"
    folder.mkdir()
    session.save(folder)
    cli.write_report(str(folder), session)
    first = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert cli.run(_args("regrade", str(folder))) == 0
    second = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in ("report.html", "report.md", "session.json"):
        assert first[name] == second[name]
    ours = [json.loads(files["results.json"])["trl_ext"] for files in (first, second)]
    assert ours[0] == ours[1]
    assert load_session(folder) == dataclasses.replace(session, store=load_session(folder).store)


def _args(*words: str) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers(dest="command"))
    return parser.parse_args(words)


def test_grading_refuses_what_was_not_answered(tmp_path: Path) -> None:
    session = evaluation(settings(tmp_path, "aime_synth"), 0.5).go()
    asked = session.tasks[0]
    other = dataclasses.replace(asked, fingerprint="another")
    with pytest.raises(StoreError, match="its questions are not those that were answered"):
        result_of(dataclasses.replace(session, tasks=(other,)))
    longer = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, samples=3))
    with pytest.raises(StoreError, match="20 of 60 replies are not in"):
        result_of(dataclasses.replace(session, tasks=(longer,)))


def test_a_dead_adapter_is_refused_before_the_first_question(tmp_path: Path) -> None:
    one = evaluation(settings(tmp_path, "aime_synth"), 0.5, c=0.6)
    one.engine.change = 0.0
    with pytest.raises(ModelError, match="the adapter c changes nothing"):
        one.go()
    assert one.engine.scripts[None].asked == []
    allowed = evaluation(settings(tmp_path, "aime_synth", allow_inactive=True), 0.5, c=0.5)
    allowed.engine.change = 0.0
    assert result_of(allowed.go()).tasks[0].versus[0].metrics["accuracy"].verdict == "no evidence"


def test_missing_data_is_skipped_replaced_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = ("aime24", "gsm_json_synth")
    ready, skipped = ready_tasks(settings(tmp_path, *names))
    assert [one.task.name for one in ready] == ["gsm_json_synth"]
    assert skipped[0].name == "aime24" and "aime_synth" in skipped[0].reason
    ready, skipped = ready_tasks(settings(tmp_path, *names, missing="stand-in"))
    assert [one.task.name for one in ready] == ["aime_synth", "gsm_json_synth"]
    assert "says nothing about aime24" in ready[0].notes[0]
    with pytest.raises(DataError):
        ready_tasks(settings(tmp_path, *names, missing="fail"))
    with pytest.raises(DataError, match="no task can be run"):
        ready_tasks(settings(tmp_path, "aime24"))
    ready, _ = ready_tasks(settings(tmp_path, "aime24", "aime25", missing="stand-in"))
    assert [one.task.name for one in ready] == ["aime_synth"], "both years have one stand-in, which is asked once"
    ready, _ = ready_tasks(settings(tmp_path, "aime24", "aime_synth", missing="stand-in"))
    assert [one.task.name for one in ready] == ["aime_synth"], "nor is it asked again where it was named"


def test_the_real_tasks_run_the_same_code_on_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = [task.name for task in TASKS.values() if not task.generated]
    for name in real:
        stand_ins.make(name, tmp_path / "data" / name)
    chosen = settings(tmp_path, *real, data=str(tmp_path / "data"), limit=None, preset="quick", samples=None)
    one = evaluation(chosen, 0.2, c=0.9)
    assert [ready.task.name for ready in one.ready] == real and not one.skipped
    session = one.go()
    assert {ready.task.name: ready.sampling.samples for ready in one.ready}["aime24"] == 8
    cli.write_report(str(tmp_path / "report"), session)
    result = load(tmp_path / "report")
    for task in result.tasks:
        assert task.versus[0].metrics[task.headline].comparison.difference > 0.3, task.name
    gpqa = next(task for task in result.tasks if task.name == "gpqa_diamond")
    assert (len(gpqa.questions), gpqa.samples) == (8, 4), "a question is its four rotations"
    assert any("AIME 2024 minus AIME 2025" in note for note in result.notes)
    secret = stand_ins.gpqa()[3]["Question"]
    assert any(
        secret in json.dumps(item.messages, ensure_ascii=False).replace("\\n", "\n") for item in one.ready[2].items
    )
    files = [path for path in (tmp_path / "report").rglob("*") if path.is_file()]
    assert len(files) == 5, "results, page, card, and lm-eval's numbers of two subjects"
    for path in files:
        written = path.read_text()
        assert "is it another?" not in written, f"{path.name} holds a gated question"
    (tmp_path / "data" / "aime24" / "aime_2024_problems.parquet").unlink()
    _, skipped = ready_tasks(chosen)
    assert [one.name for one in skipped] == ["aime24"] and "Maxwell-Jia/AIME_2024" in skipped[0].reason


def test_a_prompt_is_never_cut() -> None:
    asked = Sampling(2, 1.0, max_new_tokens=100)
    assert fitted("t", asked, 50, None) == (asked, None)
    assert fitted("t", asked, 50, 150) == (asked, None)
    shorter, note = fitted("t", asked, 51, 150)
    assert shorter == dataclasses.replace(asked, max_new_tokens=99)
    assert note == "the limit is 99 new tokens, not 100: the model's context has 150 tokens"
    with pytest.raises(DataError, match="the longest prompt of t has 140 tokens and the model's context is 150"):
        fitted("t", asked, 140, 150)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 0}, "samples 0 must be at least 1"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k -1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": 0.0}, "2 samples at temperature 0 would all be the same"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    chosen = dataclasses.replace(settings(tmp_path, "aime_synth"), **change)
    with pytest.raises(SettingsError, match=f"aime_synth: .*{words}"):
        sampling_for(TASKS["aime_synth"], chosen)


def test_two_reports_are_compared_on_their_stored_replies(tmp_path: Path) -> None:
    from evals.compare import Mismatch
    from evals.merge import compare_reports

    for name, p in (("x", 0.4), ("y", 0.8)):
        session = evaluation(settings(tmp_path, "aime_synth", "mcq_synth"), 0.5, **{name: p}).go()
        (tmp_path / name).mkdir()
        session.save(tmp_path / name)
    merged = result_of(compare_reports(tmp_path / "x", tmp_path / "y"))
    assert [subject.name for subject in merged.subjects] == ["x: x", "y: y"]
    assert merged.tasks[0].versus[0].metrics["accuracy"].comparison.difference > 0.1
    other = evaluation(settings(tmp_path, "aime_synth", temperature=0.3), 0.5, z=0.8).go()
    (tmp_path / "z").mkdir()
    other.save(tmp_path / "z")
    with pytest.raises(Mismatch, match=r"sampling.temperature: 1.0 against 0.3"):
        compare_reports(tmp_path / "x", tmp_path / "z")
    noted = compare_reports(tmp_path / "x", tmp_path / "z", allow_mismatch=True)
    assert any("compared although they differ" in note for note in noted.notes)


def test_what_differs_is_compared_when_it_is_allowed(tmp_path: Path) -> None:
    """Another number of questions and of samples: the shared ones count, and the report says what differs."""
    from evals.merge import compare_reports

    for name, p, change in (("x", 0.4, {}), ("y", 0.8, {"limit": 12, "samples": 1})):
        session = evaluation(settings(tmp_path, "aime_synth", **change), 0.5, **{name: p}).go()
        (tmp_path / name).mkdir()
        session.save(tmp_path / name)
    merged = compare_reports(tmp_path / "x", tmp_path / "y", allow_mismatch=True)
    (task,) = result_of(merged).tasks
    assert (len(task.questions), task.samples) == (12, 1)
    assert any("compared although they differ" in note for note in merged.notes)


def test_a_thinking_and_a_plain_report_are_not_graded_together(tmp_path: Path) -> None:
    from evals.merge import compare_reports

    for name, thinking in (("x", False), ("y", True)):
        session = evaluation(settings(tmp_path, "aime_synth"), 0.5, **{name: 0.6}).go()
        (tmp_path / name).mkdir()
        asked = (dataclasses.replace(session.tasks[0], thinking=thinking),)
        dataclasses.replace(session, tasks=asked).save(tmp_path / name)
    with pytest.raises(StoreError, match="one side's prompts open a thought"):
        compare_reports(tmp_path / "x", tmp_path / "y", allow_mismatch=True)


def test_reports_of_one_name_are_two_subjects(tmp_path: Path) -> None:
    from evals.merge import compare_reports

    for day, p in (("d1", 0.2), ("d2", 0.9)):
        session = evaluation(settings(tmp_path, "aime_synth"), 0.5, c=p).go()
        (tmp_path / day / "rep").mkdir(parents=True)
        session.save(tmp_path / day / "rep")
    result = result_of(compare_reports(tmp_path / "d1" / "rep", tmp_path / "d2" / "rep"))
    assert [s.name for s in result.subjects] == ["rep: c", "rep: c-2"]
    assert result.tasks[0].versus[0].metrics["accuracy"].comparison.difference > 0.4


def test_a_thought_that_the_prompt_opened_counts_as_one(tmp_path: Path) -> None:
    """A template may end in <think>: a reply that never closes it has no answer, whatever boxes stand in it."""
    one = evaluation(settings(tmp_path, "aime_synth"), 1.0)
    session = one.go()
    (task,) = result_of(session).tasks
    assert task.scores[0].metrics["accuracy"].mean == 1
    inside = dataclasses.replace(session, tasks=(dataclasses.replace(session.tasks[0], thinking=True),))
    (task,) = result_of(inside).tasks
    assert (task.scores[0].metrics["accuracy"].mean, task.scores[0].no_answer) == (0, 1)


def test_the_session_names_no_place_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["trl-ext", "eval", "--out", str(tmp_path / "secret"), "--x", "hf_" + "a" * 34])
    session = evaluation(settings(tmp_path, "aime_synth"), 0.5).go()
    session.save(tmp_path)
    text = (tmp_path / "session.json").read_text()
    assert str(tmp_path) not in text and "hf_aaaa" not in text and "eval --out" in text


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        (("aime_synth",), {"targets": ("gsm8k",)}, "--targets gsm8k is not among the tasks aime_synth"),
        (("aime_synth",), {"judge": "nope"}, "--judge: unknown reward 'nope'"),
        (("aime_synth",), {"batch_size": 0}, "--batch-size 0"),
        (("aime_synth",), {"limit": 1}, "--limit 1: an interval needs at least 2 questions"),
        (("aime_synth",), {"control": True}, "--control is for structured tasks"),
        (("schema_synth",), {"control": True, "backend": "vllm"}, "--control runs on transformers"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked(
    tmp_path: Path, names: tuple[str, ...], change: dict, words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        ready_tasks(settings(tmp_path, *names, **change))


def test_a_preset_that_a_task_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="aime24 has no preset offline: choose --preset quick or full"):
        sampling_for(TASKS["aime24"], settings(tmp_path, "aime24"))


def test_one_tasks_data_is_never_anothers(tmp_path: Path) -> None:
    """data/aime24 alone: aime25 must not find the file of 2024 in it, nor a test split in a file of training rows."""
    stand_ins.make("aime24", tmp_path / "data" / "aime24")
    chosen = settings(
        tmp_path, "aime24", "aime25", data=str(tmp_path / "data"), preset="quick", samples=None, limit=None
    )
    ready, skipped = ready_tasks(chosen)
    assert [one.task.name for one in ready] == ["aime24"]
    assert "holds aime24 but no folder aime25" in skipped[0].reason
    stand_ins.jsonl(stand_ins.aime25(), tmp_path / "only" / "train.jsonl")
    _, skipped = ready_tasks(
        dataclasses.replace(
            chosen, tasks=tuple(get_tasks(["aime24", "aime25", "aime_synth"]))[1:], data=str(tmp_path / "only")
        )
    )
    assert "no file of the split test" in skipped[0].reason


def test_both_years_of_aime_are_pooled(tmp_path: Path) -> None:
    for name in ("aime24", "aime25"):
        stand_ins.make(name, tmp_path / "data" / name)
    chosen = settings(tmp_path, "aime24", "aime25", data=str(tmp_path / "data"), limit=None, preset="quick", samples=2)
    result = result_of(evaluation(chosen, 0.2, c=0.9).go())
    means = [sum(q.scores[1] for t in result.tasks for q in t.questions) / 60]
    assert any(
        f"c: AIME 2024 and 2025 pooled, 60 questions: {100 * means[0]:.1f}%, +" in note for note in result.notes
    )


def test_the_gate() -> None:
    assert cli.gate(["better", "no evidence"], ["worse", "not-better"]) == 0
    assert cli.gate(["worse", "better"], ["worse"]) == cli.GATE_FAILED
    assert cli.gate(["no evidence"], ["not-better"]) == cli.GATE_FAILED
    assert cli.gate(["worse"], []) == 0


def test_a_report_is_written_whole_and_read_back(tmp_path: Path) -> None:
    session = evaluation(settings(tmp_path, "gsm_json_synth"), 0.4, c=0.8).go()
    cli.write_report(str(tmp_path / "report"), session)
    found = load(tmp_path / "report")
    assert found.tasks[0].name == "gsm_json_synth"
    content = (tmp_path / "report" / "results.json").read_text()
    assert str(tmp_path) not in content, "no machine paths"


def test_a_look_before_the_last_is_judged_strictly(tmp_path: Path) -> None:
    """The same replies: a difference that counts at the last look does not at the first of many."""
    found = {}
    for looks in ((), (2,), (2, 64)):
        chosen = settings(tmp_path, "gsm_json_synth", limit=60, samples=2, looks=looks)
        task = result_of(evaluation(chosen, 0.5, c=0.57).go()).tasks[0]
        found[looks] = task.versus[0].metrics["valid_and_correct"], task.notes
    p = found[()][0].p_holm
    assert p is not None and p < 0.05 and found[()][0].verdict == found[2,][0].verdict == "better"
    assert found[2, 64][0].verdict == "no evidence" and found[2, 64][0].p_holm == p
    assert any("Look 1 of 2 (2, 64 samples): better or worse needs c p < " in note for note in found[2, 64][1])
    with pytest.raises(SettingsError, match="--samples 2 is none of the planned --looks"):
        evaluation(settings(tmp_path, "aime_synth", looks=(4, 8)), 0.5)
