"""The same evaluation with vLLM as the engine: one process, one base, adapters as LoRA requests.

vLLM draws with its own generators: each reply gets a seed of its own, the same for base and adapter, but the replies
depend on the batch as vLLM's kernels do. Not run by us on a GPU yet: the calls follow vLLM's documented interface.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals.generation.noise import row_seed
from evals.generation.store import Reply, text_hash
from evals.models import PROBES, Activity, Adapter, BaseSpec, ModelError, adapter_digest, base_identity
from evals.task import Sampling

CHUNK = 512
"""Replies handed to vLLM at once; those of a chunk are stored together."""


def load(spec: BaseSpec, tokenizer: Any, adapters: Sequence[Adapter]) -> VllmLoaded:
    """Starts vLLM. Raises ModelError when it is not installed or cannot take what the run needs."""
    if spec.quantization is not None and not spec.quantization.get("load_in_4bit"):
        raise ModelError("vLLM takes 4-bit bitsandbytes weights only: use --backend hf for 8-bit ones")
    try:
        from vllm import LLM
    except ImportError:
        raise ModelError("--backend vllm needs vLLM: pip install 'trl-ext[vllm]'") from None
    from transformers import AutoConfig

    lora = {"enable_lora": True, "max_lora_rank": max(map(_rank, adapters))} if adapters else {}
    quantization = {} if spec.quantization is None else {"quantization": "bitsandbytes"}
    config = AutoConfig.from_pretrained(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    # generation_config "vllm": without it the model's own sampling defaults would leak in
    llm = LLM(
        model=spec.model,
        revision=spec.revision,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        generation_config="vllm",
        **lora,
        **quantization,
    )
    identity = {a.name: adapter_digest(a) for a in adapters} | {"base": base_identity(spec, config)}
    return VllmLoaded(llm, tokenizer, spec, adapters, identity)


def _rank(adapter: Adapter) -> int:
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


@dataclass
class VllmLoaded:
    """What `evals.models.Loaded` is for transformers."""

    llm: Any
    tokenizer: Any
    spec: BaseSpec
    adapters: Sequence[Adapter] = ()
    identity: dict[str, str] = field(default_factory=dict)

    @property
    def ends(self) -> list[int]:
        """The tokens that end a reply, besides those that vLLM takes from the model's own config."""
        return [self.tokenizer.eos_token_id]

    @property
    def dtype(self) -> str:
        """Precision of the weights that compute."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    @contextlib.contextmanager
    def answering(self, adapter: Adapter | None, batch_size: int, constraint: Any = None) -> Iterator[VllmGenerator]:
        """A generator of replies with this adapter. vLLM forms its own batches, so `batch_size` says nothing here."""
        if constraint is not None:
            raise ModelError("the grammar control runs on transformers: --backend hf")
        yield VllmGenerator(self.llm, self.tokenizer, self._request(adapter))

    def activity(self, adapter: Adapter, prompts: Sequence[str]) -> Activity:
        """Compares the log-probabilities of the base's 20 likeliest first tokens; `largest` and `kl` are over these."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
        inputs = token_prompts(self.tokenizer, prompts[:PROBES])
        base = [_first(o) for o in self.llm.generate(inputs, params, use_tqdm=False)]
        request = self._request(adapter)
        changed = [_first(o) for o in self.llm.generate(inputs, params, use_tqdm=False, lora_request=request)]
        moved = [abs(old[t] - new.get(t, -1e9)) for old, new in zip(base, changed, strict=True) for t in old]
        return Activity(min(max(moved), 1e9), float("nan"))

    def _request(self, adapter: Adapter | None) -> Any:
        if adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(adapter.name, 1 + list(self.adapters).index(adapter), str(adapter.folder))


def _first(output: Any) -> dict[int, float]:
    return {token: found.logprob for token, found in output.outputs[0].logprobs[0].items()}


def token_prompts(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, list[int]]]:
    """Token ids, so that vLLM adds no special token of its own."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [{"prompt_token_ids": tokens} for tokens in ids]


@dataclass
class VllmGenerator:
    """Replies of one subject through `LLM.generate`."""

    llm: Any
    tokenizer: Any
    lora: Any

    def generate(self, jobs: Sequence[Any], sampling: Sampling) -> Iterator[list[Reply]]:
        """Replies in chunks, every sampling field explicit, one seed for each reply."""
        for at in range(0, len(jobs), CHUNK):
            part = jobs[at : at + CHUNK]
            inputs = token_prompts(self.tokenizer, [job.prompt for job in part])
            params = [self._params(job, sampling) for job in part]
            outputs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=self.lora)
            yield [_reply(job, output.outputs[0]) for job, output in zip(part, outputs, strict=True)]

    def _params(self, job: Any, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=sampling.max_new_tokens,
            seed=row_seed(sampling.seed, job.task, job.item, job.sample) % 2**63,
            repetition_penalty=1.0,
            skip_special_tokens=True,
        )


def _reply(job: Any, found: Any) -> Reply:
    finish = "length" if found.finish_reason == "length" else "stop"
    return Reply(job.item, job.sample, text_hash(job.prompt), found.text, len(found.token_ids), finish)  # type: ignore[arg-type]
