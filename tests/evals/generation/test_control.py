"""Replies under a grammar: a random model can then only write what its schema allows."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.generation.control import Grammars, SchemaControl
from evals.generation.hf import HFGenerator, Job, end_ids
from evals.task import Sampling
from tests.tiny import tiny_path

SCHEMAS = {
    "flat": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
}


def answers(sampling: Sampling) -> list[tuple[str, str, str]]:
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_path()), AutoTokenizer.from_pretrained(tiny_path())
    control = SchemaControl(tokenizer, model.config.vocab_size, end_ids(model, tokenizer), Grammars(SCHEMAS))
    jobs = [Job("t", item, n, f"{item}?") for item in SCHEMAS for n in range(sampling.samples)]
    batches = HFGenerator(model, tokenizer, 3, control).generate(jobs, sampling)
    return [(r.item, r.text, r.finish) for batch in batches for r in batch]


@pytest.mark.parametrize("sampling", [Sampling(6, 1.0, max_new_tokens=120), Sampling(1, 0.0, max_new_tokens=120)])
def test_every_reply_that_ends_is_valid(sampling: Sampling) -> None:
    found = answers(sampling)
    ended = [(item, text) for item, text, finish in found if finish == "stop"]
    assert len(ended) >= 0.5 * len(found), "white space is legal JSON, so a random model may not come to an end"
    for item, text in ended:
        jsonschema.validate(json.loads(text), SCHEMAS[item])


@pytest.mark.parametrize("odd", [{"type": "string", "pattern": "(?=a)b"}, {"not": {"type": "string"}}])
def test_a_schema_without_a_grammar_is_left_out(odd: dict) -> None:
    found = Grammars(SCHEMAS | {"odd": odd})
    assert found.left_out == ["odd"] and list(found.texts) == list(SCHEMAS)


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}, "lines"])
def test_every_usual_layout_is_allowed(layout: dict | str) -> None:
    """A model keeps the layout that it was trained on; under another one its answers get worse (measured, sandbox)."""
    value = {"n": 7, "ok": True}
    text = '{"n":\n7,\n"ok": true}' if isinstance(layout, str) else json.dumps(value, **layout)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    mask = SchemaControl(tokenizer, len(tokenizer), [2], Grammars(SCHEMAS))([Job("t", "flat", 0, "")], 0)
    ids = [*tokenizer(text)["input_ids"], 2]
    for at, token in enumerate(ids):
        scores = mask(torch.tensor([ids[:at]], dtype=torch.long), torch.zeros(1, len(tokenizer)))
        assert scores[0, token] == 0, f"{text[:at]!r} may not go on with {tokenizer.decode([token])!r}"
