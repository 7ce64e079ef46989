"""The warm-started model: size, sloppiness, and care when the prompt carries a note or a hint."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from trl_ext.annotate.prompts import teacher_note
from trl_ext.sandbox import Record, calculator, evaluate
from trl_ext.sandbox.demos import Stage, hinted
from trl_ext.sandbox.model import WarmStart, warm_start
from trl_ext.sandbox.tasks import rows, user
from trl_ext.sandbox.tokenizer import OPEN_REPLY

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
ROWS = rows(n=400, split="test")


@pytest.fixture(scope="module")
def loaded(sandbox_model: str) -> Loaded:
    return AutoModelForCausalLM.from_pretrained(sandbox_model), AutoTokenizer.from_pretrained(sandbox_model)


@pytest.fixture(scope="module")
def plain(loaded: Loaded) -> list[Record]:
    return evaluate(*loaded, ROWS)


def share(records: list[Record], verdict: str) -> float:
    return sum(getattr(record, verdict) for record in records) / len(records)


def test_size(loaded: Loaded) -> None:
    assert loaded[0].num_parameters() < 1_000_000
    assert loaded[0].config.model_type == "qwen3"
    assert loaded[0].get_input_embeddings().weight is loaded[0].get_output_embeddings().weight


def test_plain_prompts_are_answered_sloppily(plain: list[Record]) -> None:
    assert 0.3 < share(plain, "valid") < 0.55
    assert 0.1 < share(plain, "correct") < 0.3
    assert 20 < sum(record.length for record in plain) / len(plain) < 30


@pytest.mark.parametrize("note", [teacher_note(["format_error"], False), teacher_note(["final_verification"], True)])
def test_a_private_note_makes_the_model_careful(loaded: Loaded, plain: list[Record], note: str) -> None:
    noted = evaluate(*loaded, ROWS, prompt_suffix=note)
    assert share(noted, "valid") > share(plain, "valid") + 0.3
    assert share(noted, "correct") > share(plain, "correct") + 0.1


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_a_hint_helps(loaded: Loaded, plain: list[Record], rung: int) -> None:
    helped = [row | {"prompt": user(hinted(row["problem"], row["hints"][rung]))} for row in ROWS]
    assert share(evaluate(*loaded, helped), "correct") > share(plain, "correct") + 0.1


def test_the_model_calls_the_calculator_only_when_it_is_offered(loaded: Loaded, plain: list[Record]) -> None:
    model, tokenizer = loaded
    assert not any("<tool_call>" in record.text for record in plain)
    batch = tokenizer.apply_chat_template(
        [row["prompt"] for row in ROWS[:100]],
        tools=[calculator],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )
    out = model.generate(**batch, do_sample=False, max_new_tokens=64)[:, batch["input_ids"].shape[1] :]
    prefix = tokenizer(OPEN_REPLY)["input_ids"]
    replies = [
        parse_response(tokenizer, [i for i in ids if i != tokenizer.pad_token_id], prefix) for ids in out.tolist()
    ]
    calls = [call["function"] for reply in replies for call in reply.get("tool_calls") or []]
    assert len(calls) > 20
    assert sum(calculator(**call["arguments"]).isdigit() for call in calls) > 0.9 * len(calls)


def test_evaluation_repeats_and_leaves_no_trace(loaded: Loaded) -> None:
    model, _ = loaded
    model.train()
    state = torch.get_rng_state()
    first = evaluate(*loaded, ROWS[:20], samples=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()
    assert evaluate(*loaded, ROWS[:20], samples=3, seed=1) == first
    assert evaluate(*loaded, ROWS[:20], samples=3, seed=2) != first
    assert [record.row for record in first] == [i for i in range(20) for _ in range(3)]


def test_greedy_evaluation_does_not_depend_on_the_batch(loaded: Loaded) -> None:
    one = evaluate(*loaded, ROWS[:24], temperature=0, batch_size=1)
    assert evaluate(*loaded, ROWS[:24], temperature=0, batch_size=24, seed=5) == one


def test_the_same_seed_gives_the_same_weights() -> None:
    settings = WarmStart(stages=(Stage(64),))
    first, second, third = (warm_start(seed, settings)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
