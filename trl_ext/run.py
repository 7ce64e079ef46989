"""Runs a recipe: data, rewards and trainer from the checked configuration, then training, report and a saved adapter."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig
from trl import get_quantization_config

from trl_ext import hub, pushing, run_folder, saved
from trl_ext.advice import advise
from trl_ext.build import build_trainer, few_threads, load_tokenizer, model_path
from trl_ext.checkpoints import last_whole
from trl_ext.data import Data, DataError, load_data
from trl_ext.loops.labels import balance_warning
from trl_ext.plan import Plan
from trl_ext.recipe import Recipe, RecipeError
from trl_ext.report import files as report_files
from trl_ext.run_facts import LOCAL, local_names
from trl_ext.schedule import schedule_of
from trl_ext.watch import Watch, warn_dropped


@dataclass
class RunResult:
    """What a run gave: where it is, its plan and schedule, the log of the trainer, and the report's text."""

    output_dir: str
    plan: Plan
    schedule: str
    log_history: list[dict[str, float]] = field(default_factory=list)
    before: Any = None
    after: Any = None
    warnings: list[str] = field(default_factory=list)
    text: str = ""


def train(recipe: Recipe, resume: bool = False, dry_run: bool = False) -> RunResult:
    """Trains `recipe` and returns what came out; `resume` continues its newest unfinished run.

    `dry_run` stops once data, columns, plan and schedule are known to fit; no model is loaded and nothing is written,
    and prompts are not filtered by length, which takes a tokenizer.

    Raises RecipeError, DataError, PlanError, CheckpointError, RewardError or SavedModelError, each with what to do.
    """
    watch, wish = Watch(), pushing.wish_of(recipe)
    if dry_run:
        data = load_data(recipe)
        unbalanced = balance_warning(recipe, data)
        said = [unbalanced] if unbalanced else []
        return RunResult(_output_dir(recipe, resume), recipe.plan, _schedule(recipe, data), warnings=said)
    if recipe.not_here:
        raise RecipeError(str(recipe.path), [recipe.not_here])
    model = model_path(recipe)
    tokenizer = load_tokenizer(recipe, model)
    data = load_data(recipe, _token_counter(recipe, tokenizer))
    for advice in advise(recipe, _config(recipe, model)) if PartialState().is_main_process else ():
        watch.say(str(advice))
    if (unbalanced := balance_warning(recipe, data)) and PartialState().is_main_process:
        watch.say(unbalanced)
    warn_dropped(watch, data.dropped, data.rows, recipe.extra.max_prompt_tokens)
    result = RunResult(_output_dir(recipe, resume), recipe.plan, _schedule(recipe, data), warnings=watch.warnings)
    recipe.training_args.output_dir = result.output_dir
    main = PartialState().is_main_process
    if recipe.loop is not None:
        recipe.loop.check_begun(recipe, model, data)  # before anything in the folder is written over
    if main:
        if wish is not None:
            wish = pushing.check(wish, model, result.output_dir)
        _start(recipe, result, data)
    with few_threads(recipe):
        trainer = build_trainer(recipe, model, tokenizer, data)
        return _Run(recipe, model, data, trainer, watch, result, main, wish).go(resume)


def _config(recipe: Recipe, model: str) -> Any:
    kwargs = {
        "revision": recipe.model_args.model_revision,
        "trust_remote_code": recipe.training_args.trust_remote_code,
    }
    return AutoConfig.from_pretrained(model, **kwargs)


def _schedule(recipe: Recipe, data: Data) -> str:
    loop = recipe.loop
    try:
        text = schedule_of(recipe.training_args, _rows(recipe, data)).words()
    except ValueError as error:
        raise DataError(str(error)) from None
    if loop is not None and loop.makes_data:
        text = f"{'each round' if loop.in_rounds else 'on what the loop makes of the data set'}: {text}"
    return f"{text}; {data.dropped} rows left out for their length" if data.dropped else text


def _rows(recipe: Recipe, data: Data) -> int | None:
    """Rows that the trainer learns from; None where a loop makes them first, and the trainer alone can count them."""
    return None if recipe.loop is not None and recipe.loop.makes_data else data.rows


def _token_counter(recipe: Recipe, tokenizer: Any) -> Callable[[Any], int]:
    settings = getattr(recipe.training_args, "chat_template_kwargs", None) or {}

    def count(prompt: Any) -> int:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False, **settings
        )
        return len(ids[0] if ids and isinstance(ids[0], list) else ids)  # a processor of images returns a batch of one

    return count


def _output_dir(recipe: Recipe, resume: bool) -> str:
    """The folder of this run, the same on all processes."""
    base, checkpoint = recipe.training_args.output_dir, _checkpoint(recipe, resume)
    if isinstance(checkpoint, str):
        return base if "output_dir" in recipe.raw else str(Path(checkpoint).parent)
    chosen = [run_folder.folder_to_resume(base) if checkpoint else run_folder.new_folder(base)]
    PartialState().wait_for_everyone()
    return broadcast_object_list(chosen)[0]


def _checkpoint(recipe: Recipe, resume: bool) -> str | bool:
    """What to resume from: a folder, True for the newest checkpoint, or False. TRL's `resume_from_checkpoint` counts."""
    named = str(recipe.training_args.resume_from_checkpoint or "")
    if named.lower() in ("", "true", "false"):
        return resume or named.lower() == "true"
    return named


def _start(recipe: Recipe, result: RunResult, data: Data) -> None:
    from trl_ext import report

    run_folder.mark(result.output_dir, "running")
    report.start(result.output_dir, recipe, recipe.plan, result.schedule)
    report_files.write_json(Path(result.output_dir) / LOCAL, local_names(recipe.resolved()))


@dataclass
class _Run:
    """One training run, from the built trainer to the checked result."""

    recipe: Recipe
    model: str
    data: Data
    trainer: Any
    watch: Watch
    result: RunResult
    main: bool
    wish: hub.Wish | None = None
    recorder: Any = None

    def go(self, resume: bool) -> RunResult:
        """Before, training, after, save, check."""
        trainer, result = self.trainer, self.result
        result.before = self._evaluate()
        self._callbacks()
        self._fit(resume)
        result.log_history = list(trainer.state.log_history)
        result.after = self._evaluate()
        self._save()
        if self.main:
            self._report()
            run_folder.mark(result.output_dir, "finished")
        self._release()  # a reducer that outlives gloo's group may wait for its thread for ever, holding the GIL
        trainer.end()
        if self.main and self.wish is not None:
            result.text += f"\nPublished: {pushing.push(self.wish, result.output_dir).place}"
        return result

    def _unwrapped(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def _whole_model(self) -> bool:
        """Whether this process reports and holds all weights: under FSDP and ZeRO-3 none does."""
        return self.main and self.trainer._engine() is None

    def _evaluate(self) -> Any:
        """Numbers on held-out sandbox problems, on the main process."""
        if self.data.held_out is None or not self._whole_model:
            return None
        from trl_ext import report

        rows = list(self.data.held_out)
        return report.evaluate_sandbox(self._unwrapped(), self.trainer.processing_class, rows, self.trainer.args.seed)

    def _callbacks(self) -> None:
        self.trainer.add_callback(self.watch)
        if self.main:
            from trl_ext import report

            report.quiet(self.trainer)
            steps = schedule_of(self.trainer.args, _rows(self.recipe, self.data)).steps or self.trainer.args.max_steps
            steps = getattr(self.trainer, "total_steps", steps)
            self.recorder = report.Recorder(self.result.output_dir, steps, self.recipe.plan)
            self.trainer.add_callback(self.recorder)

    def _fit(self, resume: bool) -> None:
        try:
            checkpoint = _checkpoint(self.recipe, resume)
            if checkpoint is True and last_whole(self.result.output_dir) is None:
                checkpoint = False  # the loop's data were begun, the training was not
            self.trainer.train(resume_from_checkpoint=checkpoint or None)
        except (Exception, KeyboardInterrupt) as error:
            if self.recorder is not None:
                self.recorder.close()  # the message below must not stand inside the progress bar
            error.add_note(self._how_to_resume())
            raise

    def _how_to_resume(self) -> str:
        kept = last_whole(self.result.output_dir)
        if kept is None and run_folder.rounds_begun(self.result.output_dir):
            kept = f"{self.result.output_dir}/rounds"
        if kept is None:
            every = f"every {self.trainer.args.save_steps:g} steps: save_steps"
            return f"No checkpoint was written yet ({every}). The log is in {self.result.output_dir}."
        return (
            f"What was written stays. Continue from {kept} with: trl-ext train {self.recipe.path} --resume (and the same "
            "--key values, if you gave any)"
        )

    def _save(self) -> None:
        self.trainer.save_model(self.result.output_dir)
        if self._whole_model and not self.trainer._is_vlm:
            self._check_saved()
        elif self.main:
            self.watch.say(
                "the saved model was not loaded again: that is done for text models whose weights are whole"
            )

    def _check_saved(self) -> None:
        """Loads what was saved beside the trained model and compares log-probabilities."""
        row = next(iter(self.data.train))
        text = next(row[key] for key in ("prompt", "chosen", "messages", "text") if row.get(key))
        ids = saved.probe_ids(self.trainer.processing_class, text)
        expected = saved.log_probs(self._unwrapped(), ids)
        init, device = dict(self.trainer.args.model_init_kwargs), self._unwrapped().device
        if (quantization := get_quantization_config(self.recipe.model_args)) is not None:
            init["quantization_config"] = quantization
        self._release()
        again = saved.reload(self.result.output_dir, self.model, device, **init)
        saved.check_equal(expected, saved.log_probs(again, ids), self.result.output_dir)

    def _release(self) -> None:
        """Frees the trained model, what wraps it, and the optimizer, so that a second model fits where one did."""
        for trainer in filter(None, (self.trainer, getattr(self.trainer, "proposer", None))):
            trainer.model = trainer.model_wrapped = trainer.ref_model = trainer.optimizer = trainer._teacher = None
            trainer._frozen = None
            trainer._encoders = {}
            trainer.accelerator.free_memory()
        gc.collect()

    def _decode_one(self, token: int) -> str:
        tokenizer = getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)
        return str(tokenizer.decode([token]))

    def _report(self) -> None:
        from trl_ext import report

        decode = getattr(self.trainer, "decode_one", self._decode_one)
        lines = [line for m in self.trainer.plan.methods for line in m.summary(decode)]
        lines += self.trainer.summary() if hasattr(self.trainer, "summary") else []
        self.result.text = report.finish(
            self.result.output_dir, self.recipe, self.recipe.plan, self.result.before, self.result.after, lines
        )
