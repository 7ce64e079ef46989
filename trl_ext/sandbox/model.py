"""A Qwen3-architecture model of under a million parameters and its warm start."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_ext.sandbox.demos import CURRICULUM, Stage, demonstrations, vocabulary_texts
from trl_ext.sandbox.tokenizer import build_tokenizer

THREADS = 1  # fixed, so that a run's sums do not depend on the machine; more threads gain nothing at this size


@dataclass(frozen=True)
class WarmStart:
    """Everything that decides the warm-started weights, apart from the seed."""

    stages: tuple[Stage, ...] = CURRICULUM
    batch_size: int = 16
    learning_rate: float = 0.02
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 192


def sandbox_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the sandbox's world."""
    return build_tokenizer(vocabulary_texts())


def sandbox_config(tokenizer: PreTrainedTokenizerBase, settings: WarmStart) -> Qwen3Config:
    """A Qwen3 configuration for `tokenizer`, with tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def tokenized(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]) -> Dataset:
    """Prompt and completion as `SFTTrainer`'s tokenized form: `input_ids` and `completion_mask`, one list a row."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    pairs = list(zip(prompts, completions, strict=True))
    masks = [[0] * len(prompt) + [1] * len(completion) for prompt, completion in pairs]
    return Dataset.from_dict({"input_ids": [p + c for p, c in pairs], "completion_mask": masks})


def warm_start(seed: int = 0, settings: WarmStart | None = None) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """Train the sandbox model from nothing on sloppy demonstrations, on the CPU; returns model and tokenizer.

    Meant for a process of its own: the global generators are seeded and torch's threads fixed.
    """
    settings = settings or WarmStart()
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    tokenizer = sandbox_tokenizer()
    data = tokenized(tokenizer, demonstrations(tokenizer, seed, settings.stages))
    model = Qwen3ForCausalLM(sandbox_config(tokenizer, settings))
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            lr_scheduler_type="linear",
            warmup_steps=20,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            completion_only_loss=True,
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        # Muon needs half of AdamW's steps here. The scales of the norms stay at 1.
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        optimizer = torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.0)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval(), tokenizer


def save_warm_start(folder: str, seed: int) -> None:
    """`warm_start(seed)`, saved in `folder` as `from_pretrained` loads it."""
    model, tokenizer = warm_start(seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
