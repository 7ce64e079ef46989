"""One training run of the learning bench: `python -m tests.bench.learning_run SETTINGS.json OUT.json`."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.common import quiet, say, write_json

quiet()

import torch  # noqa: E402 - after the environment is set
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback  # noqa: E402
from trl import get_peft_config  # noqa: E402

import trl_ext  # noqa: E402
from tests.bench.probe import Lift, SpanProbe  # noqa: E402
from tests.bench.steps import known  # noqa: E402
from trl_ext.methods import METHODS  # noqa: E402
from trl_ext.recipe import load_recipe  # noqa: E402
from trl_ext.sandbox import dataset, ensure_model, evaluate  # noqa: E402
from trl_ext.sandbox.tasks import rows as task_rows  # noqa: E402

RECIPE = "sandbox_grpo"
EVAL_SEED = 1_000_003
PROBE = {"annotator": "sandbox", "action": "both", "verifier": "answer_correct"}
LOGGED = (
    *("reward", "rewards/answer_correct/mean", "rewards/json_valid/mean", "frac_reward_zero_std"),
    *("entropy", "kl", "completions/mean_length", "grad_norm", "step_time", "tools/call_frequency"),
)


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run. `overrides` change the recipe; `model` is a folder (None: the sandbox's).

    `probe`: measure how far each step lifts annotated tokens, which costs three forwards a step and changes nothing.
    """

    arm: str
    methods: Mapping[str, Any]
    seed: int
    steps: int
    eval_every: int
    eval_rows: int
    model: str | None = None
    probe: bool = False
    overrides: Sequence[str] = field(default_factory=tuple)


class _Held(TrainerCallback):
    """Held-out accuracy and validity at step 0, every few steps and at the end."""

    def __init__(self, trainer: Any, tokenizer: Any, settings: RunSettings) -> None:
        self.trainer, self.tokenizer, self.settings = trainer, tokenizer, settings
        self.rows = task_rows(n=settings.eval_rows, seed=EVAL_SEED, split="test")
        self.found: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.settings.eval_every == 0 or state.global_step == self.settings.steps:
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        # The same seed each time: replies differ by the weights alone, and every run starts from the same numbers.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        records = evaluate(model, self.tokenizer, self.rows, seed=EVAL_SEED)
        n = len(records)
        self.found.append(
            {
                "step": step,
                "accuracy": sum(r.correct for r in records) / n,
                "valid": sum(r.valid for r in records) / n,
                "length": sum(r.length for r in records) / n,
            }
        )


def run(settings: RunSettings) -> dict[str, Any]:
    """Trains once with the sandbox's recipe and returns held-out results, the log by step, and the span lifts."""
    started, busy = time.perf_counter(), time.process_time()
    path = settings.model or ensure_model()
    methods = {**({SpanProbe.name: PROBE} if settings.probe else {}), **settings.methods}
    with tempfile.TemporaryDirectory() as folder, known(SpanProbe):
        recipe = load_recipe(
            RECIPE, [*settings.overrides, *_words(settings, folder), "--methods", json.dumps(methods)]
        )
        kind, options = str(recipe.script_args.dataset_name).split("/")[1], recipe.extra.dataset_options or {}
        if isinstance(difficulty := options.get("difficulty"), Mapping):  # a JSON mapping has text for keys
            options = {**options, "difficulty": {int(level): share for level, share in difficulty.items()}}
        data = dataset(kind, **{"n": 2000, **options, "seed": settings.seed})
        peft = get_peft_config(recipe.model_args)
        tools = list(recipe.tools) or None
        trainer: Any = trl_ext.GRPOTrainer(
            path, list(recipe.rewards), recipe.training_args, data, peft_config=peft, tools=tools
        )
        trainer.remove_callback(PrinterCallback)
        held, lifts = _Held(trainer, AutoTokenizer.from_pretrained(path), settings), Lift(trainer)
        trainer.add_callback(held)
        if settings.probe:
            trainer.add_callback(lifts)
        trainer.train()
    return {
        "settings": dataclasses.asdict(settings),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
        "held_out": held.found,
        "log": _by_step(trainer.state.log_history),
        "lift": [{name: round(value, 7) for name, value in step.items()} for step in lifts.steps],
    }


def _words(settings: RunSettings, folder: str) -> list[str]:
    changed = {
        "output_dir": folder,
        "max_steps": settings.steps,
        "seed": settings.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "report_to": "none",
    }
    return [word for key, value in changed.items() for word in (f"--{key}", str(value))]


def _by_step(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Log entries -> {name: one value per step}, None where a step did not log it.

    The methods' numbers, the rewards' means and `LOGGED`.
    """
    entries = [e for e in history if "loss" in e]
    names = {name for e in entries for name in e if name in LOGGED or name.split("/")[0] in METHODS or _is_mean(name)}
    return {name: [round(float(e[name]), 6) if name in e else None for e in entries] for name in sorted(names)}


def _is_mean(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def main() -> None:
    torch.set_num_threads(1)
    settings = RunSettings(**json.loads(Path(sys.argv[1]).read_text()))
    write_json(Path(sys.argv[2]), run(settings))
    say(f"{settings.arm}, seed {settings.seed}: done")


if __name__ == "__main__":
    main()
