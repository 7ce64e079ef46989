"""A Proposer for the sandbox: an adapter that was taught the form of a proposal, and how to work out its own answer.

The sandbox's model is too small to invent questions from a text by itself, so TRL's SFTTrainer shows it generated ones:
topic -> question, then the reply with its steps. It is the card's cold start, for the Proposer alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from trl_ext.loops.topics import topic
from trl_ext.sandbox import ensure_model
from trl_ext.sandbox.model import THREADS, tokenized
from trl_ext.sandbox.problems import render
from trl_ext.sandbox.tasks import problems, user

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lessons:
    """Everything that decides the Proposer's first weights, apart from the base model."""

    rows: int = 4800
    mix: tuple[tuple[int, float], ...] = ((1, 0.3), (2, 0.35), (3, 0.2), (4, 0.1), (5, 0.05))
    batch_size: int = 32
    learning_rate: float = 5e-3
    rank: int = 16
    alpha: int = 32
    seed: int = 0


def lessons(settings: Lessons) -> Iterator[tuple[str, str]]:
    """Endless pairs: a topic, and a question of the train split about it with its solution."""
    for problem in problems(random.Random(f"proposals/{settings.seed}"), "train", dict(settings.mix)):
        text = f"{problem.text}\n{render(problem.lines, problem.answer)}"
        yield topic(problem.name, problem.item), text


def _rows(tokenizer: Any, settings: Lessons) -> list[dict[str, str]]:
    """Rows `{prompt, completion}` of text rendered by the chat template."""
    rows = []
    for about, text in itertools.islice(lessons(settings), settings.rows):
        prompt = tokenizer.apply_chat_template(user(about), add_generation_prompt=True, tokenize=False)
        rows.append({"prompt": str(prompt), "completion": text + tokenizer.eos_token})
    return rows


def teach(base: str, folder: str, settings: Lessons | None = None) -> None:
    """Trains the adapter on the model in `base` and saves it in `folder`. Meant for a process of its own."""
    settings = settings or Lessons()
    torch.set_num_threads(THREADS)
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with tempfile.TemporaryDirectory() as work:
        args = SFTConfig(
            output_dir=work,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=10,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            completion_only_loss=True,
            seed=settings.seed,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            args,
            train_dataset=tokenized(tokenizer, _rows(tokenizer, settings)),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules="all-linear"
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(folder)


def ensure_proposer() -> str:
    """Folder of the adapter for the default sandbox model, taught on first use and cached beside that model."""
    return ensure_model(builder=_builder())


def _builder() -> Callable[[Path, int], None]:
    """What fills the cache entry. Its name goes into the entry's, and so do the settings and a sample of the lessons."""

    def build(folder: Path, seed: int) -> None:
        logger.warning("teaching the sandbox's Proposer, once: about a minute")
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        code = "import sys; from trl_ext.loops.sandbox import teach; teach(sys.argv[1], sys.argv[2])"
        command = [sys.executable, "-c", code, ensure_model(seed=seed), str(folder)]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"teaching the sandbox's Proposer failed:\n{result.stderr[-2000:]}")

    decides = [asdict(Lessons()), list(itertools.islice(lessons(Lessons()), 100))]
    build.__name__ = f"proposer-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]}"
    return build
