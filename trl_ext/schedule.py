"""TRL's batch arithmetic in words: how many prompts, completions, micro-batches and optimizer steps a run has.

B = per_device_train_batch_size, W = processes, S = steps_per_generation, A = gradient_accumulation_steps, G =
num_generations, I = num_iterations. One rollout: B W S completions of B W S / G prompts, trained on S I micro-batches,
that is S I / A optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """The sizes of a run. `rows` is None when the data set was not loaded or streams; `steps` when rows decide it."""

    micro_batch: int
    processes: int
    accumulation: int
    rows: int | None
    steps: int | None
    epochs: float | None
    group: int = 1
    micro_batches: int = 1
    iterations: int = 1
    unit: str = "prompts"

    @property
    def pairs(self) -> bool:
        """Whether nothing is sampled: the rows are pairs, or labelled or demonstrated replies."""
        return self.unit != "prompts"

    @property
    def completions(self) -> int:
        """Completions (or pairs) of one rollout, over all processes."""
        return self.micro_batch * self.processes * self.micro_batches

    @property
    def prompts(self) -> int:
        """Different prompts of one rollout."""
        return self.completions // self.group

    @property
    def steps_per_rollout(self) -> float:
        """Optimizer steps that are made with the completions of one rollout."""
        return self.micro_batches * self.iterations / self.accumulation

    def words(self) -> str:
        """The whole schedule as one or two sentences."""
        return f"{self._pairs() if self.pairs else self._rollout()}; {self._total()}"

    def _pairs(self) -> str:
        devices = f" x {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.micro_batch} {self.unit}{devices} x {self.accumulation} accumulation steps = "
            f"{self.prompts} {self.unit} per optimizer step"
        )

    def _rollout(self) -> str:
        text = (
            f"{_many(self.prompts, 'prompt')} x {self.group} completions = {self.completions} completions per rollout"
        )
        if self.micro_batches > 1 or self.processes > 1:
            devices = f" on each of {self.processes} processes" if self.processes > 1 else ""
            text += f", split over {_many(self.micro_batches, 'micro-batch')} of {self.micro_batch}{devices}"
        if self.iterations > 1:
            text += f", used {self.iterations} times"
        steps = self.steps_per_rollout
        if steps == int(steps):
            return f"{text}; {_many(int(steps), 'optimizer step')} per rollout"
        rollouts = 1 / steps
        if rollouts == int(rollouts):
            return (
                f"{text}; one optimizer step per {int(rollouts)} rollouts, so {int(rollouts) * self.completions} completions"
                f" of {int(rollouts) * self.prompts} prompts per step"
            )
        return f"{text}; {self.accumulation} micro-batches per optimizer step, {steps:g} steps per rollout"

    def _total(self) -> str:
        if self.steps is None:
            return f"{self.epochs:g} epochs; the number of steps depends on the size of the data set"
        seen = round(self.steps / self.steps_per_rollout * self.prompts)
        epochs = f" ({seen / self.rows:.1f} epochs of {self.rows} rows)" if self.rows else ""
        return f"{_many(self.steps, 'step')} see {seen} {self.unit}{epochs}"


def _many(count: int, thing: str) -> str:
    plural = thing + ("es" if thing.endswith("ch") else "s")
    return f"{'one' if count == 1 else count} {thing if count == 1 else plural}"


def schedule_of(args: Any, rows: int | None = None) -> Schedule:
    """The schedule of a trainer's configuration; `rows` in the training set if known.

    Raises ValueError when the rows do not fill one rollout, with the sizes that would.
    """
    sizes: dict[str, Any] = {}
    if not hasattr(args, "num_generations"):
        sizes |= {"micro_batches": args.gradient_accumulation_steps, "unit": _unit(args)}
    else:
        sizes |= {
            "group": args.num_generations,
            "micro_batches": args.steps_per_generation,
            "iterations": args.num_iterations,
        }
    partial = Schedule(
        micro_batch=args.per_device_train_batch_size,
        processes=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        rows=rows,
        steps=args.max_steps if args.max_steps > 0 else None,
        epochs=args.num_train_epochs,
        **sizes,
    )
    if rows is not None and rows < partial.prompts and not partial.pairs:
        raise ValueError(
            f"the data set has {rows} rows, one rollout takes {partial.prompts} different prompts ({partial.words()}); "
            f"use more rows, or a per_device_train_batch_size x steps_per_generation of at most {rows * partial.group}"
        )
    if partial.steps is None and rows is not None:
        return Schedule(**(vars(partial) | {"steps": _steps(partial, rows)}))
    return partial


def _unit(args: Any) -> str:
    """What a row is to a trainer that samples nothing."""
    single = hasattr(args, "desirable_weight") or hasattr(args, "completion_only_loss")  # KTO, SFT
    return "replies" if single else "pairs"


def _steps(schedule: Schedule, rows: int) -> int:
    """Optimizer steps of `epochs` passes, counted as transformers counts them (a started step is a step)."""
    if schedule.pairs:
        batches = math.ceil(rows / (schedule.micro_batch * schedule.processes))
    else:
        batches = rows // schedule.prompts * schedule.micro_batches * schedule.iterations
    per_epoch = max(math.ceil(batches / schedule.accumulation), 1)
    return math.ceil((schedule.epochs or 0) * per_epoch)


def group_misfit(values: Mapping[str, Any], processes: int) -> str | None:
    """Why these GRPO settings do not hold whole groups, with the nearest settings that do; None when they fit.

    `values` holds B, A, S, G and `generation_batch_size` under TRL's names, as typed values; None means TRL's default.
    """
    size, group = values["per_device_train_batch_size"], values["num_generations"]
    micro = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    if (total := values["generation_batch_size"]) is not None:
        if total % (size * processes) != 0:
            near = _multiples(total, size * processes)
            return (
                f"generation_batch_size {total} is not a multiple of per_device_train_batch_size {size} x "
                f"{_many(processes, 'process')} = {size * processes}; nearest that fit: {near}"
            )
        micro = total // (size * processes)
    if group < 2:
        return f"num_generations {group}: an advantage compares completions of one prompt, so it takes at least 2"
    if size * processes * micro % group == 0:
        return None
    sizes = [b for b in range(1, 2 * size + group + 1) if b * processes * micro % group == 0]
    groups = [g for g in range(2, 2 * group + 1) if size * processes * micro % g == 0]
    fits = [f"{_nearest(sizes, size)} for per_device_train_batch_size"]
    fits += [f"{_nearest(groups, group)} for num_generations"] if groups else []
    return (
        f"per_device_train_batch_size {size} x {_many(processes, 'process')} x steps_per_generation {micro} = "
        f"{size * processes * micro} completions per rollout, which is not a multiple of num_generations {group}, so "
        f"a group would be torn apart; nearest that fit: {', or '.join(fits)}"
    )


def _nearest(values: list[int], wanted: int) -> str:
    """The largest below and the smallest above `wanted`, as words."""
    below = [v for v in values if v < wanted][-1:]
    above = [v for v in values if v > wanted][:1]
    return " or ".join(map(str, below + above))


def _multiples(value: int, unit: int) -> str:
    return " or ".join(str(m) for m in (value // unit * unit, (value // unit + 1) * unit) if m > 0)
