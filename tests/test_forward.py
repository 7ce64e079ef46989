"""Generation of our own: the model's generation config reaches none of the three places that sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import prompts, tiny_path, tiny_tokenizer
from trl_ext.forward import generated
from trl_ext.loops.sampling import Drawing, TransformersSampler
from trl_ext.rollouts.scoring import pass_rates
from trl_ext.sandbox.evaluate import evaluate

LEAKS = {
    "typical_p": 0.1,
    "no_repeat_ngram_size": 1,
    "epsilon_cutoff": 0.05,
    "suppress_tokens": list(range(3, 200)),
    "min_new_tokens": 12,
    "exponential_decay_length_penalty": (1, 5.0),
    "num_beams": 2,
    "bad_words_ids": [[i] for i in range(3, 200)],
    "repetition_penalty": 5.0,
    "min_p": 0.5,
}
TOKENIZER, ROWS = tiny_tokenizer(), list(prompts(2))


def model(**own: Any) -> Any:
    found = AutoModelForCausalLM.from_pretrained(tiny_path())
    for key, value in own.items():
        setattr(found.generation_config, key, value)
    return found


def sampled(made: Any) -> Any:
    return TransformersSampler(made, TOKENIZER).sample(ROWS, 2, Drawing(1.0, 1.0, 12, 4), "s")


def rated(made: Any) -> Any:
    """Every completion that the reward is shown."""
    seen: list[Any] = []

    def reward(completion_ids: Any, **kwargs: Any) -> list[float]:
        seen.extend(completion_ids)
        return [1.0] * len(completion_ids)

    pass_rates(made, TOKENIZER, ROWS, reward, samples=2, max_new_tokens=12)  # type: ignore[arg-type]
    return seen


def evaluated(made: Any) -> Any:
    return evaluate(made, TOKENIZER, ROWS, samples=2, max_new_tokens=12)


def evaluated_greedily(made: Any) -> Any:
    return evaluate(made, TOKENIZER, ROWS, temperature=0, max_new_tokens=12)


@pytest.mark.parametrize("way", [sampled, rated, evaluated, evaluated_greedily])
def test_the_models_generation_config_does_not_leak_in(way: Callable[[Any], Any]) -> None:
    plain = way(model())
    for key, value in LEAKS.items():
        other = model(**{key: value})
        assert way(other) == plain, key
        assert getattr(other.generation_config, key) == value, "it is given back"


def test_what_is_asked_counts() -> None:
    """The same settings, named, do change replies: the test above can fail."""
    ids = torch.tensor([TOKENIZER("1 + 1 = ")["input_ids"]])
    ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    ask |= {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    plain = generated(model(), **ask)
    assert not torch.equal(generated(model(), **ask, repetition_penalty=5.0), plain)
    adapted = get_peft_model(model(repetition_penalty=5.0), LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(generated(adapted, **ask), plain), "an adapter that was just made changes nothing"
    assert adapted.generation_config.repetition_penalty == 5.0
