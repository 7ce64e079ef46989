"""A sandbox model that leaves keys out, for RL-Struct's ablations: the learning bench's `--model forgetful`.

The warm-started model writes both keys in nearly every reply, so a term that asks for them has nothing to teach. Here it is
taught on, by demonstrations of which a third has both keys, a third the answer alone and a third the steps alone, and most
of which are malformed.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from tests.bench.common import quiet

quiet()

import torch  # noqa: E402 - after the environment is set
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, PrinterCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from trl_ext.sandbox import ensure_model  # noqa: E402
from trl_ext.sandbox.problems import Problem, render  # noqa: E402
from trl_ext.sandbox.slips import malform  # noqa: E402
from trl_ext.sandbox.tasks import assistant, problems, user  # noqa: E402

ROWS, BATCH, LEARNING_RATE, MALFORMED = 9600, 32, 1e-3, 0.65


def reply(problem: Problem, rng: random.Random) -> str:
    """Both keys, the answer alone or the steps alone, each in a third of the draws; then perhaps a fault."""
    whole = render(problem.lines, problem.answer)
    steps, answer = whole.removesuffix("}").split(',\n"answer": ')
    text = rng.choice((whole, f'{{"answer": {answer}}}', f"{steps}}}"))
    return malform(text, rng) if rng.random() < MALFORMED else text


def demonstrations(n: int, seed: int) -> Dataset:
    """`n` problems of the train split with such replies."""
    rng, stream = random.Random(f"forgetful/{seed}"), problems(random.Random(f"forgetful problems/{seed}"), "train")
    drawn = [next(stream) for _ in range(n)]
    return Dataset.from_list([{"prompt": user(p.text), "completion": assistant(reply(p, rng))} for p in drawn])


def ensure_forgetful(out: Path, rows: int = ROWS, seed: int = 0) -> str:
    """The folder of the model, with its tokenizer; taught and written to `out` unless it is there."""
    if out.exists():
        return str(out)
    torch.set_num_threads(1)
    model = ensure_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            num_train_epochs=1,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model, args, train_dataset=demonstrations(rows, seed), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(Path(folder) / "model"))
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(folder) / "model", out)
    return str(out)
