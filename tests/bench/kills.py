"""kill -9 at random moments, then `--resume`, until the run is done: are the weights those of a run that never stopped?

`python -m tests.bench.kills [--kills 20] [--out FILE]`. Every trial is one run of `RECIPE` with `SETTINGS` that is killed
up to `PER_TRIAL` times, once in each of `PHASES` in random order, at random steps that grow, and at a random place in the
phase: a share of the time that the phase took when nothing was killed. After each kill the same command is started again
with `--resume`, or anew where no whole checkpoint exists yet. At the end all weights must be equal bit for bit. `SEED`
decides every draw.

A process is killed by a timer thread of its own, which first writes down where it is: SIGKILL runs no handler, flushes
nothing and cannot be caught, whoever sends it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.bench.common import RESULTS, ROOT, machine, quiet, say, write_json
from trl_ext.checkpoints import last_whole

SEED = 0
PER_TRIAL = 4
STEPS = 12
PHASES = ("generation", "training", "checkpoint", "evaluation")
RECIPE = "sandbox_trace"
# Rollouts serve four optimizer steps, so that every other checkpoint lies inside a generation window; the teacher changes
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 4,
    "max_completion_length": 16,
    "methods.trace.sync_every": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_rows": 4,
    "per_device_eval_batch_size": 8,
}
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Kill:
    """In the first `phase` from optimizer step `step` on, `delay` seconds after it began."""

    phase: str
    step: int
    delay: float


def draw(seed: int, seconds: dict[str, float]) -> list[Kill]:
    """The kills of one trial from the `seconds` that each phase takes: all phases, growing steps, places in [0, 1)."""
    dice = random.Random(seed)
    phases = dice.sample(PHASES, PER_TRIAL)
    steps = sorted(dice.sample(range(STEPS), PER_TRIAL))
    return [Kill(phase, step, dice.random() * seconds[phase]) for phase, step in zip(phases, steps, strict=True)]


# The process that is killed


class _Timer:
    """Follows the phases of a trainer, notes their times, and kills at the place that `kill` names."""

    def __init__(self, kill: Kill | None, notes: Path) -> None:
        self.kill, self.notes, self.armed = kill, notes, False
        self.active: list[str] = []
        self.step = 0

    def entered(self, phase: str, trainer: Any) -> None:
        self.active.append(phase)
        self.step = trainer.state.global_step
        if self.kill and not self.armed and phase == self.kill.phase and self.step >= self.kill.step:
            self.armed = True
            threading.Thread(target=self._strike, daemon=True).start()

    def left(self, phase: str, seconds: float) -> None:
        self.active.remove(phase)
        self._note({"phase": phase, "seconds": seconds})

    def _strike(self) -> None:
        time.sleep(self.kill.delay if self.kill else 0.0)
        where = self.active[-1] if self.active else "between phases"
        self._note({"killed in": where, "step": self.step})
        os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, note: dict[str, Any]) -> None:
        with self.notes.open("a") as file:
            file.write(json.dumps(note) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _watched(timer: _Timer, phase: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def outer(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if phase == "generation" and not trainer.model.training:
            return inner(trainer, *args, **kwargs)  # part of the evaluation
        start = time.monotonic()
        timer.entered(phase, trainer)
        result = inner(trainer, *args, **kwargs)
        timer.left(phase, time.monotonic() - start)
        return result

    return outer


def worker(kill: Kill | None, notes: Path, words: Sequence[str]) -> int:
    """`trl-ext WORDS` in this process, with the timer around the trainer's methods."""
    from trl_ext.cli import main as command
    from trl_ext.grpo import GRPOTrainer

    timer = _Timer(kill, notes)
    methods = ("_generate", "training_step", "_save_checkpoint", "evaluate")
    for phase, name in zip(PHASES, methods, strict=True):
        setattr(GRPOTrainer, name, _watched(timer, phase, getattr(GRPOTrainer, name)))
    return command(list(words))


# The bench


def run(folder: Path, kill: Kill | None = None) -> tuple[int, list[dict[str, Any]]]:
    """One process on the run in `folder`, resumed where a whole checkpoint is: (exit code, what it noted)."""
    resume = ["--resume"] if folder.exists() and last_whole(folder) else []
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    notes = folder.with_suffix(".notes")
    notes.unlink(missing_ok=True)
    keys = [word for key, value in {**SETTINGS, "output_dir": folder}.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "tests.bench.kills", "--worker", json.dumps(asdict(kill) if kill else None)]
    done = subprocess.run(
        [*command, str(notes), "train", RECIPE, *resume, *keys],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, KILLED):
        raise RuntimeError(f"the run in {folder} failed:\n{done.stderr[-3000:]}")
    found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    return done.returncode, found


def phase_seconds(notes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median time of each phase."""
    return {phase: statistics.median(n["seconds"] for n in notes if n.get("phase") == phase) for phase in PHASES}


def trial(folder: Path, kills: Sequence[Kill]) -> list[dict[str, Any]]:
    """Kills the run in `folder` as told, one process after another, then lets it end; what happened at each kill."""
    happened = []
    for kill in kills:
        code, notes = run(folder, kill)
        last = notes[-1] if notes else {}
        left = last_whole(folder)
        happened.append(
            {**asdict(kill), "killed": code == KILLED, "in": last.get("killed in"), "at": last.get("step")}
            | {"checkpoint": Path(left).name if left else None}
        )
        if code == 0:  # the phase did not come any more
            return happened
    code, _ = run(folder)
    if code != 0:
        raise RuntimeError(f"the run in {folder} was killed by something else")
    return happened


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance between two sets of the same weights, NaN if one is NaN. ValueError: other names."""
    if one.keys() != other.keys():
        raise ValueError(f"other weights: {sorted(one.keys() ^ other.keys())}")
    return float(torch.stack([(one[name].double() - other[name].double()).abs().max() for name in one]).max())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names and the same numbers; NaN equals nothing."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def bench(kills: int, folder: Path, out: Path) -> dict[str, Any]:
    """Trials until `kills` processes were killed; each ends in weights that are compared with the whole run's.

    What was found so far is in `out` after each trial.
    """
    started = time.monotonic()
    _, notes = run(folder / "whole")
    seconds, whole = phase_seconds(notes), weights(folder / "whole")
    moved = max(float(value.abs().max()) for name, value in whole.items() if "lora_B" in name)  # 0 before training
    about = {"recipe": RECIPE, "settings": SETTINGS, "phase_seconds": seconds, "machine": machine(), "moved": moved}
    trials: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    while sum(k["killed"] for t in trials for k in t["kills"]) < kills:
        seed = SEED + len(trials)
        place = folder / f"trial_{seed}"
        happened = trial(place, draw(seed, seconds))
        found_weights = weights(place)
        verdict = {"equal": equal(found_weights, whole), "difference": difference(found_weights, whole)}
        trials.append({"seed": seed, "kills": happened, **verdict})
        say(f"trial {seed}: {[(k['in'], k['at']) for k in happened]}, difference {trials[-1]['difference']:g}")
        minutes = {"minutes": (time.monotonic() - started) / 60}
        found = {"about": about | minutes, "summary": summary(trials), "trials": trials}
        write_json(out, found)
    return found


def summary(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many kills, where they struck, and in how many trials the weights are equal."""
    struck = [kill["in"] for t in trials for kill in t["kills"] if kill["killed"]]
    return {
        "kills": len(struck),
        "in": {phase: struck.count(phase) for phase in sorted(set(struck))},
        "trials": len(trials),
        "equal": sum(t["equal"] for t in trials),
        "largest_difference": float(torch.tensor([t["difference"] for t in trials]).max()),
    }


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["--worker"]:
        kill = json.loads(words[1])
        return worker(Kill(**kill) if kill else None, Path(words[2]), words[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        found = bench(args.kills, Path(folder), args.out)
    say(json.dumps(found["summary"]))
    return 0 if found["summary"]["equal"] == found["summary"]["trials"] else 1


if __name__ == "__main__":
    quiet()
    sys.exit(main())
