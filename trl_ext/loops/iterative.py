"""Iterative preference learning (DNO, arXiv 2404.03715): rounds of sample, score, build, train, each on disk when done.

Round t = 1..T begins with weights theta_t, which are also its frozen reference:

1. samples.jsonl   K replies of theta_t to each prompt of the round's own split
2. scores.jsonl    the scorer's verdict on them
3. train.jsonl     pairs (or labels), with replay of earlier rounds; earlier replies are not sampled again
4. policy/         the trainer of the recipe on them, from theta_t, to theta_hat_t; an adapter is merged in
5. anchor/         Nesterov (arXiv 2410.06293): theta_{t+1} = theta_hat_t + alpha (theta_hat_t - theta_hat_{t-1}), else
                   theta_{t+1} = theta_hat_t; theta_hat_0 = theta_1 is the model of the recipe
6. report.json     theta_hat_t against theta_hat_{t-1} and theta_hat_0 on held-out prompts

What is on disk is not made again, and every draw has a seed of its own, so a loop that was killed anywhere and goes on
gives the same files and the same weights. The trained policy is what is saved at the end, never an anchor: of the two
outputs that card nesterov names this is its default; the last round's anchor is not offered, since no round compares it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext import merging
from trl_ext.build import build_trainer, model_init_kwargs
from trl_ext.checkpoints import last_whole
from trl_ext.data import Data
from trl_ext.loops import building
from trl_ext.loops.iterative_settings import Iterative
from trl_ext.loops.policies import Policies, hub_base
from trl_ext.loops.round_facade import LooksLikeATrainer
from trl_ext.loops.round_files import (
    ROUNDS,
    RoundFolder,
    check_settings,
    compare_settings,
    digest,
    folder_of,
    write_folder,
)
from trl_ext.loops.round_log import Relay, RoundLog
from trl_ext.loops.sampling import kl_of_samples
from trl_ext.loops.scorers import Scorer, make_scorer
from trl_ext.recipe import Recipe, RecipeError
from trl_ext.recipe_parts import training_class
from trl_ext.report import files, quiet
from trl_ext.settings import fields_of

Line = dict[str, Any]
FREE = (
    *("output_dir", "run_name", "logging_", "log_", "report_to", "disable_tqdm", "project", "trackio_"),
    *("resume_from_checkpoint", "save_", "push_to_hub", "hub_"),
    *(
        f"loop.iterative.scorer.judge.{key}"
        for key in ("max_unread", "timeout", "retries", "concurrency", "backoff", "api_key_env")
    ),
)
"""How keys begin that cannot change what the rounds give, so that a run that is resumed may have others."""
SAMPLING_READS = ("seed", "full_determinism", "use_cpu", "tf32", "trust_remote_code", "model_init_kwargs")
"""Of the trainer's configuration: what samples and verdicts depend on too."""
ADAPTER_KEYS = ("use_peft", "lora_", "use_rslora", "use_dora")
PART = 512
"""Prompts that are sampled before they are written."""


class IterativeTrainer(LooksLikeATrainer):
    """Looks like a trainer to `trl_ext.run`: `train()` plays all rounds, `model` is the policy in memory."""

    def __init__(self, recipe: Recipe, model: str, tokenizer: Any, data: Data) -> None:
        """Raises DataError for too few prompts or teachers that cannot be read, RecipeError for a scorer that cannot be
        made, CheckpointError as `train`, and what the recipe's trainer raises when it is built."""
        assert isinstance(recipe.loop, Iterative)
        self.recipe, self.loop, self.args, self.plan = recipe, recipe.loop, recipe.training_args, recipe.plan
        self.args.model_init_kwargs = model_init_kwargs(recipe)
        self.processing_class, self.base, self.rows = tokenizer, model, data.train
        self.deciding = _deciding(recipe, model, data.train)
        compare_settings(self.args.output_dir, self.deciding, trainers_own)
        building.check_teachers(data.train, self.loop.teacher_column)
        prompts = building.distinct(data.train["prompt"])
        self.duplicates = len(data.train) - len(prompts)
        self.held_out, self.splits = building.splits(prompts, self.loop, self.args.seed)
        self.scorer = self._scorer()
        self.kto = recipe.trainer == "kto"
        self.policies = Policies(self.args, self.loop, tokenizer)
        self.accelerator = self.policies.accelerator
        self.log = RoundLog(self)
        self._try_trainer()
        self.policies.use(model)

    def _scorer(self) -> Scorer:
        rewards, answers = self.recipe.rewards, str(Path(self.args.output_dir) / ROUNDS / "answers")
        weights = self.loop.reward_weights or [getattr(reward, "default_weight", 1.0) for reward in rewards]
        try:
            return make_scorer(self.loop.scorer, rewards, weights, answers)
        except ValueError as error:
            raise RecipeError(str(self.recipe.path), [f"loop: scorer: {error}"]) from None

    def summary(self) -> list[str]:
        """The rounds in words, for the report."""
        return self.log.words(self._kept())

    def _try_trainer(self) -> None:
        """Builds round 1's trainer on two rows and drops it: what it refuses must not wait until replies are judged."""
        if folder_of(self.args.output_dir, 1).policy.exists():
            return
        with tempfile.TemporaryDirectory() as place:
            self._dismiss(self._trainer(1, RoundFolder(Path(place)), building.stand_ins(self.rows, self.kto)))

    # The loop

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """All rounds that are not on disk; then `model` is the iterate that is kept.

        Raises CheckpointError when the rounds on disk were made with other settings, DataError for a round without data.
        """
        check_settings(self.args.output_dir, self.deciding, trainers_own)
        self.log.begin([folder_of(self.args.output_dir, n) for n in range(1, self.loop.rounds + 1)])
        if self.duplicates:
            self.log.say(f"{self.duplicates} rows are left out: their prompts came before in the data set")
        for number in range(1, self.loop.rounds + 1):
            if not folder_of(self.args.output_dir, number).done:
                self._round(number)
        self.policies.use(self._policy(self._kept()))
        self.log.end()

    def _round(self, number: int) -> None:
        folder = folder_of(self.args.output_dir, number)
        rows = [self.rows[i] for i in self.splits[number - 1]]
        lines = folder.lines("samples", lambda: self._samples(number, folder))
        shutil.rmtree(folder.path / "samples", ignore_errors=True)
        scored = folder.lines(
            "scores", lambda: building.verdicts(rows, lines, self.scorer, self.loop, self.processing_class)
        )
        chosen = folder.lines("train", lambda: self._training_lines(number, rows, lines, scored))
        if folder.policy.exists():
            self.log.replay(folder)
        else:
            self._train(number, folder, chosen)
        shutil.rmtree(folder.train, ignore_errors=True)
        if self._anchored(number) and not folder.anchor.exists():
            self._extrapolate(number, folder)
        folder.value("report", lambda: self._report(number, folder, lines, scored, chosen))
        self.log.round_done(folder)

    def _policy(self, number: int) -> str:
        """theta_hat_number: the trained policy of a round, or the recipe's model for 0."""
        return self.base if number == 0 else str(folder_of(self.args.output_dir, number).policy)

    def _start(self, number: int) -> str:
        """theta_number: what a round begins with."""
        anchor = folder_of(self.args.output_dir, number - 1).anchor
        return str(anchor) if self._anchored(number - 1) else self._policy(number - 1)

    def _anchored(self, number: int) -> bool:
        """Whether the round after this one begins with an anchor. The last round has none after it."""
        return self.loop.alpha > 0 and self.loop.first_anchor <= number < self.loop.rounds

    def _named(self, weights: str) -> str:
        """Weights as the files name them: relative to the run's folder, or the model's name."""
        path = Path(weights)
        if path.is_relative_to(self.args.output_dir):
            return str(path.relative_to(self.args.output_dir))
        return path.name if path.is_absolute() else weights

    # Stages

    def _samples(self, number: int, folder: RoundFolder) -> list[Line]:
        """Parts of `PART` prompts are kept while the round is sampled, so that a kill costs at most one of them."""
        parts, indices, lines = RoundFolder(folder.path / "samples"), self.splits[number - 1], []
        for at in range(0, len(indices), PART):
            make = functools.partial(self._part, number, indices[at : at + PART], at)
            lines += parts.lines(str(at), make)
        return lines

    def _part(self, number: int, indices: Sequence[int], at: int) -> list[Line]:
        start, seed, column = self._start(number), f"{self.args.seed}/round {number}/{at}", self.loop.teacher_column
        rows = [self.rows[i] for i in indices]
        found = self.policies.sample(start, rows, self.loop.num_samples, seed)
        return [
            {"round": number, "prompt": index, "sampler": self._named(start), "seed": seed, "replies": replies}
            | {"teacher": building.teacher_of(row, column)}
            for index, row, replies in zip(indices, rows, found, strict=True)
        ]

    def _training_lines(
        self, number: int, rows: Sequence[Mapping[str, Any]], lines: list[Line], scored: list[Line]
    ) -> list[Line]:
        make = building.label_lines if self.kto else building.pair_lines
        earlier = []
        for n in range(1, number):  # their own rows, without what they replayed
            before = folder_of(self.args.output_dir, n).read_lines("train")
            earlier.append([line for line in before if line["round"] == n])
        new = make(rows, lines, scored, self.loop)
        found = building.training_lines(new, earlier, self.loop, self.kto, f"{self.args.seed}/train {number}")
        building.check_lines(found, number, self.kto)  # before it is written, where it could not be made again
        return found

    def _train(self, number: int, folder: RoundFolder, chosen: list[Line]) -> None:
        """One call of the recipe's trainer, from the round's start; the trained weights become `policy/`."""
        self.policies.drop()
        trainer = self._trainer(number, folder, chosen)
        quiet(trainer)
        trainer.add_callback(Relay(self.log))
        trainer.train(resume_from_checkpoint=last_whole(trainer.args.output_dir))
        folder.value("log", lambda: trainer.state.log_history)
        self._store(trainer, folder, self._start(number))
        self._dismiss(trainer)

    def _trainer(self, number: int, folder: RoundFolder, chosen: list[Line]) -> Any:
        """The recipe's trainer for a round, on these lines, from the round's start."""
        args = copy.copy(self.args)
        args.output_dir, args.seed, args.push_to_hub = str(folder.train), self.args.seed + number - 1, False
        args.hub_token = None  # the arguments are pickled beside checkpoints and weights
        args.learning_rate = self.args.learning_rate * self.loop.learning_rate_factor ** (number - 1)
        recipe = dataclasses.replace(self.recipe, training_args=args, loop=None, rewards=())
        rows = Dataset.from_list(building.columns(chosen, self.kto))
        data = Data(rows, None, None, len(rows), 0)
        return build_trainer(recipe, self._start(number), self.processing_class, data)

    def _dismiss(self, trainer: Any) -> None:
        trainer.end()
        trainer.model = trainer.model_wrapped = trainer.ref_model = trainer.optimizer = None
        trainer.accelerator.free_memory()

    def _store(self, trainer: Any, folder: RoundFolder, start: str) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not hasattr(model, "peft_config"):
            write_folder(folder.policy, trainer.save_model)
            return
        adapter, precision = str(folder.train / "adapter"), str(model.get_base_model().dtype).removeprefix("torch.")
        trainer.save_model(adapter)
        base = (hub_base(self.recipe) if start == self.base else None) or start

        def merge(part: str) -> None:
            merged = merging.merge_adapter(adapter, part, base=base, precision=precision)
            told = [line for line in merged.text().splitlines() if line.startswith("Warning: ")]
            files.write_json(folder.path / "merge.json", [line.removeprefix("Warning: ") for line in told])

        write_folder(folder.policy, merge)

    def _extrapolate(self, number: int, folder: RoundFolder) -> None:
        """`anchor/`: the weights of this round pushed on along the change since the round before."""
        previous, new = (self.policies.weights(self._policy(n)) for n in (number - 1, number))
        distance = merging.anchor_distance(new, previous, self.loop.alpha)
        folder.value("anchor", lambda: {"alpha": self.loop.alpha, "anchor_distance": distance})
        self.policies.change(merging.extrapolated(new, previous, self.loop.alpha))
        write_folder(folder.anchor, self.policies.write)

    def _report(
        self, number: int, folder: RoundFolder, lines: list[Line], scored: list[Line], chosen: list[Line]
    ) -> dict[str, Any]:
        """The round's numbers, and what it has to warn of."""
        rows = [self.rows[i] for i in self.held_out]
        found = [self._held_out(n) for n in (number, number - 1, 0)]
        replies = functools.partial(building.replies_of, tokenizer=self.processing_class, share=self.loop.repeat_share)
        new, old, first = (list(map(replies, each)) for each in found)
        over_old, over_first = self.scorer.win_rates(rows, new, old), self.scorer.win_rates(rows, new, first)
        numbers, warnings = building.sample_numbers(lines, scored), self._merge_warnings(folder)
        if self.kto:
            own, unbalanced = building.label_numbers(chosen, number, self.args)
            warnings += [unbalanced] if unbalanced else []
        else:
            own = building.pair_numbers(chosen, number, len(lines))
            own["contradicted"] = float(building.contradictions(lines, scored, self.loop))
            own["identical"] = float(building.identical(lines, scored, self.loop))
        numbers |= own | {"win_rate": _mean(over_old), "win_rate_over_start": _mean(over_first)}
        judged = self.scorer.judge(rows, new) if self.scorer.scores else []
        held = [score for one in judged for score in one.scores or [] if score is not None]
        numbers |= {"held_out_score": _mean(held)} if held else {}
        momentum = self._momentum(number, folder, rows, found[0]) if self._anchored(number) else {}
        return {"round": number, "numbers": numbers, "nesterov": momentum, "warnings": warnings}

    def _merge_warnings(self, folder: RoundFolder) -> list[str]:
        return folder.read("merge") if (folder.path / "merge.json").exists() else []

    def _momentum(self, number: int, folder: RoundFolder, rows: Sequence[Any], held_out: list[Line]) -> dict[str, Any]:
        """Of the anchor: its distance, and KL(anchor || trained policy) on that policy's replies to held-out prompts."""
        own, anchor = (
            self.policies.log_probs(weights, rows, held_out) for weights in (self._policy(number), str(folder.anchor))
        )
        return folder.read("anchor") | {"kl_anchor_to_trained": kl_of_samples(anchor, own)}

    def _held_out(self, number: int) -> list[Line]:
        """Replies of theta_hat_number to the held-out prompts; the same seed for all policies."""
        rows = [self.rows[i] for i in self.held_out]

        def make() -> list[Line]:
            seed = f"{self.args.seed}/held out"
            found = self.policies.sample(self._policy(number), rows, self.loop.eval_samples, seed)
            return [
                {"prompt": index, "sampler": self._named(self._policy(number)), "replies": replies, "teacher": None}
                for index, replies in zip(self.held_out, found, strict=True)
            ]

        return folder_of(self.args.output_dir, number).lines("held_out", make)

    def _kept(self) -> int:
        """The number of the round whose policy is kept; of equal ones the first."""
        reports = [folder_of(self.args.output_dir, n).read("report") for n in range(1, self.loop.rounds + 1)]
        if self.loop.keep == "last":
            return self.loop.rounds
        rates = [report["numbers"]["win_rate_over_start"] for report in reports]
        return rates.index(max(rates)) + 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def check_begun(recipe: Recipe, model: str, data: Data) -> None:
    """Raises CheckpointError when the recipe's folder has rounds that were made with other settings or other rows."""
    deciding = _deciding(recipe, model, data.train)
    compare_settings(recipe.training_args.output_dir, deciding, trainers_own)


def trainers_own(key: str) -> bool:
    """Whether a key reaches the trainer alone, so that it may change (a batch that was too large) until one has trained."""
    name = key.partition(".")[0]
    known = any(name in fields_of(training_class(trainer)) for trainer in Iterative.trainers)
    return name not in SAMPLING_READS and (known or name.startswith(ADAPTER_KEYS))


def _deciding(recipe: Recipe, model: str, rows: Any) -> dict[str, Any]:
    """What decides the rounds: all settings but those of `FREE`, the model's path, and the rows with all columns."""
    flat = {key: value for key, value in _flat(recipe.resolved()).items() if not key.startswith(FREE)}
    return flat | {"model": model, "sha256 of the rows": digest(rows)}


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"loop": {"iterative": {"rounds": 2}}} -> {"loop.iterative.rounds": 2}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) and value else {f"{before}{key}": value}
    return found
