"""Rounds of sample, score, build, train on the tiny model: resume after a kill anywhere, files, references, refusals."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import assert_equal, tiny_path, tiny_tokenizer, weights
from trl_ext import merging, run
from trl_ext.checkpoints import CheckpointError
from trl_ext.data import DataError, load_data
from trl_ext.loops import building, iterative, policies
from trl_ext.loops.iterative import IterativeTrainer
from trl_ext.loops.pairs import losing, self_play_rewards, wins_of_scores
from trl_ext.loops.policies import Policies
from trl_ext.loops.round_files import folder_of
from trl_ext.loops.round_log import Relay
from trl_ext.loops.sampling import prompt_ids
from trl_ext.recipe import RecipeError, load_recipe
from trl_ext.watch import Watch

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
    "trying the trainer": ((iterative, "build_trainer"), 1),
    "before training": ((iterative, "build_trainer"), 2),
    "inside training": ((Relay, "on_step_end"), 2),
    "after training": ((IterativeTrainer, "_store"), 1),
    "after the policy": ((IterativeTrainer, "_extrapolate"), 1),
    "while writing the anchor": ((Policies, "write"), 1),
    "before the report": ((IterativeTrainer, "_report"), 1),
    "while judging": ((IterativeTrainer, "_held_out"), 2),
    "inside the merge": ((merging, "_check"), 3),
    "inside the second merge": ((merging, "_check"), 6),
}
FIRST = [name for name in POINTS if "merge" not in name]
SECOND = ["while sampling", "after scores", "inside training", "after training", "before the report"]
LORA: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 2,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_dropout": 0.0,
}
KILLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dpo": ({}, [*FIRST, *SECOND]),
    "kto": ({}, ["while sampling", "after scores", "inside training", "before the report"]),
    "lora": (
        LORA | {"max_steps": 2},
        ["inside training", "after training", "inside the merge", "inside the second merge"],
    ),
}


@pytest.mark.parametrize("kind", KILLS)
def test_killed_anywhere_and_resumed(tmp_path, monkeypatch, kind):
    """One run dies at every stage of round 1 and most of round 2, and is resumed each time."""
    keys, points = KILLS[kind]
    loop, steps = {"nesterov": {"alpha": 0.4}, "replay": 0.5}, keys.get("max_steps", 3)
    build = functools.partial(kto if kind == "kto" else make, loop=loop, **keys)
    whole = played(build(tmp_path / "whole"))
    for name in points:
        with monkeypatch.context() as patch:
            kill(patch, *POINTS[name])
            with pytest.raises(Killed):
                build(tmp_path / "part").train()
    again = played(build(tmp_path / "part"))
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
    assert [e["step"] for e in logs[0] if "iterative/round" in e] == [steps, 2 * steps]
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
    for name, keys in {"full": {}, "lora": LORA | {"learning_rate": 0.05}}.items():
        starts.clear()
        trainer = played(make(tmp_path / name, max_steps=2, **keys))
        tried, first, second = starts
        assert_equal(tried, first)
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
    distance, kl = pytest.approx(squares**0.5, rel=1e-5), pytest.approx(anchor_kl(trainer), rel=1e-3, abs=1e-7)
    assert report == {"alpha": 0.5, "anchor_distance": distance, "kl_anchor_to_trained": kl}
    assert {line["sampler"] for line in lines(rounds(trainer, 2) / "samples.jsonl")} == {"rounds/round-1/anchor"}
    assert not (rounds(trainer, 2) / "anchor").exists()
    assert_equal(weights_of(trainer.model), policy(trainer, 2))  # the trained policy, not an anchor
    entry = next(e for e in trainer.state.log_history if e.get("iterative/round") == 1)
    assert entry["nesterov/anchor_distance"] == pytest.approx(squares**0.5, rel=1e-5)


def test_the_first_anchor_can_be_skipped(tmp_path):
    trainer = make(tmp_path, {"rounds": 4, "prompts_per_round": 2, "nesterov": {"skip_first": True}})
    assert [trainer._anchored(number) for number in range(5)] == [False, False, True, True, False]
    assert [Path(trainer._start(number)).name for number in (2, 3, 4)] == ["policy", "anchor", "anchor"]
    plain = make(tmp_path / "b", {"rounds": 4, "prompts_per_round": 2, "nesterov": {"skip_first": False}})
    assert [plain._anchored(number) for number in range(5)] == [False, True, True, True, False]


def anchor_kl(trainer: IterativeTrainer) -> float:
    """KL(anchor || trained) over the tokens of the trained policy's held-out replies, each from a forward of its own."""
    models = [
        AutoModelForCausalLM.from_pretrained(rounds(trainer, 1) / kind, dtype="float32")
        for kind in ("policy", "anchor")
    ]
    found = []
    for line in lines(rounds(trainer, 1) / "held_out.jsonl"):
        for reply in line["replies"]:
            ids = prompt_ids(tiny_tokenizer(), trainer.rows[line["prompt"]])
            for token in reply["tokens"]:
                p, q = (m(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item() for m in models)
                found.append(q / p * math.log(q / p) - q / p + 1)
                ids.append(token)
    return sum(found) / len(found)


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
    with pytest.raises(CheckpointError, match=r"seed was 42, is 7"):
        make(tmp_path, seed=7).train()


@pytest.mark.parametrize(
    ("row", "keys", "told"),
    [
        ({"answer": "x"}, {}, "sha256 of the rows was"),
        ({"prompt": "other"}, {}, "sha256 of the rows was"),
        ({}, {"seed": 7}, "seed was 42, is 7"),
        ({}, {"dtype": "bfloat16"}, "dtype was 'float32', is 'bfloat16'"),
        ({}, {"dpo_loop": {"temperature": 0.9}}, r"loop\.iterative\.temperature was 1\.0, is 0\.9"),
    ],
)
def test_other_rows_and_settings_do_not_resume(tmp_path, monkeypatch, row, keys, told):
    """Killed after samples.jsonl; the check comes with the trainer, and alone, before a run writes anything."""
    with monkeypatch.context() as patch:
        kill(patch, (building, "verdicts"))
        with pytest.raises(Killed):
            make(tmp_path).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")}
    assert rounds_at(tmp_path) / "samples.jsonl" in before
    recipe = recipe_of(tmp_path, keys.pop("dpo_loop", None), **keys)
    rows = [*lines(tmp_path / "prompts.jsonl")[:-1], lines(tmp_path / "prompts.jsonl")[-1] | row]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    data = load_data(recipe)
    for refuses in (
        lambda: iterative.check_begun(recipe, tiny_path(), data),
        lambda: IterativeTrainer(recipe, tiny_path(), tiny_tokenizer(), data),
    ):
        with pytest.raises(CheckpointError, match=told):
            refuses()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json*")} == before


def test_the_trainers_own_settings_may_change_until_it_has_trained(tmp_path, monkeypatch):
    """Killed inside round 1's training: another batch and rate start it afresh on the same samples. Not in round 2."""
    with monkeypatch.context() as patch:
        kill(patch, (Relay, "on_step_end"), 2)
        with pytest.raises(Killed):
            make(tmp_path / "a").train()
    before = (rounds_at(tmp_path / "a") / "samples.jsonl").read_bytes()
    assert (rounds_at(tmp_path / "a") / "train" / "checkpoint-1").is_dir()
    mended = {"per_device_train_batch_size": 2, "learning_rate": 0.01}
    with monkeypatch.context() as patch:
        kill(patch, (Relay, "on_step_end"), 5)
        with pytest.raises(Killed):
            make(tmp_path / "a", **mended).train()
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01, is 0\.003"):
        make(tmp_path / "a")
    again, whole = played(make(tmp_path / "a", **mended)), played(make(tmp_path / "b", **mended))
    assert (rounds(again, 1) / "samples.jsonl").read_bytes() == before
    assert_equal(policy(again, 1), policy(whole, 1))
    assert_equal(policy(again, 2), policy(whole, 2))


def test_which_settings_reach_the_trainer_alone():
    own = ("beta", "max_length", "gradient_checkpointing", "methods.dno.variant", "lora_r", "use_peft", "loss_type")
    shared = ("seed", "use_cpu", "model_name_or_path", "dtype", "trainer", "rewards.pairs", "model_init_kwargs.x")
    assert all(map(iterative.trainers_own, own))
    assert not any(map(iterative.trainers_own, (*shared, "loop.iterative.temperature", "dataset_name", "model")))


@pytest.mark.parametrize(
    ("build", "keys", "mended", "told"),
    [
        ("kto", {"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 4}, "batch size must be > 1"),
        ("dpo", LORA | {"lora_target_modules": ["nope"]}, LORA, "not found in the base model"),
    ],
)
def test_what_the_trainer_refuses_is_told_before_anything_is_sampled(tmp_path, build, keys, mended, told):
    builder = kto if build == "kto" else make
    with pytest.raises(ValueError, match=told):
        builder(tmp_path, **keys, max_steps=1).train()
    assert not list((tmp_path / "run").rglob("*.json*"))
    assert played(builder(tmp_path, **mended, max_steps=1)).summary()


def test_no_token_is_written(tmp_path):
    """The trainer pickles its arguments beside checkpoints and weights."""
    trainer = played(make(tmp_path, {"rounds": 1}, max_steps=1, hub_token="hf_hidden"))
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written) and trainer.args.hub_token == "hf_hidden"
    assert not [path for path in written if b"hf_hidden" in path.read_bytes()]


def rounds_at(folder: Path) -> Path:
    return folder / "run" / "rounds" / "round-1"


def test_what_decides_nothing_may_change(tmp_path):
    free = {"save_steps": 2, "logging_steps": 5, "output_dir": str(tmp_path / "x"), "run_name": "b"}
    judge = {"scorer": {"judge": {"base_url": "http://x/v1", "model": "m", "timeout": 5}}}
    other = {"scorer": {"judge": {"base_url": "http://x/v1", "model": "m", "timeout": 9, "max_unread": 0.5}}}
    data = load_data(recipe_of(tmp_path))
    for one, two in (((None, {}), (None, free)), ((judge, {"rewards": []}), (other, {"rewards": []}))):
        found = [iterative._deciding(recipe_of(tmp_path, loop, **k), "m", data.train) for loop, k in (one, two)]
        assert found[0] == found[1] and found[0]["beta"] == 0.1 and found[0]["lora_r"] == 16


# Merging


class Adapted:
    """In place of a trainer with an adapter."""

    peft_config = ()
    dtype = torch.float32
    accelerator = property(lambda self: self)
    model = property(lambda self: self)

    def unwrap_model(self, model):
        return model

    def get_base_model(self):
        return self

    def save_model(self, folder):
        Path(folder).mkdir(parents=True)


def test_an_adapter_is_merged_into_the_revision_that_it_was_trained_on(tmp_path, monkeypatch):
    trainer, merged, asked = make(tmp_path), [], []
    trainer.base, args = "org/model", trainer.recipe.model_args
    args.model_name_or_path, args.model_revision = "org/model", "v2"
    monkeypatch.setattr(policies, "snapshot_download", lambda *a, **k: asked.append((a, k)) or "/cache/v2")

    def merge(adapter, out, base, precision):
        merged.append((base, precision))
        return merging.Merged(out, base, (adapter,), precision, moved=0.1, merging=0.0, rounding=0.05, stored=0.0)

    monkeypatch.setattr(merging, "merge_adapter", merge)
    for number, start in ((1, "org/model"), (2, "/rounds/round-1/policy")):
        folder = folder_of(str(tmp_path / "run"), number)
        folder.path.mkdir(parents=True)
        trainer._store(Adapted(), folder, start)
        assert folder.policy.is_dir()
        (warning,) = folder.read("merge")
        assert warning.startswith("rounding to float32 undoes a good part")
    assert merged == [("/cache/v2", "float32"), ("/rounds/round-1/policy", "float32")]
    assert asked == [(("org/model",), {"revision": "v2"})]


def test_warnings_of_rounds_are_those_of_the_run(tmp_path):
    """Also of rounds that a run before this one finished."""
    trainer, watch = make(tmp_path, {"rounds": 1}), Watch()
    folder = folder_of(trainer.args.output_dir, 1)
    numbers = {"win_rate": 0.5, "win_rate_over_start": 0.5}
    folder.value("log", lambda: [{"step": 3, "loss": 1.0}])
    folder.value("report", lambda: {"round": 1, "numbers": numbers, "nesterov": {}, "warnings": ["rounded"]})
    trainer.add_callback(watch)
    trainer.log.begin([folder])
    assert watch.warnings == ["round 1: rounded"] and "  rounded" in trainer.summary()


# Data


def prompts_of(folder: Path, rows: list[dict[str, Any]], loop: dict[str, Any], **keys: Any) -> IterativeTrainer:
    recipe = recipe_of(folder, loop, **keys)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return IterativeTrainer(recipe, tiny_path(), tiny_tokenizer(), load_data(recipe))


def test_a_prompt_that_comes_twice_is_taken_once(tmp_path):
    rows = [{"prompt": f"{i} + 1"} for i in range(8)]
    trainer = prompts_of(tmp_path, [*rows, *rows[:5]], {"prompts_per_round": 3, "eval_prompts": 2})
    taken = [*trainer.held_out, *(i for one in trainer.splits for i in one)]
    assert sorted(taken) == list(range(8)) and trainer.duplicates == 5
    with pytest.raises(DataError, match="the data set has 8 different ones"):
        prompts_of(tmp_path, [*rows, *rows], {"prompts_per_round": 4, "eval_prompts": 2})


def test_teachers(tmp_path):
    rows = [{"prompt": f"{i}?", "gold": gold} for i, gold in enumerate(["text", None, "", "b", "c", "d", "e"])]
    loop = {"prompts_per_round": 2, "teacher_column": "gold"}
    trainer = prompts_of(tmp_path / "a", rows, loop)
    found = {line["prompt"]: line["teacher"] for line in trainer._part(1, [0, 1, 2], 0)}
    assert found == {0: "text", 1: None, 2: ""}
    assert building.teacher_of({"gold": [{"role": "assistant", "content": "last"}]}, "gold") == "last"
    assert building.teacher_of({"gold": []}, "gold") is None
    with pytest.raises(DataError, match="no column 'glod', did you mean 'gold'"):
        prompts_of(tmp_path / "b", rows, loop | {"teacher_column": "glod"})
    with pytest.raises(DataError, match="row 0 of 'gold' has 0; expected a text"):
        prompts_of(tmp_path / "c", [row | {"gold": i} for i, row in enumerate(rows)], loop)


def test_a_cut_off_reply_is_an_automatic_negative(tmp_path, monkeypatch):
    monkeypatch.undo()
    line = {"teacher": "t", "replies": [{"text": "a", "tokens": [5], "cut": cut} for cut in (True, False)]}
    assert [r.negative for r in building.replies_of(line, tiny_tokenizer(), 0.2)] == [False, True, False]


def test_one_reply_alone_is_enough_for_a_label_and_no_pair(tmp_path):
    trainer = kto(tmp_path, {"num_samples": 1, "label_threshold": 0.5})
    rows = [trainer.rows[0]]
    sampled = [{"round": 1, "prompt": 0, "sampler": "m", "teacher": None}]
    sampled[0]["replies"] = [{"text": "abc", "tokens": [4, 5, 6], "cut": False}]
    (verdict,) = building.verdicts(rows, sampled, trainer.scorer, trainer.loop, tiny_tokenizer())
    assert verdict["rewards"] == [None] and verdict["scores"] == [1.0]
    assert [line["label"] for line in building.label_lines(rows, sampled, [verdict], trainer.loop)] == [True]
    pairs = make(tmp_path / "b", {"num_samples": 1, "teacher_column": "gold"})  # of a row without a teacher
    assert building.pair_lines(rows, sampled, [verdict], pairs.loop) == []
    assert building.contradictions(sampled, [verdict], pairs.loop) == 0


def test_two_replies_with_the_same_text_make_no_pair(tmp_path, monkeypatch):
    """Scores 6, 3, 0: only the third reply differs. The fourth is the first one cut off, an automatic negative."""
    monkeypatch.undo()
    loop = make(tmp_path, {"pairs": "rubric"}).loop
    cut = [("same", False), ("same", False), ("other", False), ("same", True)]
    replies = [{"text": text, "tokens": [1], "cut": end} for text, end in cut]
    line = {"round": 1, "prompt": 0, "sampler": "m", "teacher": None, "replies": replies}
    wins = losing(wins_of_scores([6, 3, 0, 6]), [False, False, False, True])
    verdict = {"scores": [6, 3, 0, 6], "wins": wins.tolist(), "rewards": self_play_rewards(wins).tolist()}
    verdict["negatives"] = [end for _, end in cut]
    found = building.pair_lines([{"prompt": "p"}], [line], [verdict], loop)
    assert [row["replies"] for row in found] == [[0, 2]]
    assert building.identical([line], [verdict], loop) == 2, "0 over 1 and 0 over 3"


# Refusals


def test_too_few_prompts(tmp_path):
    with pytest.raises(
        DataError, match=r"2 rounds x 5 prompts \+ 3 held-out ones take 13 prompts, the data set has 11 different"
    ):
        make(tmp_path, {"prompts_per_round": 5})
    assert len(make(tmp_path, {"prompts_per_round": None}).splits[1]) == 4  # (11 - 3) // 2


def test_no_pair(tmp_path, monkeypatch):
    """Nothing is written that a run could not come back from."""
    monkeypatch.setattr(building, "pair_lines", lambda *args: [])
    told = "round 1: no pair came out of its samples; lower min_positive_score.* start a new run"
    for _ in range(2):
        with pytest.raises(DataError, match=told):
            make(tmp_path).train()
    assert not (rounds_at(tmp_path) / "train.jsonl").exists() and (rounds_at(tmp_path) / "scores.jsonl").exists()


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
        ({"nesterov": {"skip_first": 1}, "rounds": 3}, {}, "skip_first 1 must be true or false"),
        ({"nesterov": {"skip_first": True}}, {}, "skip_first has no effect in 2 rounds"),
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
        ({"repeat_share": 7.0}, {}, r"repeat_share: 7\.0 must be <= 1"),
        ({"scorer": {"judge": "gpt-4"}}, {"rewards": []}, "judge: expected a mapping of its settings, got 'gpt-4'"),
        ({"scorer": {"ensemble": {"models": "org/name"}}}, {"rewards": []}, "models 'org/name' must be a list"),
        ({}, {"dataset_streaming": True}, "dataset_streaming: the loop makes data of all rows.*set it to false"),
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
