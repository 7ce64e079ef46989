"""The shape of a model without its weights: its config, and exact parameter counts on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
)
from trl import get_peft_config

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B-Instruct-2507": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B-Base": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}
"""Public `config.json` facts, used only when neither the Hub nor its cache answers."""

_QWEN25_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
PUBLISHED_QWEN25: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Math-1.5B": {
        "max_position_embeddings": 4096,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-3B-Instruct": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-3B": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B": _QWEN25_7B,
    "Qwen/Qwen2.5-Coder-7B-Instruct": _QWEN25_7B,
    "Qwen/Qwen2.5-Math-7B": _QWEN25_7B | {"max_position_embeddings": 4096},
    "Qwen/Qwen2.5-Math-7B-Instruct": _QWEN25_7B | {"max_position_embeddings": 4096},
    "Qwen/Qwen2.5-32B": {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""The same for Qwen2.5, from memory: their parameter counts agree with the model cards' (a test adds them up)."""

PUBLISHED_MISTRAL: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}
PUBLISHED_VLM: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 11008,
            "tie_word_embeddings": True,
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
}
"""The same for vision-language models."""

_NF4_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes: weights per absmax, absmax values per absmax of the absmax


@dataclass(frozen=True)
class Shape:
    """Sizes that the memory arithmetic needs. Bytes are of the weights as TRL would hold them on the device.

    `base_bytes` frozen and trained base weights; `trained` (numel, bytes per entry) of each trained tensor;
    `trained_rows_cols` their rows + columns (factored optimizers); `lora_inputs` input features summed over the
    `lora_matrices` adapted matrices of all layers; `head_trained`; `largest` entries of the largest 4-bit or 8-bit
    matrix; `width` bytes of one entry in the model's dtype. H `hidden`, I `inner` of the MLP, Q and K the features of
    queries and of keys over all their heads.
    """

    hidden: int
    inner: int
    layers: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    vocab: int
    base_bytes: int
    trained: tuple[tuple[int, int], ...]
    trained_rows_cols: int
    lora_inputs: int
    lora_matrices: int
    lora_rank: int
    lora_dropout: float
    adapter: bool
    head_trained: bool
    largest: int
    width: int

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights."""
        return sum(numel * width for numel, width in self.trained)


def model_config(name: str, revision: str | None = None) -> tuple[Any, str | None]:
    """(config, note): from a folder, the Hub or its cache; else from `PUBLISHED`, and then the note says so.

    Raises OSError, as transformers does, for a model that is not known here either.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision), None
    except OSError:
        if name not in (*PUBLISHED, *PUBLISHED_QWEN25, *PUBLISHED_MISTRAL, *PUBLISHED_VLM):
            raise
    note = f"{name} was not reachable: its geometry is from the table in trl_ext/geometry.py"
    if name in PUBLISHED_VLM:
        return Qwen2_5_VLConfig(**PUBLISHED_VLM[name]), note
    if name in PUBLISHED_MISTRAL:
        return MistralConfig(**PUBLISHED_MISTRAL[name]), note
    if name in PUBLISHED_QWEN25:
        return Qwen2Config(**PUBLISHED_QWEN25[name]), note
    return Qwen3Config(**_QWEN3, **PUBLISHED[name]), note


def shape_of(config: Any, model_args: Any) -> Shape:
    """Builds the model on the meta device, with PEFT's adapter when `use_peft`, and counts."""
    dtype = _dtype(config, model_args)
    text = config.get_text_config()
    with torch.device("meta"):
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_config(copy.deepcopy(config), dtype=dtype)
        quantized = _quantized(model, model_args)
        base_bytes = _base_bytes(model, quantized, model_args)
        peft_config: Any = get_peft_config(model_args)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    lora: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        queries=text.num_attention_heads * head_dim,
        keys=key_heads * head_dim,
        heads=text.num_attention_heads,
        key_heads=key_heads,
        vocab=text.vocab_size,
        base_bytes=base_bytes,
        trained=tuple((p.numel(), _trained_width(name, p, bool(quantized))) for name, p in named),
        trained_rows_cols=sum(sum(p.shape) for _, p in named),
        lora_inputs=sum(m.in_features for m in lora),
        lora_matrices=len(lora),
        lora_rank=model_args.lora_r if lora else 0,
        lora_dropout=model_args.lora_dropout if lora else 0.0,
        adapter=peft_config is not None,
        head_trained=model.get_output_embeddings().weight.requires_grad,
        largest=max((m.weight.numel() for m in quantized), default=0),
        width=dtype.itemsize,
    )


def _dtype(config: Any, model_args: Any) -> torch.dtype:
    name = model_args.dtype
    if name in (None, "auto"):
        return getattr(config, "dtype", None) or torch.float32
    return getattr(torch, name)


def _quantized(model: Any, model_args: Any) -> list[nn.Linear]:
    """The matrices that bitsandbytes packs: all but the head."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return []
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _base_bytes(model: nn.Module, quantized: list[nn.Linear], model_args: Any) -> int:
    packed = {id(m.weight) for m in quantized}
    plain = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in packed)
    if model_args.load_in_8bit:  # int8 and one float32 scale for each output row
        return plain + sum(m.weight.numel() + 4 * m.out_features for m in quantized)
    return plain + sum(packed_bytes(m.weight.numel(), model_args.use_bnb_nested_quant) for m in quantized)


def packed_bytes(numel: int, nested: bool) -> int:
    """Bytes of a 4-bit matrix: half a byte per entry and one absmax per 64 entries.

    An absmax is a float32; with nested (double) quantisation it is one byte and a float32 per 256 of them.
    """
    blocks = -(-numel // _NF4_BLOCK)
    return -(-numel // 2) + (blocks + 4 * -(-blocks // _NESTED_BLOCK) if nested else 4 * blocks)


def _trained_width(name: str, p: torch.Tensor, quantized: bool) -> int:
    """TRL casts adapters on a quantised base to bfloat16, DoRA's magnitudes excepted; else PEFT's dtype stays."""
    return 2 if quantized and "lora_magnitude_vector" not in name else p.element_size()
