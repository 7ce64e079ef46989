"""Replies from a model: the same in any batch, with nothing of the model's own generation config."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evals.generation.hf import HFGenerator, Job, end_ids, left_padded, own_generation_config
from evals.generation.store import Reply
from evals.task import Sampling
from tests.tiny import tiny_path

SAMPLING = Sampling(2, 1.0, max_new_tokens=12)


@functools.cache
def model_and_tokenizer() -> tuple:
    torch.set_num_threads(1)
    path = tiny_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def jobs(count: int = 12, samples: int = 2) -> list[Job]:
    texts = {f"q{i}": "x" * (1 + 5 * i % 23) + "?" for i in range(count)}
    return [Job("t", item, n, text) for item, text in texts.items() for n in range(samples)]


def answers(batch_size: int, sampling: Sampling = SAMPLING, chosen: list[Job] | None = None) -> dict:
    model, tokenizer = model_and_tokenizer()
    batches = HFGenerator(model, tokenizer, batch_size).generate(jobs() if chosen is None else chosen, sampling)
    return {(r.item, r.sample): r for batch in batches for r in batch}


def test_replies_do_not_depend_on_the_batch_or_on_the_other_questions() -> None:
    together = answers(64)
    assert answers(1) == answers(5) == together
    some = [job for job in jobs() if job.item in ("q3", "q7")]
    assert answers(64, chosen=some) == {k: r for k, r in together.items() if k[0] in ("q3", "q7")}
    assert together["q3", 0].text != together["q3", 1].text, "samples of one question differ"


def test_settings_take_effect() -> None:
    base = answers(64)
    assert answers(64, Sampling(2, 1.0, max_new_tokens=12, seed=1)) != base
    assert answers(64, Sampling(2, 0.3, max_new_tokens=12)) != base
    assert answers(64, Sampling(2, 1.0, top_p=0.5, max_new_tokens=12)) != base
    greedy = answers(64, Sampling(1, 0.0, max_new_tokens=12))
    assert answers(64, Sampling(2, 1.0, top_k=1, max_new_tokens=12)) == greedy, "one candidate leaves nothing to draw"
    assert greedy["q1", 0].text == greedy["q1", 1].text


def test_greedy_equals_the_models_own_argmax() -> None:
    model, tokenizer = model_and_tokenizer()
    ids = torch.tensor([tokenizer("xxxxxx?")["input_ids"]])
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    end = tokenizer.eos_token_id
    expected = ids[0, 7:].tolist()
    expected = expected[: expected.index(end) + 1] if end in expected else expected
    found = answers(64, Sampling(1, 0.0, max_new_tokens=12))["q1", 0]
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (found.tokens, found.finish) == (len(expected), "stop" if end in expected else "length")


@pytest.mark.parametrize(
    "leak",
    [{"top_k": 1}, {"repetition_penalty": 5.0}, {"max_new_tokens": 2}, {"min_new_tokens": 12}, {"do_sample": True}],
)
def test_the_models_generation_config_does_not_leak_in(leak: dict) -> None:
    model, _ = model_and_tokenizer()
    expected, before = answers(64), model.generation_config
    try:
        model.generation_config = GenerationConfig(**leak, eos_token_id=before.eos_token_id)
        assert answers(64) == expected
        assert getattr(model.generation_config, next(iter(leak))) == next(iter(leak.values())), "and it is given back"
    finally:
        model.generation_config = before


def test_finish_and_length_are_counted_from_the_tokens() -> None:
    found = answers(64, Sampling(2, 1.0, max_new_tokens=200))
    stopped = [r for r in found.values() if r.finish == "stop"]
    cut = [r for r in found.values() if r.finish == "length"]
    assert stopped, "a random model draws the end token once in about 260 tokens"
    assert all(r.tokens == 200 for r in cut)
    longer = answers(64, Sampling(2, 1.0, max_new_tokens=250))
    assert all(longer[r.item, r.sample] == r for r in stopped), "a finished reply does not change with the limit"
    assert all(longer[r.item, r.sample].text.startswith(r.text[:-4]) for r in cut), "and a longer limit continues it"


def test_running_out_of_memory_halves_the_batch() -> None:
    model, tokenizer = model_and_tokenizer()
    generator = HFGenerator(model, tokenizer, 16)
    draw, sizes = generator._batch, []

    def limited(part: list[Job], ids: list, sampling: Sampling) -> list[Reply]:
        sizes.append(len(part))
        if len(part) > 5:
            raise torch.OutOfMemoryError
        return draw(part, ids, sampling)

    generator._batch = limited  # type: ignore[method-assign]
    found = {(r.item, r.sample): r for batch in generator.generate(jobs(), SAMPLING) for r in batch}
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 4]
    assert found == answers(64)


def test_one_reply_that_does_not_fit_is_an_error() -> None:
    generator = HFGenerator(*model_and_tokenizer(), 1)

    def never(*args: object) -> list[Reply]:
        raise torch.OutOfMemoryError

    generator._batch = never  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        list(generator.generate(jobs(), SAMPLING))


def test_all_end_tokens_count() -> None:
    model, tokenizer = model_and_tokenizer()
    before = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=[7, tokenizer.eos_token_id])
        assert end_ids(model, tokenizer) == [tokenizer.eos_token_id, 7]
    finally:
        model.generation_config = before


def test_left_padding() -> None:
    ids, mask = left_padded([[5, 6], [7]], None)
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_mode_and_config_are_given_back_after_an_error() -> None:
    model, _ = model_and_tokenizer()
    model.train()
    before = model.generation_config
    with pytest.raises(RuntimeError, match="x"), own_generation_config(model):
        assert not model.training
        raise RuntimeError("x")
    assert model.training and model.generation_config is before
    model.eval()
