"""Does what was saved equal what was trained? The folder is loaded again and must give the same log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from trl_ext.quantized import keep_trainable

TOLERANCE = 1e-3
"""Largest difference of a log-probability, in nats: same weights, same device, same kernels."""
PROBE_TOKENS = 48


class SavedModelError(RuntimeError):
    """The saved adapter or model gives other log-probabilities than the trained one."""


def probe_ids(tokenizer: Any, prompt: Any) -> Tensor:
    """(1, at most `PROBE_TOKENS`) token ids of a prompt of the training data."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    return torch.tensor([ids[:PROBE_TOKENS]])


def log_probs(model: Any, ids: Tensor) -> Tensor:
    """(1, L) ids -> (L - 1,) float32: log-probability of each next token, on the CPU."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device)).logits.float()
    model.train(training)
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None].to(logits.device)).squeeze(1).cpu()


def reload(folder: str, base: str, device: torch.device, **init: Any) -> Any:
    """The saved model: `base` with the adapter in `folder`, or the weights in `folder` if it holds no adapter."""
    if not (Path(folder) / "adapter_config.json").exists():
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, **init)
        return whole.to(device)
    model: Any = AutoModelForCausalLM.from_pretrained(base, **init)
    model = keep_trainable(model) if getattr(model, "is_quantized", False) else model.to(device)
    return with_adapter(model, folder)


def with_adapter(model: Any, folder: str) -> Any:
    """`model` with the adapter in `folder`, in the precision of the file: PEFT widens it, which gives other numbers."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, folder)
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if (stored := weights.get(name.replace(".default.", "."))) is not None:
            parameter.data = parameter.data.to(stored.dtype)
    return model


def check_equal(expected: Tensor, found: Tensor, folder: str) -> float:
    """The largest difference; SavedModelError when it is above `TOLERANCE` or not a number."""
    difference = float((expected - found).abs().max())
    if not difference <= TOLERANCE:
        raise SavedModelError(
            f"the model loaded from {folder} differs from the trained one by {difference:.3g} nats on a training "
            f"prompt (allowed: {TOLERANCE}). The checkpoints in that folder hold the trained weights as well."
        )
    return difference
