"""The one policy in memory of a loop in rounds: loaded from a folder when it is asked for, dropped before training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

from trl_ext.loops.iterative_settings import Iterative
from trl_ext.loops.sampling import Drawing, Sampler, TransformersSampler, VllmSampler, token_log_probs, vllm_client


def hub_base(recipe: Any) -> str | None:
    """The recipe's model as a folder where its name does not say it all: a certain revision on the Hub. Else None."""
    name, revision = str(recipe.model_args.model_name_or_path), recipe.model_args.model_revision
    if revision in (None, "main") or Path(name).exists():
        return None
    return snapshot_download(name, revision=revision)


class Policies:
    """`model` is that of the weights (a folder or a name) that were used last, in evaluation mode on the run's device.

    `args` is the trainer's configuration, whose `model_init_kwargs` say how to load.
    """

    def __init__(self, args: Any, loop: Iterative, tokenizer: Any) -> None:
        self.args, self.loop, self.tokenizer = args, loop, tokenizer
        self.accelerator = Accelerator()
        self.model: Any = None
        self._weights = ""
        self._client: Any = None

    def use(self, weights: str) -> Any:
        """The model with these weights."""
        if self._weights != weights:
            self.drop()
            model: Any = AutoModelForCausalLM.from_pretrained(weights, **self.args.model_init_kwargs)
            self.model, self._weights = model.to(self.args.device).eval(), weights
        return self.model

    def weights(self, weights: str) -> dict[str, Any]:
        """Copies on the CPU; tied tensors stay tied."""
        return copy.deepcopy(self.use(weights).to("cpu")).state_dict()

    def drop(self) -> None:
        """Room for another model."""
        self.model, self._weights = None, ""
        self.accelerator.free_memory()

    def change(self, state: dict[str, Any]) -> None:
        """Puts other weights into the model in memory, which is then that of no folder."""
        self.model.load_state_dict(state)
        self._weights = ""

    def write(self, folder: str) -> None:
        """The model in memory with its tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def sample(self, weights: str, rows: Any, n: int, seed: str) -> Any:
        """n replies of these weights to each row's prompt, as the loop's settings say; `Sampler.sample`."""
        own = self.loop
        drawing = Drawing(own.temperature, own.top_p, own.max_completion_length, own.generation_batch_size)
        return self._sampler(weights).sample(rows, n, drawing, seed)

    def log_probs(self, weights: str, rows: Any, lines: Any) -> list[float]:
        """log p of every token of the sampled replies to the rows, one after the other, at the loop's temperature."""
        model, found = self.use(weights), []
        for row, line in zip(rows, lines, strict=True):
            for reply in line["replies"]:
                found += token_log_probs(model, self.tokenizer, row, reply["tokens"], self.loop.temperature)
        return found

    def _sampler(self, weights: str) -> Sampler:
        model = self.use(weights)
        if self.loop.vllm_server_base_url is None:
            return TransformersSampler(model, self.tokenizer)
        if self._client is None:
            self._client = vllm_client(self.loop.vllm_server_base_url, self.args.device)
        return VllmSampler(model, self.tokenizer, self._client)
