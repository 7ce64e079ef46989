"""RODS: new tasks at the edge of what the model solves are made while it trains, and leave once they are no use.

Paper: "RODS: Reward-Driven Online Data Synthesis for Multi-Turn Tool-Use Agents", arXiv 2606.19047. Card: rods. For
task i with K rollouts and progress rewards R_P in [0, 1]:

    rbar_i = (1/K) sum_k R_P,k        phi(rbar) = 4 rbar (1 - rbar)        Var(R_P) <= rbar (1 - rbar)
    hard: rbar < a_lo        boundary: a_lo <= rbar <= a_hi        mastered: rbar > a_hi

An epoch is one pass over the active pool: floor(size / prompts per rollout) rollouts. Between two epochs, in this order:

    1. seeds      boundary rows of this epoch, highest phi first, within a budget, a quota by category and a cool-down
    2. synthesis  variants of them; what passes the rules and the filters joins the end of the queue
    3. retire     generated rows with rbar > a_retire or rbar < a_lo; a row without an observation stays on trial
    4. inject     at most floor(fraction x pool size after 3) rows of the queue, oldest first; beyond P_max generated
                  rows the observed ones with the lowest phi leave

A row that is made in epoch e is drawn from epoch e + 1 on. Rollouts, advantages and loss are TRL's. The statistics read
the reward as its function gives it, before other methods shape it; a completion without a score counts as 0. Where
another method replaces completions by ones that had help, the replaced ones count.

Synthesis runs on the main process; every attempt, accepted or not, is a line of `rods/rows.jsonl` in the run's folder,
with its parent, generator, seed, step and verdict, and the pool itself is in every checkpoint. An endpoint that fails
for good ends the run with a checkpoint; `--resume` asks again for what is missing alone. The end of an epoch makes no
checkpoint: a run that is killed before the next one makes the same rows again, an endpoint's from the replies in
`rods/replies`, a function's from the same random numbers. A checkpoint belongs to its data set. Seeds of another kind
than problems with an answer (tools, environments) need a `module.function`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext.checks import reward_named, unread
from trl_ext.method import Chosen, Draw, Group, Method, Setup, param
from trl_ext.rewards.registry import imported
from trl_ext.rollouts import pool as pools
from trl_ext.rollouts import synthesis
from trl_ext.rollouts.pool import Bounds, Pool, priority
from trl_ext.rollouts.synthesis import Ask, Made, Make, SeedStats
from trl_ext.rollouts.synthesis_endpoint import endpoint_synthesiser
from trl_ext.rollouts.vetting import KnownTexts, Vetting, evaluation_parts, load_evaluation

BAND = (0.25, 0.75)
"""Where new rows land, in the paper."""
FOLDER, ROWS, REPLIES = "rods", "rows.jsonl", "replies"


def group_variance(rewards: Tensor) -> Tensor:
    """(P, G) -> (P,): population variance of each group."""
    return rewards.var(1, correction=0)


@dataclass(frozen=True)
class Rods(Method):
    """A live pool of prompts. capacity 0 or fraction 0 (the paper's "no dynamic refresh") is TRL bit for bit."""

    name = "rods"
    title = "RODS: Reward-Driven Online Data Synthesis for Multi-Turn Tool-Use Agents"
    paper = "2606.19047"
    headline = ("pool", "zero_variance", "share_boundary", "new_rbar")
    owns = ("sampler",)
    conflicts: ClassVar = {}

    reward: str | None = param(
        None,
        "the progress reward, in [0, 1]: a reward function of this run; needed if there are several",
        source="card: paper, R_P; a 0/1 reward works with weaker detection",
    )
    low: float = param(0.2, "a_lo, below it a row is hard", source="card: paper", ge=0, le=1)
    high: float = param(0.85, "a_hi, above it a row is mastered", source="card: paper", ge=0, le=1)
    retire: float = param(0.95, "a_retire, above it a generated row leaves", source="card: paper", ge=0, le=1)
    capacity: int = param(400, "P_max, generated rows in the pool; 0 is plain GRPO", source="card: paper", ge=0)
    fraction: float = param(
        0.2, "inject_frac, rows that enter per epoch, of the pool's size; 0 is plain GRPO", source="card: paper", ge=0
    )
    repairs: int = param(3, "K_max, new attempts after one that was refused", source="card: paper", ge=0)
    synthesizer: str | dict = param(
        "sandbox",
        "sandbox (arithmetic problems by rules), module.function with synthesize(seed_row, stats, n, rng) -> rows, or the "
        "fields of an OpenAI-compatible endpoint {base_url: ..., model: ..., answer: ...}",
        source="card: paper uses Qwen3-32B behind an endpoint; the default is our decision, it needs no other machine",
    )
    budget: int = param(16, "seeds per epoch", source="card: open (c), decision", ge=1)
    variants: int = param(1, "new rows per seed", source="card: open (c), decision", ge=1)
    category: str | None = param(
        None, "column that the quota counts by", source="card: inferred, BFCL has four categories"
    )
    quota: int | None = param(
        None,
        "seeds per category and epoch; none: the budget alone",
        source="card: open (c), decision; not published",
        ge=1,
    )
    cooldown: int = param(1, "epochs that a seed rests after its use", source="card: open (c), decision", ge=0)
    stale: int | None = param(
        None,
        "epochs after which a generated row leaves anyway",
        source="card: open (c), decision: no such rule",
        ge=1,
    )
    total: int | None = param(
        None, "attempts to make a row in the whole run; none: no limit", source="card: decision, a budget", ge=0
    )
    seeds: str = param(
        "boundary",
        "boundary, or random: seeds of synthesis from all observed rows (control)",
        source="card: paper; random is its ablation",
        choices=("boundary", "random"),
    )
    leave: str = param(
        "generated",
        "what may retire: generated, none (control), or all: seeds too",
        source="card: paper's ablation has none; protecting seeds is the reproduction effort's inferred rule",
        choices=("generated", "none", "all"),
    )
    ngram: int = param(3, "words of an n-gram in the search for near duplicates", source="card: decision, ours", ge=1)
    similar: float = param(
        0.8, "Jaccard index from which a text is a near duplicate", source="card: decision, ours", gt=0, le=1
    )
    max_chars: int = param(8000, "longest prompt of a new row", source="card: decision, ours", ge=1)
    evaluation: list = param(
        ["offline"],
        "evaluations whose words no new row may hold: tasks or groups of `trl-ext eval`, or files of one text per line",
        source="card: decision, ours; `offline` are all that need no download",
    )

    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The evaluations' texts, read once."""

    # What it declares

    @property
    def bounds(self) -> Bounds:
        """The three thresholds."""
        return Bounds(self.low, self.high, self.retire)

    @property
    def _still(self) -> bool:
        """Whether nothing can ever enter the pool."""
        return self.capacity == 0 or self.fraction == 0

    def cost(self) -> str:
        if self._still:
            return "no extra forward, and no row is made"
        where = "by rules" if self.synthesizer == "sandbox" else "by your synthesiser, for which training waits"
        return f"no extra forward or rollout; up to {self.budget * self.variants} rows are made per epoch {where}"

    def check(self, setup: Setup) -> list[str]:
        problems = reward_named(setup, self.reward, "reward", "measures progress")
        if not self.low <= self.high <= self.retire:
            problems.append(f"low {self.low}, high {self.high} and retire {self.retire} must not fall; swap them")
        problems += unread(self, {"leave: generated or all": (self.leave != "none", ("retire", "stale"))})
        if self._still:
            return problems
        if not getattr(setup.args, "shuffle_dataset", True):
            problems.append(
                "it draws the prompts, so their order is not kept; leave shuffle_dataset on, or capacity: 0"
            )
        for setting, make in (
            ("synthesizer", functools.partial(self._synthesiser, 0, None)),
            ("evaluation", functools.partial(evaluation_parts, self.evaluation)),
        ):
            try:
                make()
            except (ValueError, TypeError) as error:
                problems.append(f"{setting}: {error}")
        return problems

    def _synthesiser(self, seed: int, folder: str | None) -> Make:
        """ValueError for settings that no synthesiser takes."""
        if isinstance(self.synthesizer, dict):
            return endpoint_synthesiser(self.synthesizer, folder)
        if self.synthesizer == "sandbox":
            return synthesis.from_function(synthesis.sandbox, seed)
        if "." not in self.synthesizer:
            raise ValueError(f"'{self.synthesizer}' is not sandbox, module.function or a mapping of endpoint fields")
        return synthesis.from_function(imported(self.synthesizer), seed)

    # Prompts. state: "pool" (`pools.Pool`), "size" of the training set, "rollout" prompts of one;
    # "attempts" to make a row so far, "refused" of them

    def choose_prompts(self, draw: Draw) -> Chosen | None:
        if self._still:
            return None
        pool = self._pool(draw)
        if pools.epoch_over(pool, draw.count):
            self._turn(pool, draw)
        ids = pools.draw(pool, draw.count)
        self._show(pool, draw)
        return Chosen([self._row(pool, draw, i) for i in ids], torch.tensor(ids))

    def _pool(self, draw: Draw) -> Pool:
        if "pool" not in self.state:
            draw.on_main(functools.partial(self._check_outside, draw))
            names = [self._category(draw.row(i)) for i in range(draw.size)] if self.category else []
            names = names or [pools.EVERYTHING] * draw.size
            self.state.update(pool=pools.new_pool(names, draw.seed), size=draw.size, attempts=0, refused=0)
            self.state["rollout"] = draw.count
        if self.state["size"] != draw.size:
            raise ValueError(
                f"rods: the checkpoint's pool began with {self.state['size']} rows, the training set has {draw.size}: resume "
                "with the same training set, or start a new run from the checkpoint's weights (model_name_or_path)"
            )
        if draw.count > draw.size:
            raise ValueError(
                f"rods: a rollout takes {draw.count} different prompts and the training set has {draw.size}; lower "
                "per_device_train_batch_size or steps_per_generation, or raise num_generations"
            )
        return self.state["pool"]

    def _check_outside(self, draw: Draw) -> None:
        """What the end of the first epoch will need: better missed now than then."""
        if isinstance(self.synthesizer, dict):
            endpoint_synthesiser(self.synthesizer).check(draw.row(0))
        self._kept["evaluation"] = load_evaluation(self.evaluation)

    def _category(self, row: dict[str, Any]) -> str:
        if self.category not in row:
            raise ValueError(f"rods: category '{self.category}' is no column; the training set has {', '.join(row)}")
        return str(row[self.category])

    def _row(self, pool: Pool, draw: Draw, number: int) -> dict[str, Any]:
        own = pool["entries"][number]["row"]
        return draw.row(number) if own is None else dict(own)

    def _turn(self, pool: Pool, draw: Draw) -> None:
        """Between two epochs. Synthesis comes first, since it alone can fail: until then nothing has changed."""
        asks = self._asks(pool, draw)
        made: Made = draw.on_main(functools.partial(self._make, pool, draw, asks))
        for number in {ask.parent for ask in asks}:
            pool["entries"][number]["asked"] = pool["epoch"]
        pool["queue"] += made["accepted"]
        self.state["attempts"] += made["attempts"]
        self.state["refused"] += made["refused"]
        seeds_too = self.leave == "all"
        gone = (
            []
            if self.leave == "none"
            else pools.retire(pool, self.bounds, self.stale, seeds_too, self.state["rollout"])
        )
        entered, put_out = pools.inject(pool, self.fraction, self.capacity)
        pools.next_epoch(pool, draw.seed)
        counts = {"injected": entered, "retired": gone, "put_out": put_out}
        for name, rows in counts.items():
            draw.metrics.mean(name, len(rows))
        draw.metrics.mean("synthesised", len(made["accepted"]))
        draw.metrics.mean("rejected", made["refused"])

    def _asks(self, pool: Pool, draw: Draw) -> list[Ask]:
        """What to ask the synthesiser for, with numbers that go on from the last attempt's."""
        first, epoch = self.state["attempts"], pool["epoch"]
        rng = random.Random(f"rods/{draw.seed}/seeds/{epoch}") if self.seeds == "random" else None
        seeds = pools.seeds_for_synthesis(pool, self.bounds, self.budget, self.quota, self.cooldown, rng)
        wanted = [number for number in seeds for _ in range(self.variants)]
        if self.total is not None:
            wanted = wanted[: max(0, self.total - first)]
        asks = []
        for i, number in enumerate(wanted):
            entry = pool["entries"][number]
            rbar = entry["rbar"] or 0.0
            stats = SeedStats(rbar=rbar, priority=priority(rbar), category=entry["category"], epoch=epoch)
            asks.append(Ask(first + i, number, self._row(pool, draw, number), stats))
        return asks

    def _make(self, pool: Pool, draw: Draw, asks: list[Ask]) -> Made:
        """On the main process: synthesis, with every attempt on disk."""
        folder = Path(draw.folder) / FOLDER
        if not asks:
            return Made(accepted=[], attempts=0, refused=0)
        about = {"generator": self._generator, "seed": draw.seed, "step": draw.step, "epoch": pool["epoch"]}

        def note(records: list[dict[str, Any]]) -> None:
            synthesis.append_records(folder / ROWS, [{**record, **about} for record in records])

        limit = None if self.total is None else self.total - self.state["attempts"]
        make = self._synthesiser(draw.seed, str(folder / REPLIES))
        return synthesis.synthesise(asks, make, self._vetting(pool, draw), self.repairs, note, limit)

    @property
    def _generator(self) -> str:
        return "endpoint" if isinstance(self.synthesizer, dict) else self.synthesizer

    def _vetting(self, pool: Pool, draw: Draw) -> Vetting:
        """Knows the texts of the training set, of the pool and of the queue."""
        rows = [draw.row(i) for i in range(draw.size)]
        rows += [entry["row"] for entry in pool["entries"].values() if entry["row"] is not None]
        rows += [candidate["row"] for candidate in pool["queue"]]
        if "evaluation" not in self._kept:
            self._kept["evaluation"] = load_evaluation(self.evaluation)
        known = KnownTexts(synthesis.seed_texts(rows), self.ngram)
        return Vetting(known, self._kept["evaluation"], self.similar, self.max_chars)

    def _show(self, pool: Pool, draw: Draw) -> None:
        show, made = draw.metrics.mean, pools.generated(pool)
        for name, value in (("pool", len(pool["entries"])), ("generated", made), ("queue", len(pool["queue"]))):
            show(name, value)
        show("seeds", len(pool["entries"]) - made)
        show("epoch", pool["epoch"])
        for name, share in pools.shares(pool, self.bounds).items():
            show(f"share_{name}", share)

    # Statistics

    def _progress(self, group: Group) -> Tensor:
        """(P, G): R_P as its function gave it, of completions without help."""
        column = 0 if self.reward is None else list(group.reward_names).index(self.reward)
        return group.outcomes[..., column].nan_to_num().float()

    def observe(self, group: Group) -> None:
        """rbar of the rows of this rollout, and of groups that another method made and did not take."""
        progress = self._progress(group)
        if not self._still:
            self._check_range(progress, group)
        rbar = progress.mean(1)
        self._report(rbar, group_variance(progress), group)
        if self._still or group.drawn is None:
            return
        if group.discarded_drawn is not None and group.discarded_rewards is not None:
            name = self.reward or group.reward_names[0]
            self._note(group.discarded_drawn, group.reward_of(group.discarded_rewards, name).mean(1), group)
        self._note(group.drawn, rbar, group)

    def _check_range(self, progress: Tensor, group: Group) -> None:
        if bool(((progress < 0) | (progress > 1)).any()):
            raise ValueError(
                f"rods: reward '{self.reward or group.reward_names[0]}' is between {float(progress.min()):.3g} and "
                f"{float(progress.max()):.3g}, a progress reward lies in [0, 1]; name another one: reward"
            )

    def _report(self, rbar: Tensor, variance: Tensor, group: Group) -> None:
        inside = (rbar >= self.low) & (rbar <= self.high)
        group.metrics.mean("rbar", rbar)
        group.metrics.mean("variance", variance)
        group.metrics.mean("variance_boundary", variance, inside.float())
        group.metrics.mean("variance_outside", variance, (~inside).float())
        group.metrics.mean("zero_variance", (self._progress(group).amin(1) == self._progress(group).amax(1)).float())

    def _note(self, numbers: Tensor, rbar: Tensor, group: Group) -> None:
        pool: Pool = self.state["pool"]
        for number, value in zip(numbers.tolist(), rbar.tolist(), strict=True):
            first = pools.observe(pool, number, value)
            if first and pool["entries"][number]["origin"] == pools.GENERATED:
                group.metrics.mean("new_rbar", value)
                group.metrics.mean("new_in_band", float(BAND[0] <= value <= BAND[1]))

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        """What became of the pool."""
        if "pool" not in self.state:
            return []
        pool, attempts = self.state["pool"], self.state["attempts"]
        found = pools.shares(pool, self.bounds)
        regions = ", ".join(f"{share:.0%} {name}" for name, share in found.items())
        lines = [
            f"Pool after {pool['epoch']} epochs: {self.state['size']} rows at first, now {len(pool['entries'])}, of which "
            f"{pools.generated(pool)} generated ({attempts} attempts, {self.state['refused']} refused; each is in "
            f"{FOLDER}/{ROWS}); {len(pool['queue'])} wait"
        ]
        return lines + ([f"Rows by their last mean reward: {regions}"] if regions else [])
