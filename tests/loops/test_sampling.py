"""Replies of the tiny model: seeds, ends, batches, and what TRL's vLLM client is asked."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import prompts, tiny_path, tiny_tokenizer
from trl_ext.loops.sampling import (
    Drawing,
    TransformersSampler,
    VllmSampler,
    kl_of_samples,
    number_of,
    prompt_ids,
    sample_of,
    token_log_probs,
)

DRAWING = Drawing(temperature=1.0, top_p=1.0, length=6, batch=4)


@pytest.fixture(scope="module")
def sampler():
    return TransformersSampler(AutoModelForCausalLM.from_pretrained(tiny_path()), tiny_tokenizer())


def texts(found):
    return [[sample["text"] for sample in some] for some in found]


def test_seeds_decide(sampler):
    rows = list(prompts(5))
    sampler.model.train()
    state = torch.random.get_rng_state()
    first = sampler.sample(rows, 2, DRAWING, "a")
    assert torch.equal(state, torch.random.get_rng_state()) and sampler.model.training
    assert [len(some) for some in first] == [2] * 5 and all(len(s["tokens"]) <= 6 for some in first for s in some)
    torch.manual_seed(7)
    assert sampler.sample(rows, 2, DRAWING, "a") == first
    assert texts(sampler.sample(rows, 2, DRAWING, "b")) != texts(first)
    assert first[0][0] != first[0][1], "samples of one prompt differ"
    assert sampler.sample(rows[:4], 2, DRAWING, "a") == first[:4], "whole batches do not depend on later ones"


def test_greedy_limit_is_the_models_own_continuation(sampler):
    """A tiny temperature takes the most likely token, which a loop over single forwards finds as well."""
    rows = list(prompts(3))
    found = sampler.sample(rows, 1, Drawing(1e-6, 1.0, 4, 8), "a")
    for row, (sample,) in zip(rows, found, strict=True):
        ids = prompt_ids(sampler.tokenizer, row)
        for token in sample["tokens"]:
            assert int(sampler.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_the_end_of_a_reply():
    tokenizer = tiny_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    a, b = tokenizer("ab")["input_ids"]
    assert sample_of(tokenizer, [a, b, end, pad, pad], {end}) == {"text": "ab", "tokens": [a, b, end], "cut": False}
    assert sample_of(tokenizer, [a, b], {end}) == {"text": "ab", "tokens": [a, b], "cut": True}
    assert sample_of(tokenizer, [end], {end}) == {"text": "", "tokens": [end], "cut": False}


def test_log_probs_of_a_reply(sampler):
    """Against one forward for each token."""
    (row,) = prompts(1)
    ids, tokens = prompt_ids(sampler.tokenizer, row), sampler.tokenizer("abc")["input_ids"]
    expected = []
    for token in tokens:
        with torch.no_grad():
            logits = sampler.model(torch.tensor([ids])).logits[0, -1] / 0.7
        expected.append(float(logits[token] - logits.exp().sum().log()))
        ids.append(token)
    found = token_log_probs(sampler.model, sampler.tokenizer, row, tokens, 0.7)
    assert found == pytest.approx(expected, abs=1e-5)


def test_kl_of_samples():
    """p = (0.5, 0.5) and own q = (0.25, 0.75), each token as often as q says: KL(p || q) = 0.143841."""
    half, q = math.log(0.5), [math.log(0.25), *[math.log(0.75)] * 3]
    assert kl_of_samples([half] * 4, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_of_samples(q, q) == 0 and kl_of_samples([half], q[:1]) > 0


class Client:
    """In place of TRL's vLLM client."""

    def __init__(self, end):
        self.end, self.sent, self.asked = end, [], []

    def update_model_params(self, model):
        self.sent.append(model)

    def reset_prefix_cache(self):
        self.sent.append("reset")

    def generate(self, prompts, n, **settings):
        self.asked.append((prompts, n, settings))
        return {"completion_ids": [[40 + i, 41 + k, self.end] for i in range(len(prompts)) for k in range(n)]}


def test_vllm(sampler):
    client, rows = Client(sampler.tokenizer.eos_token_id), list(prompts(3))
    found = VllmSampler(sampler.model, sampler.tokenizer, client).sample(rows, 2, DRAWING, "a")
    assert client.sent == [sampler.model, "reset"], "the weights go first, once"
    assert [len(asked[0]) for asked in client.asked] == [2, 1] and client.asked[0][1] == 2
    assert client.asked[0][0] == [prompt_ids(sampler.tokenizer, row) for row in rows[:2]]
    assert client.asked[0][2] == {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 6,
        "generation_kwargs": {"seed": number_of("a/0")},
    }
    assert client.asked[1][2]["generation_kwargs"] == {"seed": number_of("a/1")}
    assert [[s["tokens"][:2] for s in some] for some in found] == [
        [[40, 41], [40, 42]],
        [[41, 41], [41, 42]],
        [[40, 41], [40, 42]],
    ]
    assert not found[0][0]["cut"]
