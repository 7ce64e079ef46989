"""What is asked of vLLM, on a stand-in with its interface: vLLM itself needs a GPU and was not run here."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from evals.generation import vllm
from evals.generation.hf import Job
from evals.generation.noise import row_seed
from evals.models import BaseSpec, ModelError
from evals.task import Sampling
from tests.evals.test_models import adapter
from tests.tiny import tiny_path


@dataclass
class Params:
    """Keeps every field that it is given."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        self.given = given


@dataclass
class LLM:
    """Answers "ok" and keeps what it was asked."""

    asked: list[tuple] = field(default_factory=list)

    def __init__(self, **given: Any) -> None:
        self.given, self.asked = given, []

    def generate(self, prompts: list, params: Any, use_tqdm: bool, lora_request: Any = None) -> list:
        self.asked.append((prompts, params, lora_request))
        shift = 0.5 if lora_request else 0.0
        logprobs = [{7: types.SimpleNamespace(logprob=-1.0 - shift)}]
        out = types.SimpleNamespace(text="ok", token_ids=[1, 2], finish_reason="length", logprobs=logprobs)
        return [types.SimpleNamespace(outputs=[out]) for _ in prompts]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, Params  # type: ignore[attr-defined]
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: (name, number, path)  # type: ignore[attr-defined]
    for name, value in {
        "vllm": module,
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.request": request,
    }.items():
        monkeypatch.setitem(sys.modules, name, value)


def test_one_engine_serves_base_and_adapters_with_every_sampling_field(stand_in: None, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", rank_pattern={"q_proj": 24})
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    loaded = vllm.load(BaseSpec(tiny_path(), dtype="bfloat16"), tokenizer, [one])
    given = loaded.llm.given
    assert (given["enable_lora"], given["max_lora_rank"], given["generation_config"]) == (True, 24, "vllm")
    assert set(loaded.identity) == {"base", "one"}
    jobs = [Job("t", "q", n, "hello") for n in range(3)]
    with loaded.answering(one, 64) as generator:
        (replies,) = generator.generate(jobs, Sampling(3, 0.6, 0.95, 20, 100, seed=5))
    prompts, params, request = loaded.llm.asked[-1]
    assert prompts[0] == {"prompt_token_ids": tokenizer("hello", add_special_tokens=False)["input_ids"]}
    assert request == ("one", 1, str(one.folder))
    assert [p.given["seed"] for p in params] == [row_seed(5, "t", "q", n) % 2**63 for n in range(3)]
    wanted = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 100, "n": 1, "repetition_penalty": 1.0}
    assert wanted.items() <= params[0].given.items()
    assert [(r.text, r.tokens, r.finish, r.sample) for r in replies] == [("ok", 2, "length", n) for n in range(3)]
    with loaded.answering(None, 64) as generator:
        list(generator.generate(jobs[:1], Sampling(1, 0.0)))
    assert loaded.llm.asked[-1][2] is None and loaded.llm.asked[-1][1][0].given["top_k"] == -1
    assert loaded.activity(one, ["a", "b"]).largest == pytest.approx(0.5)


def test_what_vllm_cannot_do_is_refused(stand_in: None) -> None:
    with pytest.raises(ModelError, match="use --backend hf for 8-bit"):
        vllm.load(BaseSpec(tiny_path(), quantization={"load_in_8bit": True}), None, [])
    loaded = vllm.load(BaseSpec(tiny_path()), None, [])
    with (
        pytest.raises(ModelError, match="the grammar control runs on transformers"),
        loaded.answering(None, 1, object()),
    ):
        pass
