"""A random two-layer Qwen3 with a byte tokenizer, and small data sets: enough for exact comparisons, built in a moment."""

from __future__ import annotations

import functools
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_ext.annotate import Span

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def tiny_path(**config: float) -> str:
    """Folder of a saved model and tokenizer, as a Hub snapshot lays them out."""
    folder = tempfile.mkdtemp(prefix="tiny-")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the chat markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompts(n: int = 16) -> Dataset:
    """Conversational prompts with an `answer` column."""
    rows = [[{"role": "user", "content": f"{i} + {i * 7 % 5} ="}] for i in range(n)]
    return Dataset.from_dict({"prompt": rows, "answer": [str(i + i * 7 % 5) for i in range(n)]})


def letters_reward(completions: list, **kwargs: object) -> list[float]:
    """Share of letters: smooth enough that groups have variance under a random model."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ch.isalpha() for ch in text) / max(len(text), 1) for text in texts]


def annotate_first(requests: list) -> list:
    """Marks the first segment of every completion."""
    return [[Span((0,), "insight" if r.correct else "arithmetic_slip")] for r in requests]


QUIET = {
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def grpo_args(output_dir: str, **kwargs: object) -> dict:
    """Keyword arguments for TRL's or our GRPOConfig: 8 rows of 2 groups, 3 steps, CPU, quiet."""
    rollout = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}
    return QUIET | {"output_dir": output_dir, "learning_rate": 1e-2} | rollout | kwargs


def dpo_args(output_dir: str, **kwargs: object) -> dict:
    """Keyword arguments for TRL's or our DPOConfig: 3 steps of 4 pairs, CPU, quiet."""
    pairing = {"per_device_train_batch_size": 4, "max_length": 16, "beta": 0.2}
    return QUIET | {"output_dir": output_dir, "learning_rate": 3e-3} | pairing | kwargs


def pairs(n: int = 12) -> Dataset:
    """Prompts with a chosen and a rejected text, of different lengths; some are longer than `max_length`."""
    return Dataset.from_dict(
        {
            "prompt": [f"{i} + {i * 7 % 5} = " for i in range(n)],
            "chosen": ["yes" * (1 + i % 3) for i in range(n)],
            "rejected": ["no" * (1 + i % 4) for i in range(n)],
        }
    )


def labelled(n: int = 12) -> Dataset:
    """The chosen or the rejected text of `pairs`, with a label: two thumbs up for each thumbs down."""
    both, good = pairs(n), [i % 3 != 0 for i in range(n)]
    replies = [both["chosen" if up else "rejected"][i] for i, up in enumerate(good)]
    return Dataset.from_dict({"prompt": both["prompt"][:], "completion": replies, "label": good})


def weights(trainer: object) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit, all of them."""
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"{len(differing)} of {len(first)} tensors differ, e.g. {differing[0]}"


def annotate_nothing(requests: list) -> list:
    """Is never sure."""
    return [[] for _ in requests]
