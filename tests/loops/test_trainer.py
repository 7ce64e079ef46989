"""PasoDoble on the tiny model through real training: frozen players, resume, what TRL gets, logs and refusals."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

import trl_ext
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import memory
from trl_ext.data import DataError, load_data
from trl_ext.loops import rules, sandbox
from trl_ext.loops.players import PROPOSER, kept
from trl_ext.loops.rules import parse_json
from trl_ext.loops.settings import PasoDoble
from trl_ext.loops.trainer import PasoDobleTrainer
from trl_ext.plan import PlanError
from trl_ext.recipe import RecipeError, load_recipe
from trl_ext.rewards import checked
from trl_ext.rewards.checked import RewardError
from trl_ext.sandbox.problems import ITEMS, NAMES

_CPU = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
OFFLINE = {"schedule": "offline", "proposer_updates": 2, "solver_rounds": 2}


def right(completions: list, answer: list[str], **kwargs: Any) -> list[float | None]:
    """Half of all answers: the first characters are both even or both odd. None for an answer that cannot be read."""
    return [
        None if a == "?" else float(bool(c[0]["content"]) and ord(c[0]["content"][0]) % 2 == ord(a[0]) % 2)
        for c, a in zip(completions, answer, strict=True)
    ]


@pytest.fixture(autouse=True)
def _any_text_is_a_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.PARSERS, "json", lambda text: rules.Proposal(text[:3], text[3:5]))


def make(
    folder: Path,
    reward: Any = right,
    peft: bool = True,
    loop: dict[str, Any] | None = None,
    data: Any = None,
    **kwargs: Any,
) -> Any:
    sizes = {"per_device_train_batch_size": 12, "num_generations": 4, "loss_type": "dr_grpo", "max_steps": 4}
    args = trl_ext.GRPOConfig(**grpo_args(str(folder), **sizes | kwargs))
    torch.manual_seed(0)
    return PasoDobleTrainer(
        tiny_path(),
        reward,
        args,
        data or prompts(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if peft else None,
        loop=PasoDoble(**{"proposal": "json", "answer_check": "off"} | (loop or {})),
    )


def adapters(trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {"default": {}, "proposer": {}}
    for name, parameter in trainer.model.named_parameters():
        for adapter in found:
            if f".{adapter}." in name:
                found[adapter][name] = parameter.detach().clone()
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def followed(trainer: Any) -> list[tuple[bool, bool]]:
    """(Solver changed, Proposer changed) for each round of a training."""
    changed: list[tuple[bool, bool]] = []
    before = adapters(trainer)

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            nonlocal before
            now = adapters(trainer)
            moved = [any(not torch.equal(now[a][n], before[a][n]) for n in now[a]) for a in ("default", "proposer")]
            changed.append((moved[0], moved[1]))
            before = now

    trainer.add_callback(Look())
    trainer.train()
    return changed


def test_online_trains_both_unless_skipped(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=6)
    changed = followed(trainer)
    skips = [e["skipped"] for e in lines(tmp_path)[::3]]
    assert changed == [(skip is None, skip is None) for skip in skips]
    assert any(skip is None for skip in skips)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 6, "one entry for each round, skipped or not"
    played = next(entry for entry, skip in zip(history, skips, strict=True) if skip is None)
    shared = {"pass_rate", "valid", "too_easy", "invalid", "diversity", "skipped", "solver_questions"}
    assert {f"pasodoble/{name}" for name in shared | {"proposer_reward", "history"}} <= set(played)
    assert {"completions/mean_length", "proposer/completions/mean_length", "proposer/loss"} <= set(played)
    numbers = lines(tmp_path)[:3]
    assert history[0]["pasodoble/pass_rate"] == pytest.approx(sum(e["checked"] for e in numbers) / 3)
    assert history[0]["rewards/right/mean"] == pytest.approx(sum(e["pass_rate"] for e in numbers) / 3)


def test_offline_freezes_the_other_player(tmp_path: Path) -> None:
    """Bit for bit; phases as the diary tells them."""
    changed = followed(make(tmp_path, loop=OFFLINE, max_steps=9))
    players = {e["round"]: e["player"] for e in lines(tmp_path)}
    assert set(players.values()) == {"proposer", "solver"}
    for number, (solver, proposer) in enumerate(changed):
        assert not (solver if players[number] == "proposer" else proposer)
    assert any(solver for solver, _ in changed) and any(proposer for _, proposer in changed)


def test_nothing_moves_when_nothing_is_solved(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, reward=lambda completions, **kwargs: [0.0] * len(completions), max_steps=2, weight_decay=0.1
    )
    assert followed(trainer) == [(False, False)] * 2


@pytest.mark.parametrize(("loop", "stop"), [({}, 2), (OFFLINE, 3)], ids=["online", "offline"])
def test_resume_equals_not_stopping(tmp_path: Path, loop: dict[str, Any], stop: int) -> None:
    settings: dict[str, Any] = {"loop": loop, "max_steps": 6, "save_strategy": "steps", "save_steps": stop}
    whole = make(tmp_path, **settings)
    whole.train()
    entries = lines(tmp_path)
    again = make(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    expected, found = adapters(whole), adapters(again)
    assert_equal(expected["default"], found["default"])
    assert_equal(expected["proposer"], found["proposer"])
    assert lines(tmp_path) == entries
    assert again.game.state == whole.game.state
    assert again.proposer.state.global_step == whole.proposer.state.global_step > 0


@pytest.mark.parametrize("loop", [{}, OFFLINE], ids=["online", "offline"])
def test_a_reward_that_fails_leaves_the_rounds_before_it(tmp_path: Path, loop: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"loop": loop, "max_steps": 6, "save_strategy": "steps", "save_steps": 100}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    fails = True

    def judge(**kwargs: Any) -> list[float | None]:
        if fails and failing.state.global_step == 3:
            raise OSError("no judge")
        return right(**kwargs)

    failing = make(tmp_path / "cut", reward=judge, **settings)
    with pytest.raises(RewardError, match="no judge"):
        failing.train()
    fails = False
    again = make(tmp_path / "cut", reward=judge, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for player, expected in adapters(whole).items():
        assert_equal(expected, adapters(again)[player])
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole") and again.game.state == whole.game.state


def test_methods_of_both_players_and_micro_batches(tmp_path: Path) -> None:
    """Each role has its own plan and state; 2 micro-batches make one step."""
    trainer = make(
        tmp_path,
        loop={"proposer_methods": {"epo": {}}},
        methods="velocity_rank",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
        num_generations=4,
    )
    assert [m.name for m in trainer.plan.methods] == ["velocity_rank"]
    assert [m.name for m in trainer.proposer.plan.methods] == ["epo"]
    trainer.train()
    names = set().union(*trainer.state.log_history)
    assert any(name.startswith("velocity_rank/") for name in names)
    assert any(name.startswith("proposer/epo/") for name in names)


def test_a_handed_batch_gives_trls_update(tmp_path: Path) -> None:
    """The Proposer's update, outside `train()`, against a plain GRPOTrainer that makes the same batch for itself."""
    sizes = {"per_device_train_batch_size": 12, "num_generations": 4, "loss_type": "dr_grpo", "max_steps": 1}
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **sizes, weight_decay=0.1))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts(), peft_config=lora)
    before, batches, make_batch = weights(plain), [], plain._generate_and_score_completions

    def recorded(inputs: list) -> dict[str, Any]:
        batches.append(make_batch(inputs))
        torch.manual_seed(7)  # TRL shuffles the rows next
        return dict(batches[-1])

    plain._generate_and_score_completions = recorded
    plain.train()
    trainer = make(tmp_path, max_steps=1, weight_decay=0.1)
    for name, parameter in trainer.model.named_parameters():
        if f".{PROPOSER}." in name:
            parameter.data.copy_(before[name.replace(f".{PROPOSER}.", ".default.")])
    solver = adapters(trainer)["default"]
    trainer.proposer.start(1)
    torch.manual_seed(7)
    trainer.update_proposer(batches[0])
    found = {name.replace(f".{PROPOSER}.", ".default."): w for name, w in adapters(trainer)[PROPOSER].items()}
    assert_equal(weights(plain), found)
    assert any(not torch.equal(before[name], w) for name, w in found.items())
    assert_equal(solver, adapters(trainer)["default"])
    assert trainer.model.active_adapter == "default"


def test_trl_trains_on_what_was_kept(tmp_path: Path) -> None:
    """Advantages of a kept question are TRL's for its group; the number of tokens counts kept rows."""
    trainer = make(tmp_path)
    trainer.proposer.start(1)
    questions = [rules.Proposal("abc", "1"), rules.Proposal("def", "2"), rules.Proposal("ghi", "3")]
    batch, verdicts = trainer.answer(questions)
    std = verdicts.std(1, keepdim=True)
    expected = (verdicts - verdicts.mean(1, keepdim=True)) / (std + 1e-4)
    found = kept(batch, [True, False, True], 4)
    assert torch.allclose(found["advantages"].view(2, 4), expected[[0, 2]], atol=1e-6)
    assert torch.equal(found["completion_ids"][4:], batch["completion_ids"][8:])
    assert int(found["num_items_in_batch"]) == int(found["completion_mask"].sum())
    assert trainer.model.active_adapter == "default"


def test_an_unread_answer_is_matched_by_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    _, verdicts = trainer.answer([rules.Proposal("abc", "?"), rules.Proposal("def", "?")])
    assert verdicts.tolist() == [[0.0] * 4] * 2


def test_a_decorator_of_the_user_stays(tmp_path: Path) -> None:
    """Our own check is taken off, since it would refuse what is a verdict here; nothing else is."""

    @functools.wraps(right)
    def halved(**kwargs: Any) -> list[float | None]:
        return [None if value is None else (1.0 + value) / 4 for value in right(**kwargs)]

    for reward in (halved, checked(halved)):
        _, verdicts = make(tmp_path, reward).answer([rules.Proposal("abc", "a"), rules.Proposal("def", "?")])
        assert set(verdicts[0].tolist()) <= {0.25, 0.5} and verdicts[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_one_knowledge_text_for_each_round(tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text of a small set comes once before one comes again, also from a stream."""
    rows = prompts(4)
    data = rows.to_iterable_dataset() if stream else rows
    trainer = make(tmp_path, data=data, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=8)
    seen: list[Any] = []
    monkeypatch.setattr(trainer.game, "play", lambda row: seen.append(row["prompt"][0]["content"]))
    trainer.train()
    assert sorted(seen) == sorted(row["prompt"][0]["content"] for row in rows)


def test_both_adapters_are_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / PROPOSER / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft": False}, "use_peft"),
        ({"beta": 0.1}, "beta: set it to 0"),
        ({"num_iterations": 2}, "num_iterations"),
        ({"max_steps": -1}, "max_steps"),
        ({"per_device_train_batch_size": 4}, "a round has 1 question"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "set it to steps_per_generation"),
        ({"loop": {"verifier": "other"}}, "no reward is called 'other'"),
        ({"loop": {"tau_low": 0.5, "p_high": 0.5}}, "p_high"),
        ({"loop": {"solver_prompt": "no"}}, "solver_prompt"),
        ({"loop": {"solver_rounds": 3}}, "solver_rounds has no effect without schedule: offline"),
        ({"loop": {"proposer_updates": 3}}, "proposer_updates has no effect without schedule: offline"),
        ({"loop": {"proposer_methods": {"fg_expo": {}}}}, "proposer_methods: fg_expo"),
        ({"loop": {"proposer_methods": "epoo"}}, "proposer_methods: unknown method 'epoo'"),
    ],
)
def test_refusals(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make(tmp_path, **settings)


def test_real_recipe() -> None:
    """The card's setting; bf16 is refused on a machine without a GPU unless use_cpu is set."""
    recipe = load_recipe("pasodoble_qwen3_1.7b", _CPU)
    args = recipe.training_args
    assert recipe.loop == PasoDoble(proposer_length=6144, solver_prompt=recipe.loop.solver_prompt)
    assert (args.num_generations, args.per_device_train_batch_size * args.steps_per_generation) == (6, 36)
    card = {"temperature": 0.6, "epsilon": 0.2, "beta": 0.0, "loss_type": "dr_grpo", "max_grad_norm": 1.0}
    assert {key: getattr(args, key) for key in card} == card
    assert (args.max_completion_length, args.max_steps, recipe.extra.max_prompt_tokens) == (6144, 2000, 1280)
    one = dataclasses.replace(recipe, loop=None)
    assert memory.predict(recipe).total > memory.predict(one).total, "the second adapter and optimizer count"
    assert memory.predict(recipe).fits(80) == []


def test_data_of_the_sandbox() -> None:
    recipe = load_recipe("sandbox_pasodoble")
    data = load_data(recipe)
    texts = [row["prompt"][0]["content"] for row in data.train]
    assert len(set(texts[:64])) == 64 and texts[0] in {f"{name} has {item}." for name in NAMES for item in ITEMS}
    assert data.held_out is not None and {"prompt", "answer"} <= set(data.held_out.column_names)
    with pytest.raises(DataError, match="the Proposer decides"):
        load_data(load_recipe("sandbox_pasodoble", ["--dataset_options.difficulty", "1"]))


def test_lessons_are_right_and_never_a_test_problem() -> None:
    for about, text in itertools.islice(sandbox.lessons(sandbox.Lessons()), 50):
        proposal = parse_json(text)
        assert proposal.question.startswith(about.removesuffix(".").rpartition(" ")[0])
        assert text.endswith(f'"answer": {proposal.answer}}}')
        assert hashlib.sha256(proposal.question.encode()).digest()[0] % 5 != 0, "that is the sandbox's test split"


def test_recipes() -> None:
    recipe = load_recipe("sandbox_pasodoble")
    assert recipe.loop == PasoDoble(
        proposal="json", answer_check="tokens", proposer_adapter="sandbox", proposer_length=recipe.loop.proposer_length
    )
    assert "16 questions x 16 answers" in recipe.loop.describe(recipe.training_args)
    with pytest.raises(RecipeError, match="loop: pasodoble: beta: set it to 0"):
        load_recipe("sandbox_pasodoble", ["--beta", "0.1"])
    with pytest.raises(RecipeError, match="unknown setting 'tau_lo', did you mean 'tau_low'"):
        load_recipe("sandbox_pasodoble", ["--loop.pasodoble.tau_lo", "0.1"])
    assert load_recipe("sandbox_pasodoble", ["--loop.pasodoble.tau_low", "0.1"]).loop.tau_low == 0.1
