"""What a person sees of a run: log, progress, evaluation, start and end."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import struct
import subprocess
from dataclasses import dataclass
from typing import ClassVar

import peft
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerState

from evals import environment
from tests import tiny
from trl_ext import report
from trl_ext.grpo import GRPOConfig, GRPOTrainer
from trl_ext.method import Method
from trl_ext.plan import Plan, make_plan
from trl_ext.recipe import load_recipe
from trl_ext.report import closing, evaluation, files, opening, plots, progress
from trl_ext.sandbox import Record
from trl_ext.sandbox.tasks import rows

GRPO_LOG = {
    "loss": 0.01,
    "completions/mean_length": 24.4,
    "rewards/json_valid/mean": 0.5,
    "rewards/json_valid/std": 0.4,
    "rewards/answer_correct/mean": 0.25,
    "reward": 0.75,
    "entropy": 0.3456,
    "trace/annotate_seconds": 3.0,
    "trace/lambda": 0.1,
    "trace/rho": 0.9,
    "trace/span_coverage": 0.2,
}


@dataclass(frozen=True)
class Loud(Method):
    """Names its most telling metric."""

    name = "loud"
    title = "Loud"
    paper = "0000.00000"
    headline: ClassVar[tuple[str, ...]] = ("volume",)


def make_evaluation(marks: list[str], samples: int = 1, problems: list[str] | None = None) -> report.Evaluation:
    """One letter for each reply: "c" correct, "v" valid but wrong, "." neither."""
    letters = "".join(marks)
    records = [Record(i // samples, f"reply {i}", 10 + i, m in "vc", m == "c") for i, m in enumerate(letters)]
    count = len(letters) // samples
    return report.Evaluation(tuple(problems or [f"p{i}" for i in range(count)]), tuple(records), samples)


# Files


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    files.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"


def test_log_survives_a_cut_last_line_and_holds_strict_json(tmp_path):
    entries = [{"step": 1, "reward": 0.5, "note": "a\u2028b\x85"}, {"step": 2, "reward": math.nan, "kl": math.inf}]
    text = "".join(map(files.log_line, entries))
    assert "NaN" not in text
    assert "Infinity" not in text
    (tmp_path / files.LOG).write_text(text + '{"step": 3, "rew')
    read = files.read_log(tmp_path)
    assert read == [entries[0], {"step": 2, "reward": None, "kl": None}]
    steps, values = files.series(read, "reward")
    assert (steps, values[0], math.isnan(values[1])) == ([1, 2], 0.5, True)
    assert files.series(read, "kl")[0] == [2]
    assert files.read_log(tmp_path / "nowhere") == []


def test_log_table_is_the_union_of_columns():
    table = files.log_table([{"step": 1, "a": 0.5}, {"step": 2, "b": None, "a": 1.0}])
    assert table == "step,a,b\n1,0.5,\n2,1.0,nan\n"


# Progress


def test_headline_picks_the_numbers_that_matter():
    shown = dict(progress.headline(GRPO_LOG, make_plan(["trace"])))
    assert shown == {
        "reward": 0.75,
        "json_valid": 0.5,
        "answer_correct": 0.25,
        "entropy": 0.3456,
        "length": 24.4,
        "trace/lambda": 0.1,
        "trace/span_coverage": 0.2,  # named by the method's `headline`; rho is not
    }
    assert next(iter(shown)) == "reward"
    one = {"reward": 0.5, "rewards/f/mean": 0.5}
    assert progress.headline(one, Plan()) == [("reward", 0.5)]  # a single part says nothing more


def test_headline_of_pairs_starts_with_the_loss():
    log = {"rewards/accuracies": 0.5, "rewards/margins": 0.1, "loss": 0.69, "entropy": 1.0, "logps/chosen": -3.0}
    assert [label for label, _ in progress.headline(log, Plan())] == ["loss", "pairs right", "margin", "entropy"]
    assert progress.headline({"train_runtime": 3.0, "epoch": 1.0}, Plan()) == []


def test_a_method_may_name_what_is_shown_first():
    keys = ["loud/a", "loud/b_seconds", "loud/volume", "loudness/c"]
    assert progress.own_metrics(keys, Loud()) == ["loud/volume", "loud/a"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3600, "1:00:00"), (3905, "1:05:05"), (-1, "0:00")],
)
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


def test_time_left_and_short_numbers():
    assert progress.time_left(30, 10, 70) == "3:30"
    assert progress.time_left(30, 0, 70) == "?"
    assert [progress.short(v) for v in (0.123456, 1e-7, 12345.6, None, math.nan, 3)] == [
        "0.123",
        "1e-07",
        "12346",
        "nan",
        "nan",
        "3",
    ]


def test_plain_lines_come_every_few_steps_and_at_the_end():
    out = io.StringIO()
    lines = progress.PlainLines(Console(file=out), total=50)  # 50 / 20, rounded up: every 3
    for step in range(1, 51):
        lines.show(step, "1:00", [("reward", 0.5), ("[bold]x", 1.0)])
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in out.getvalue().splitlines()]
    assert shown == [1, *range(3, 50, 3), 50]
    assert out.getvalue().splitlines()[0] == "step 1/50 · 1:00 left · reward 0.5 · [bold]x 1"


# Recorder


def trainer_for(folder, console, **args) -> GRPOTrainer:
    config = GRPOConfig(**tiny.grpo_args(str(folder), methods={"high_entropy": {}}, **args))
    trainer = GRPOTrainer(
        tiny.tiny_path(), reward_funcs=tiny.letters_reward, args=config, train_dataset=tiny.prompts()
    )
    report.quiet(trainer)
    trainer.add_callback(report.Recorder(str(folder), 0, trainer.plan, console))
    return trainer


def test_recorder_and_resume_write_each_step_once(tmp_path, capsys):
    out = io.StringIO()
    trainer = trainer_for(tmp_path, Console(file=out), save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    entries = files.read_log(tmp_path)
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 4]  # the last one is the trainer's summary
    assert entries[:4] == [json.loads(files.log_line(e)) for e in trainer.state.log_history[:4]]
    assert "high_entropy/threshold" in entries[0]
    table = list(csv.DictReader((tmp_path / files.LOG_TABLE).open()))
    assert float(table[1]["reward"]) == entries[1]["reward"]
    assert table[0]["train_runtime"] == ""
    assert [line.split(" ")[1] for line in out.getvalue().splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    assert "reward" not in capsys.readouterr().out  # transformers' own printing is off

    with (tmp_path / files.LOG).open("a") as log:  # as a kill leaves it
        log.write('{"step": 9, "rew')
    again = trainer_for(tmp_path, Console(file=io.StringIO()), save_strategy="no", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = files.read_log(tmp_path)
    assert [e["step"] for e in resumed] == [1, 2, 3, 4, 4]
    assert [e.get("reward") for e in resumed] == [e.get("reward") for e in entries]


def test_entries_are_on_disk_while_training_runs(tmp_path):
    recorder = report.Recorder(str(tmp_path / "new"), 3, Plan(), Console(file=io.StringIO()))
    state = TrainerState(max_steps=3)
    recorder.on_train_begin(None, state, None)
    state.global_step = 1
    recorder.on_log(None, state, None, {"reward": 0.5})
    assert files.read_log(tmp_path / "new") == [{"step": 1, "reward": 0.5}]
    recorder.close()
    recorder.close()  # twice is fine


def test_other_processes_write_nothing(tmp_path):
    recorder = report.Recorder(str(tmp_path / "new"), 3, Plan(), Console(file=io.StringIO()))
    state = TrainerState(max_steps=3, is_world_process_zero=False)
    recorder.on_train_begin(None, state, None)
    recorder.on_log(None, state, None, {"reward": 0.5})
    recorder.on_train_end(None, state, None)
    assert not (tmp_path / "new").exists()


def test_live_bar_in_a_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    recorder = report.Recorder(str(tmp_path), 10, make_plan(["trace"]), console)
    state = TrainerState(max_steps=10)
    recorder.on_train_begin(None, state, None)
    state.global_step = 4
    recorder.on_log(None, state, None, dict(GRPO_LOG))
    recorder.on_step_end(None, state, None)
    recorder.close()
    last = out.getvalue().split("step 4/10")[-1]
    assert "left" in last
    assert "reward 0.75 json_valid 0.5 answer_correct 0.25 entropy 0.346 length 24.4 trace" in " ".join(last.split())
    assert "\x1b[?25h" in last  # the cursor is back


def test_quiet_removes_both_printers(tmp_path):
    trainer = trainer_for(tmp_path, Console(file=io.StringIO()), disable_tqdm=False)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert not {PrinterCallback, ProgressCallback} & set(kinds)
    assert trainer.args.disable_tqdm


# Evaluation


def test_scores_are_questions_by_replies():
    found = make_evaluation(["cv", "..", "cc"], samples=2)
    assert found.scores("accuracy").tolist() == [[1, 0], [0, 0], [1, 1]]
    assert found.scores("validity").tolist() == [[1, 1], [0, 0], [1, 1]]
    assert found.correct_among_valid == 3 / 4
    assert found.mean_length == 12.5
    assert math.isnan(make_evaluation(["."] * 3).correct_among_valid)


def test_verdicts_in_words():
    before, after = make_evaluation(["."] * 25 + ["c"] * 15), make_evaluation(["c"] * 25 + ["."] * 5 + ["c"] * 10)
    better = evaluation.compare(before, after, "accuracy")
    # d = +1 x 25, -1 x 5, 0 x 10: mean 0.5, SE = sqrt((30 - 40/4) / 39 / 40) = 0.11323, t(39) = 2.02269
    assert evaluation.verdict(better) == (
        "better: +50.0 points [27.1, 72.9], p < 0.001, n = 40; the smallest difference that could have been seen is "
        "about 32 points"
    )
    worse = evaluation.compare(after, before, "accuracy")
    assert evaluation.verdict(worse).startswith("worse: -50.0 points [-72.9, -27.1]")
    few = evaluation.compare(make_evaluation(["."] * 10), make_evaluation(["cc", "........"]), "accuracy")
    assert evaluation.verdict(few).startswith(
        "no difference can be told: +20.0 points [-10.2, 50.2], p = 0.500, n = 10"
    )
    same = evaluation.compare(before, before, "accuracy")
    assert evaluation.verdict(same) == "no change: all 40 problems scored the same before and after"


def test_evaluations_of_other_problems_are_not_compared():
    with pytest.raises(ValueError, match="different problems"):
        evaluation.compare(make_evaluation(["cc"]), make_evaluation(["cc"], problems=["p0", "other"]), "accuracy")


def test_examples_are_first_replies_that_changed_sides():
    before, after = make_evaluation(["vc", "c.", "v.", ".c"], 2), make_evaluation(["cc", "vc", "v.", "cc"], 2)
    assert [old.row for old, _ in evaluation.examples(before, after, 1)] == [0, 1]
    assert [old.row for old, _ in evaluation.examples(before, after, 2)] == [0, 3, 1]


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_sandbox_leaves_mode_and_random_state(training):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny.tiny_path())
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2)).train(training)
    tokenizer, problems = tiny.tiny_tokenizer(), rows("math", n=3, split="test")
    state = torch.get_rng_state()
    first = report.evaluate_sandbox(model, tokenizer, problems, seed=1)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert first.problems == tuple(row["problem"] for row in problems)
    assert [r.row for r in first.records] == [0] * 4 + [1] * 4 + [2] * 4
    assert report.evaluate_sandbox(model, tokenizer, problems, seed=1) == first
    assert report.evaluate_sandbox(model, tokenizer, problems, seed=2) != first
    with pytest.raises(ValueError, match="eval_rows to 2 or more"):
        report.evaluate_sandbox(model, tokenizer, problems[:1], seed=1)


# Start and finish


@pytest.fixture
def recipe(tmp_path):
    return load_recipe("sandbox_trace", ["--output_dir", str(tmp_path)])


def test_start_writes_recipe_plan_and_versions(tmp_path, recipe, capsys):
    report.start(str(tmp_path / "run"), recipe, recipe.plan, "16 prompts x 16 completions")
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == recipe.resolved()
    for text in ((folder / "plan.txt").read_text(), capsys.readouterr().out):
        assert "token weights" in text
        assert "16 prompts x 16 completions" in text
        assert "action=rkl_error" in text
        assert "teacher forward" in text
    assert "\x1b" not in (folder / "plan.txt").read_text()
    found = json.loads((folder / "versions.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert found["seeds"]["training"] == recipe.training_args.seed
    assert {"python", "git", "platform", "cpu", "gpus"} <= found.keys()
    assert found["cpu"]


def test_changed_settings_only():
    plan = make_plan({"high_entropy": {"quantile": 0.5}})
    assert opening.changed(plan.methods[0]) == "quantile=0.5"
    assert opening.changed(make_plan("high_entropy").methods[0]) == "default settings"


def test_git_state(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert environment.git_state(tmp_path) is None
    git("init")
    assert environment.git_state(tmp_path) == {"commit": None, "dirty": False}
    git("commit", "--allow-empty", "-m", "m")
    clean = environment.git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert not clean["dirty"]
    (tmp_path / "new").write_text("")
    assert environment.git_state(tmp_path) == clean | {"dirty": True}
    assert environment.version_of("no-such-package") is None


def write_log(folder, steps=40):
    folder.mkdir(exist_ok=True)
    entries = [{"step": i + 1, **GRPO_LOG, "trace/lambda": 0.1 * i} for i in range(steps)]
    (folder / files.LOG).write_text("".join(map(files.log_line, entries)))
    return entries


def test_finish_writes_report_and_picture(tmp_path, recipe):
    folder = tmp_path / "run"
    write_log(folder)
    before, after = make_evaluation(["."] * 25 + ["c"] * 15), make_evaluation(["c"] * 25 + ["."] * 5 + ["c"] * 10)
    text = report.finish(str(folder), recipe, recipe.plan, before, after, ["trace: most frequent labels: slip 3"])
    # Wilson with n_eff = 39 and q = t(39) = 2.02269, so q^2/n = 0.104904:
    # (0.375 + 0.052452 -+ 0.165343) / 1.104904 and (0.875 + 0.052452 -+ 0.119270) / 1.104904
    assert "accuracy 37.5% [23.7, 53.7] -> 87.5% [73.1, 94.7]" in text
    assert "better: +50.0 points [27.1, 72.9], p < 0.001, n = 40" in text
    assert "most frequent labels" in text
    assert f"Written to {folder}:" in text
    markdown, data = (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())
    assert "better: +50.0 points" in markdown
    assert "![learning curves](curves.png)" in markdown
    assert "wrong before, right after" in markdown
    assert data["evaluation"]["measures"]["accuracy"]["comparison"]["difference"] == 0.5
    assert data["evaluation"]["measures"]["accuracy"]["verdict"] == "better"
    for content in (markdown, json.dumps(data)):
        assert str(tmp_path) not in content
    listed = [line.split("](")[0][3:] for line in markdown.splitlines() if line.startswith("- [")]
    assert listed == ["report.md", "report.json", "curves.png", "log.jsonl"]
    width, _ = struct.unpack(">II", (folder / "curves.png").read_bytes()[16:24])
    assert width == 1200
    assert not list(folder.glob("*.part"))


def test_finish_without_evaluation_has_curves_and_files_only(tmp_path, recipe):
    write_log(tmp_path / "run")
    text = report.finish(str(tmp_path / "run"), recipe, recipe.plan, None, None, [])
    assert text.startswith("Written to")
    assert "curves.png" in text
    assert json.loads((tmp_path / "run" / "report.json").read_text())["evaluation"] is None
    assert "## Result" not in (tmp_path / "run" / "report.md").read_text()


def test_finish_without_any_log_writes_no_picture(tmp_path, recipe):
    report.finish(str(tmp_path), recipe, Plan(), None, None, [])
    assert not (tmp_path / "curves.png").exists()
    assert "curves" not in (tmp_path / "report.md").read_text()


def test_replies_cannot_break_out_of_the_report():
    hostile = "```\n# Owned\n" + "\x1b[31m" + "x" * 100_000
    block = closing._fence(closing._cut(hostile))
    assert block[0] == "````text"
    assert block[-1] == "````"
    assert len(block) == 3
    assert "\n" not in block[1]
    assert "\x1b" not in block[1]
    assert len(block[1]) < 2 * closing.MAX_CHARACTERS


def test_a_local_model_folder_is_named_without_its_path(recipe):
    recipe.model_args.model_name_or_path = "/home/someone/models/small"
    assert closing.model_name(recipe) == "small"
    recipe.model_args.model_name_or_path = "Qwen/Qwen3-1.7B"
    assert closing.model_name(recipe) == "Qwen/Qwen3-1.7B"


# Pictures


def test_panels_follow_what_was_logged(tmp_path):
    titles = [p.title for p in plots.panels([{"step": 1, **GRPO_LOG}])]
    assert titles == ["Reward", "Parts of the reward", "Entropy", "Completion length"]
    single = plots.panels([{"step": 1, "reward": 0.5, "rewards/f/mean": 0.5}])
    assert [(p.title, p.share) for p in single] == [("Reward: f", True)]
    pairs = [{"step": 1, "loss": 0.7, "rewards/margins": 0.1, "rewards/accuracies": 0.5}]
    assert [p.title for p in plots.panels(pairs)] == ["Implicit reward of pairs", "Pairs ranked right"]
    assert [p.title for p in plots.panels([{"step": 1, "loss": 0.7}])] == ["Loss"]
    assert plots.panels([{"step": 4, "train_runtime": 3.0}]) == []
    assert not plots.panels([{"step": 1, "reward": 3.0, "rewards/f/mean": 3.0}])[0].share


def test_own_metrics_of_a_method_prefer_those_that_move():
    entries = [{"step": i, **{f"trace/m{k}": float(i * (k > 1)) for k in range(10)}} for i in range(3)]
    assert plots.method_metrics(entries, make_plan(["trace"])) == {"trace": [f"trace/m{k}" for k in range(2, 10)]}
    assert plots.method_metrics(entries, make_plan(["high_entropy"])) == {}


def test_running_mean_by_hand():
    nan = math.nan
    assert plots.running_mean([1, 2, 6, nan, 4], 3).tolist() == [1.5, 3.0, 4.0, 5.0, 4.0]
    assert math.isnan(plots.running_mean([nan, nan, nan], 1)[0])
