"""Rounds of sample, score, build, train on the tiny model: resume after a kill anywhere, files, references, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from tests.tiny import assert_equal, tiny_path, tiny_tokenizer, weights
from trl_ext import run
from trl_ext.checkpoints import CheckpointError
from trl_ext.data import DataError, load_data
from trl_ext.loops import building, iterative
from trl_ext.loops.iterative import IterativeTrainer
from trl_ext.loops.policies import Policies
from trl_ext.loops.round_log import Relay
from trl_ext.recipe import RecipeError, load_recipe

LOOP = {
    "rounds": 2,
    "prompts_per_round": 4,
    "eval_prompts": 3,
    "num_samples": 3,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_completion_length": 8,
    "generation_batch_size": 6,
    "pairs": "all",
    "repeat_share": None,
}
KTO = {"pairs": "rubric", "label_threshold": 0.15, "num_samples": 4}


def letters(completions: list, **kwargs: Any) -> list[float]:
    """Share of letters."""
    return [sum(ch.isalpha() for ch in c[0]["content"]) / max(len(c[0]["content"]), 1) for c in completions]


@pytest.fixture(autouse=True)
def _cut_off_is_fine(monkeypatch):
    """The tiny model hardly ever ends a reply. Samples are written in two parts."""
    monkeypatch.setattr(iterative, "PART", 2)
    monkeypatch.setattr(building, "negative", lambda sample, share: False)


def recipe_of(folder: Path, loop: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **keys: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{i} + {i * 7 % 5} = ", "answer": str(i), "gold": "abcdef"} for i in range(11)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"trainer": "dpo", "model_name_or_path": tiny_path(), "dataset_name": str(folder / "prompts.jsonl")}
    settings |= {"rewards": ["tests.loops.test_iterative.letters"], "output_dir": str(folder / "run")}
    settings |= {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-3, "max_length": 64}
    settings |= {"use_cpu": True, "bf16": False, "logging_steps": 1, "save_steps": 1, "report_to": "none"}
    settings |= {"gradient_checkpointing": False, "disable_tqdm": True} | keys
    settings["loop"] = {"iterative": {k: v for k, v in (LOOP | (loop or {})).items() if k not in drop}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return load_recipe(str(folder / "recipe.yaml"))


def make(
    folder: Path, loop: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **keys: Any
) -> IterativeTrainer:
    recipe = recipe_of(folder, loop, drop, **keys)
    return IterativeTrainer(recipe, tiny_path(), tiny_tokenizer(), load_data(recipe))


def kto(folder: Path, loop: dict[str, Any] | None = None, **keys: Any) -> IterativeTrainer:
    return make(folder, KTO | (loop or {}), drop=("pairs",), trainer="kto", **keys)


def played(trainer: IterativeTrainer) -> IterativeTrainer:
    trainer.train()
    return trainer


def rounds(trainer: IterativeTrainer, number: int) -> Path:
    return Path(trainer.args.output_dir) / "rounds" / f"round-{number}"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def policy(trainer: IterativeTrainer, number: int, kind: str = "policy") -> dict[str, torch.Tensor]:
    return load_file(rounds(trainer, number) / kind / "model.safetensors")


class Killed(BaseException):
    """Passes every `except Exception`."""


def kill(monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], calls: int = 1) -> None:
    """The `calls`-th call of an attribute raises."""
    owner, name = where
    original, count = getattr(owner, name), 0

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dies)


POINTS = {
    "before sampling": ((IterativeTrainer, "_samples"), 1),
    "while sampling": ((IterativeTrainer, "_part"), 2),
    "after samples": ((building, "verdicts"), 1),
    "after scores": ((building, "training_lines"), 1),
    "before training": ((iterative, "build_trainer"), 1),
    "inside training": ((Relay, "on_step_end"), 2),
    "after training": ((IterativeTrainer, "_store"), 1),
    "after the policy": ((IterativeTrainer, "_extrapolate"), 1),
    "while writing the anchor": ((Policies, "write"), 1),
    "before the report": ((IterativeTrainer, "_report"), 1),
    "while judging": ((IterativeTrainer, "_held_out"), 2),
}
SECOND = ("while sampling", "after scores", "inside training", "after training", "before the report")


@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_killed_anywhere_and_resumed(tmp_path, monkeypatch, trainer):
    """One run dies at every stage of round 1 and most of round 2, and is resumed each time."""
    loop, build = {"nesterov": {"alpha": 0.4}, "replay": 0.5}, kto if trainer == "kto" else make
    whole = played(build(tmp_path / "whole", loop))
    for name in [*POINTS, *SECOND]:
        with monkeypatch.context() as patch:
            kill(patch, *POINTS[name])
            with pytest.raises(Killed):
                build(tmp_path / "part", loop).train()
    again = played(build(tmp_path / "part", loop))
    for number in (1, 2):
        for name in ("samples.jsonl", "scores.jsonl", "train.jsonl", "held_out.jsonl", "report.json"):
            mine, other = (rounds(t, number) / name for t in (again, whole))
            assert mine.read_text() == other.read_text(), (number, name)
        assert_equal(policy(again, number), policy(whole, number))
    assert_equal(policy(again, 1, "anchor"), policy(whole, 1, "anchor"))
    assert_equal(weights_of(again.model), weights_of(whole.model))
    timing = ("runtime", "per_second", "num_tokens", "train_loss", "total_flos")  # of the process that ended a round
    logs = [
        [{k: v for k, v in e.items() if not any(t in k for t in timing)} for e in t.state.log_history]
        for t in (again, whole)
    ]
    for mine, other in zip(*logs, strict=True):
        assert mine == other
    assert [e["step"] for e in logs[0] if "iterative/round" in e] == [3, 6]
    assert (
        not (rounds(again, 1) / "samples").exists()
        and not list((tmp_path / "part").rglob("*.part"))
        and not (rounds(again, 1) / "train").exists()
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same_call(trainer: IterativeTrainer, cls: Any, config: Any, columns: tuple[str, ...], **kwargs: Any) -> Any:
    """TRL's own trainer on the rows of round 1, with the recipe's settings and seed."""
    rows = [{key: row[key] for key in ("prompt", *columns)} for row in lines(rounds(trainer, 1) / "train.jsonl")]
    args = config(
        output_dir=str(trainer.args.output_dir) + "-trl",
        **{"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-3, "max_length": 64, "use_cpu": True},
        **{"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"},
        disable_tqdm=True,
    )
    found = cls(
        tiny_path(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), **kwargs
    )
    found.train()
    return found


def test_one_iteration_is_one_call_of_trl(tmp_path):
    ours = played(make(tmp_path, {"rounds": 1, "replay": 0.0}))
    theirs = same_call(ours, trl.DPOTrainer, trl.DPOConfig, ("chosen", "rejected"))
    assert_equal(policy(ours, 1), weights(theirs))
    assert not torch.equal(policy(ours, 1)["lm_head.weight"], weights_of(make(tmp_path / "b").model)["lm_head.weight"])


def test_one_iteration_of_kto_is_one_call_of_trl(tmp_path):
    ours = played(kto(tmp_path, {"rounds": 1}))
    theirs = same_call(ours, trl.KTOTrainer, trl.KTOConfig, ("completion", "label"))
    assert_equal(policy(ours, 1), weights(theirs))


def test_files_tell_what_happened(tmp_path):
    trainer = played(make(tmp_path, {"teacher_column": "gold"}))
    order = [line["prompt"] for n in (1, 2) for line in lines(rounds(trainer, n) / "samples.jsonl")]
    held = [line["prompt"] for line in lines(rounds(trainer, 1) / "held_out.jsonl")]
    assert sorted(order + held) == list(range(11)), "splits do not overlap"
    for number in (1, 2):
        samples, scores = (lines(rounds(trainer, number) / f"{name}.jsonl") for name in ("samples", "scores"))
        start = Path(tiny_path()).name if number == 1 else "rounds/round-1/policy"
        assert {line["sampler"] for line in samples} == {start} and {line["round"] for line in samples} == {number}
        assert {line["scorer"] for line in scores} == {"verifier"}
        for line, verdict in zip(samples, scores, strict=True):
            texts = [line["teacher"], *(reply["text"] for reply in line["replies"])]
            assert len(texts) == 4 and line["teacher"] == "abcdef" and line["prompt"] == verdict["prompt"]
            assert verdict["scores"] == letters([[{"content": text}] for text in texts])
            beaten = [[0.5 if a == b else float(a > b) for b in verdict["scores"]] for a in verdict["scores"]]
            assert verdict["wins"] == beaten
            assert verdict["rewards"] == pytest.approx([(sum(row) - 0.5) / 3 for row in beaten])
        pairs = lines(rounds(trainer, number) / "train.jsonl")
        own = [pair for pair in pairs if pair["round"] == number]
        assert len(own) == sum(a > b for v in scores for a in v["scores"] for b in v["scores"])
        for pair in own:
            (line,) = [s for s in samples if s["prompt"] == pair["index"]]
            texts = [line["teacher"], *(reply["text"] for reply in line["replies"])]
            good, bad = pair["replies"]
            assert pair["chosen"] == [{"role": "assistant", "content": texts[good]}]
            assert pair["rejected"] == [{"role": "assistant", "content": texts[bad]}]
            assert (
                pair["win_margin"] == pytest.approx(pair["rewards"][0] - pair["rewards"][1]) and pair["win_margin"] > 0
            )
            kinds = {(0, False): "teacher>student", (0, True): "student>teacher"}
            assert pair["type"] == kinds.get((good * bad, bad == 0), "student>student")
        numbers = json.loads((rounds(trainer, number) / "report.json").read_text())["numbers"]
        assert numbers["pairs"] == len(own) == sum(v for k, v in numbers.items() if k.startswith("pairs/"))
        assert numbers["pairs/student>student"] == sum(pair["type"] == "student>student" for pair in own)
        assert numbers["margin"] == pytest.approx(sum(p["win_margin"] for p in own) / len(own))
        assert numbers["prompts_without_pair"] == 1 - len({p["index"] for p in own}) / 4
        assert numbers["replayed"] == len(pairs) - len(own) == (0 if number == 1 else int(0.3 * len(own)))
        assert numbers["length"] == sum(len(r["tokens"]) for s in samples for r in s["replies"]) / 12
    replayed = [p for p in lines(rounds(trainer, 2) / "train.jsonl") if p["round"] == 1]
    first = lines(rounds(trainer, 1) / "train.jsonl")
    assert replayed and all(pair in first for pair in replayed)


def test_win_rates_of_the_report(tmp_path):
    """Against the replies in the files, one comparison at a time."""
    trainer = played(make(tmp_path, max_steps=2))
    held = {n: lines(rounds(trainer, n) / "held_out.jsonl") for n in (1, 2)}
    held[0] = lines(Path(trainer.args.output_dir) / "rounds/start/held_out.jsonl")

    def rate(new: int, old: int) -> float:
        found = []
        for a, b in zip(held[new], held[old], strict=True):
            for x in a["replies"]:
                for y in b["replies"]:
                    sx, sy = letters([[{"content": x["text"]}], [{"content": y["text"]}]])
                    found.append(0.5 if sx == sy else float(sx > sy))
        return sum(found) / len(found)

    for number in (1, 2):
        numbers = json.loads((rounds(trainer, number) / "report.json").read_text())["numbers"]
        assert numbers["win_rate"] == pytest.approx(rate(number, number - 1))
        assert numbers["win_rate_over_start"] == pytest.approx(rate(number, 0))
    entry = next(e for e in trainer.state.log_history if e.get("iterative/round") == 2)
    assert entry["iterative/win_rate"] == pytest.approx(rate(2, 1))


def test_labels(tmp_path):
    trainer = played(kto(tmp_path, {"rounds": 1}))
    scores = {v["prompt"]: v["scores"] for v in lines(rounds(trainer, 1) / "scores.jsonl")}
    rows = lines(rounds(trainer, 1) / "train.jsonl")
    assert len(rows) == 16 and [row["index"] for row in rows] != sorted(row["index"] for row in rows)
    assert all(row["label"] == (scores[row["index"]][row["replies"][0]] >= 0.15) for row in rows)
    assert {row["label"] for row in rows} == {True, False}
    numbers = json.loads((rounds(trainer, 1) / "report.json").read_text())["numbers"]
    good = sum(row["label"] for row in rows)
    assert numbers["desirable"] == good / 16 and numbers["balance"] == pytest.approx(good / (16 - good))


# References


def test_each_round_begins_where_the_last_one_ended(tmp_path, monkeypatch):
    """The trainer's start and its reference, with and without an adapter."""
    original, starts = iterative.build_trainer, []

    def look(recipe, model, *args):
        trainer = original(recipe, model, *args)
        base = trainer.model.get_base_model() if trainer.ref_model is None else trainer.ref_model
        starts.append({n.replace(".base_layer", ""): p.detach().clone() for n, p in base.named_parameters()})
        return trainer

    monkeypatch.setattr(iterative, "build_trainer", look)
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    for name, keys in {"full": {}, "lora": lora | {"learning_rate": 0.05}}.items():
        starts.clear()
        trainer = played(make(tmp_path / name, max_steps=2, **keys))
        first, second = starts
        ended, base = policy(trainer, 1), weights_of(make(tmp_path / "base").model)
        assert_equal({n: first[n] for n in base}, base)
        assert_equal({n: second[n] for n in ended}, ended)
        moved = {n for n in ended if not torch.equal(ended[n], base[n])}
        assert len(moved) > 3 and (name == "full" or all("q_proj" in n or "v_proj" in n for n in moved))
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert losses[0] == pytest.approx(0.693147, abs=1e-4) == losses[2]  # policy = reference at a round's start
        assert (rounds(trainer, 2) / "policy" / "model.safetensors").exists()


def test_anchor(tmp_path):
    trainer = played(make(tmp_path, {"nesterov": {"alpha": 0.5}, "keep": "last"}))
    base, new, anchor = weights_of(make(tmp_path / "b").model), policy(trainer, 1), policy(trainer, 1, "anchor")
    squares = 0.0
    for name, value in anchor.items():
        step = 0.5 * (new[name] - base[name])
        torch.testing.assert_close(value, new[name] + step)
        squares += float(step.square().sum())
    report = json.loads((rounds(trainer, 1) / "report.json").read_text())["nesterov"]
    assert report == {"alpha": 0.5, "anchor_distance": pytest.approx(squares**0.5, rel=1e-5)}
    assert {line["sampler"] for line in lines(rounds(trainer, 2) / "samples.jsonl")} == {"rounds/round-1/anchor"}
    assert not (rounds(trainer, 2) / "anchor").exists()
    assert_equal(weights_of(trainer.model), policy(trainer, 2))  # the trained policy, not an anchor
    entry = next(e for e in trainer.state.log_history if e.get("iterative/round") == 1)
    assert entry["nesterov/anchor_distance"] == pytest.approx(squares**0.5, rel=1e-5)


def test_without_momentum_nothing_changes(tmp_path):
    plain, none = (
        played(make(tmp_path / "a", max_steps=1)),
        make(tmp_path / "b", {"nesterov": {"alpha": 0}}, max_steps=1),
    )
    assert_equal(weights_of(plain.model), weights_of(played(none).model))
    assert not (rounds(none, 1) / "anchor").exists()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_kept_iterate(tmp_path, keep):
    trainer = played(make(tmp_path, {"keep": keep}, max_steps=1))
    for number, rate in ((1, 0.75), (2, 0.6)):
        path = rounds(trainer, number) / "report.json"
        report = json.loads(path.read_text())
        report["numbers"]["win_rate_over_start"] = rate
        path.write_text(json.dumps(report))
    again = played(make(tmp_path, {"keep": keep}, max_steps=1))
    assert_equal(weights_of(again.model), policy(again, 1 if keep == "best" else 2))
    assert again.summary()[-1] == f"saved: the policy of round {1 if keep == 'best' else 2}"


def test_learning_rate_falls(tmp_path):
    trainer = played(make(tmp_path, {"learning_rate_factor": 0.5}, max_steps=1, lr_scheduler_type="constant"))
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == [3e-3, 1.5e-3]


# The command


def test_run_reports_saves_and_resumes(tmp_path, monkeypatch):
    """Through `trl_ext.run`: killed inside round 2, resumed, and the model that it saves is round 2's."""
    with monkeypatch.context() as patch:
        kill(patch, (Relay, "on_step_end"), 5)
        with pytest.raises(Killed):
            run.train(recipe_of(tmp_path, {"keep": "last"}))
    result = run.train(recipe_of(tmp_path, {"keep": "last"}), resume=True)
    folder = Path(result.output_dir)
    assert_equal(
        load_file(folder / "model.safetensors"), load_file(folder / "rounds/round-2/policy/model.safetensors")
    )
    assert "round 2: win rate" in result.text and "saved: the policy of round 2" in (folder / "report.md").read_text()
    logged = lines(folder / "log.jsonl")
    steps = [entry["step"] for entry in logged if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6], "every step once, counted on over the rounds"
    assert [e["step"] for e in logged if "iterative/win_rate" in e] == [3, 6]
    assert "each round: 4 pairs" in result.schedule
    with pytest.raises(CheckpointError, match="is finished"):
        run.train(recipe_of(tmp_path, {"keep": "last"}), resume=True)


def test_other_settings_do_not_resume(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill(patch, (building, "verdicts"))
        with pytest.raises(Killed):
            make(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.003, is 0\.1"):
        make(tmp_path, learning_rate=0.1).train()


# Refusals


def test_too_few_prompts(tmp_path):
    with pytest.raises(
        DataError, match=r"2 rounds x 5 prompts \+ 3 held-out ones take 13 prompts, the data set has 11"
    ):
        make(tmp_path, {"prompts_per_round": 5})
    assert len(make(tmp_path, {"prompts_per_round": None}).splits[1]) == 4  # (11 - 3) // 2


def test_no_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "pair_lines", lambda *args: [])
    with pytest.raises(DataError, match="round 1: no pair came out of its samples; lower min_positive_score"):
        make(tmp_path).train()


@pytest.mark.parametrize(
    ("loop", "keys", "message"),
    [
        ({"rounds": 0}, {}, "rounds: 0 must be >= 1"),
        ({"pair": "all"}, {}, "unknown setting 'pair', did you mean 'pairs'"),
        ({"margin": 3.0}, {}, "margin has no effect without pairs: rubric"),
        ({"label_threshold": 0.5}, {}, "label_threshold has no effect without trainer: kto"),
        ({}, {"trainer": "kto"}, "label_threshold: kto needs the score"),
        ({"label_threshold": 0.5}, {"trainer": "kto"}, "pairs has no effect without trainer: dpo"),
        ({"num_samples": 1}, {}, "one reply alone makes no pair"),
        ({"nesterov": {"alpha": 1}}, {}, r"alpha 1 must be in \[0, 1\)"),
        ({"nesterov": {"mode": "logps"}}, {}, "between rounds weights are extrapolated"),
        ({"nesterov": {"alhpa": 0.3}}, {}, "unknown setting 'alhpa'"),
        ({"scorer": "verifyer"}, {}, "did you mean 'verifier'"),
        ({"scorer": {"judge": {"base_url": "http://x/v1", "model": "m"}}}, {}, "the judge does not read them"),
        ({"reward_weights": [1, 2]}, {}, "2 weights for 1 rewards"),
        ({}, {"rewards": []}, "the verifier is the recipe's `rewards`"),
        (
            {"scorer": {"judge": {"base_url": "http://x/v1", "model": "m"}}, "pairs": "rubric"},
            {"rewards": []},
            "this judge only compares",
        ),
        ({}, {"sync_ref_model": True}, "sync_ref_model moves the reference"),
        ({}, {"eval_strategy": "steps"}, "eval_strategy: set it to no"),
        ({}, {"use_peft": True, "load_in_4bit": True}, "adapters are merged between rounds"),
        ({}, {"trainer": "sft"}, "iterative drives the dpo or kto trainer; this is sft"),
        ({}, {"rewards": ["json_valid", "no_such"]}, "unknown reward 'no_such'"),
    ],
)
def test_settings_that_cannot_run(tmp_path, loop, keys, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, loop, **keys)


def test_missing_columns(tmp_path):
    with pytest.raises(DataError, match="reads the column 'level'"):
        load_data(recipe_of(tmp_path, rewards=["tests.loops.test_iterative.leveled"]))


def leveled(completions: list, level: list, **kwargs: Any) -> list[float]:
    """Needs a column that is not there."""
    raise AssertionError


def test_the_plan_says_what_happens(tmp_path):
    recipe = recipe_of(tmp_path, {"nesterov": {"alpha": 0.3}, "teacher_column": "gold"})
    text = recipe.loop.describe(recipe.training_args)
    assert "2 rounds; each samples 3 replies and the reply in column gold to 4 prompts" in text
    assert "builds pairs (all), replays 0.3" in text and "extrapolated by 0.3" in text
    again = copy.deepcopy(recipe.resolved()["loop"]["iterative"])
    assert again["rounds"] == 2 and again["nesterov"] == {"alpha": 0.3}
