"""Runs a staged pipeline: train, hand the model over, evaluate, stage after stage; each step is skipped if it is done.

In the pipeline's folder: `stages.yaml` (what was run), a run folder for each stage (`1_sft`, ...), `models/` (the merged
weights that the next stage starts from), `eval/`, `report.md` and `pipeline.json`. What exists is what was finished: a
merged model and an evaluation appear whole, a run says so in its `status.json`. So `resume` looks at the files alone, and
refuses, before it writes anything, if they came from other settings.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from trl_ext import merging, run_folder
from trl_ext.build import few_threads, model_path
from trl_ext.checkpoints import CheckpointError
from trl_ext.data import DataError, load_data
from trl_ext.loops import stage_report
from trl_ext.loops.failures import DATA_KEYS, Failures, check_failures, write_failures
from trl_ext.loops.policies import hub_base
from trl_ext.loops.stage_checks import begun_run, check_same, stage_run
from trl_ext.loops.stage_evals import StageEvals, asked, check_asked, harness_scores, sandbox_scores
from trl_ext.loops.stages import Pipeline, Stage, StageRecipe
from trl_ext.recipe import RecipeError, without_secrets
from trl_ext.report import Evaluation, files
from trl_ext.run import RunResult, train

STAGES_FILE = "stages.yaml"


@dataclass
class PipelineResult:
    """Where it is, what each stage gave (in a dry run its schedule), and the report's text."""

    output_dir: str
    runs: list[RunResult] = field(default_factory=list)
    text: str = ""


def run_pipeline(pipeline: Pipeline, resume: bool = False, dry_run: bool = False) -> PipelineResult:
    """Trains all stages; `resume` continues the newest unfinished pipeline of this name where it stopped.

    The data of every stage are loaded first; `dry_run` stops there. Raises what `trl_ext.run.train` raises, and MergeError.
    """
    if not dry_run and (
        odd := [f"stages.{s.name}: {s.recipe.not_here}" for s in pipeline.stages if s.recipe.not_here]
    ):
        raise RecipeError(str(pipeline.path), odd)
    tried = _dry_runs(pipeline)
    folder = _folder(pipeline, resume)
    if dry_run:
        return PipelineResult(folder, tried)
    with few_threads(pipeline.stages[0].recipe):
        return _Run(pipeline, Path(folder), PartialState().is_main_process).go()


def _dry_runs(pipeline: Pipeline) -> list[RunResult]:
    """Loads the data of every stage, since a missing column should not show after the stages before it were trained."""
    found, problems = [], []
    for stage in pipeline.stages:
        try:
            found.append(train(stage.recipe, dry_run=True))
        except DataError as error:
            problems.append(f"stages.{stage.name}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return found


def _folder(pipeline: Pipeline, resume: bool) -> str:
    """The pipeline's folder, the same on all processes."""
    chosen = [_unfinished(pipeline.output_dir) if resume else run_folder.new_folder(pipeline.output_dir)]
    PartialState().wait_for_everyone()
    return broadcast_object_list(chosen)[0]


def _unfinished(base: str) -> str:
    begun = [f for f in run_folder.numbered(Path(base)) if (f / STAGES_FILE).exists() and not run_folder.finished(f)]
    if not begun:
        raise CheckpointError(f"nothing to resume: there is no unfinished pipeline in {base}. Start without --resume.")
    return str(begun[-1])


@dataclass
class _Run:
    """One pass over the stages."""

    pipeline: Pipeline
    folder: Path
    main: bool
    result: PipelineResult = field(init=False)
    recipes: dict[str, StageRecipe] = field(default_factory=dict)
    rows: list[stage_report.Row] = field(default_factory=list)
    evaluations: list[Evaluation | None] = field(default_factory=list)

    def go(self) -> PipelineResult:
        """All stages, then the report."""
        self.result = PipelineResult(str(self.folder))
        model = model_path(self.pipeline.stages[0].recipe)
        self._check(model)
        PartialState().wait_for_everyone()
        self._once(self._start)
        self._evaluate(None, model, model)
        for stage in self.pipeline.stages:
            before, model = model, self._stage(stage, model)
            self._evaluate(stage, before, model)
        self._once(self._finish)
        return self.result

    def _check(self, model: str) -> None:
        """Walks over what is there, as `go` does from the first `model`, and writes nothing. Raises CheckpointError."""
        self._check_evaluation(None, model, model)
        for stage in self.pipeline.stages:
            recipe = self.recipes[stage.name] = self._recipe(stage, model)
            if stage.failures is not None:
                source = self._source(stage.failures)
                check_failures(
                    stage.failures, self.recipes[source.name].reward_names, self._failures_file(stage, source)
                )
            done = stage_run(self.folder, stage.label)
            if (run := done or begun_run(self.folder, stage.label)) is not None:
                check_same(stage, recipe, run)
            if done is None:
                return
            before, model = model, self._model_of(stage, done)
            self._check_evaluation(stage, before, model)

    def _check_evaluation(self, stage: Stage | None, before: str, model: str) -> None:
        if (evals := self.pipeline.evals) is not None:
            check_asked(self._evaluation_file(stage), self._asked(evals, before, model))

    def _asked(self, evals: StageEvals, *models: str) -> dict[str, Any]:
        """What decides an evaluation: a model of this pipeline by its place in the folder, which may be moved."""
        paths = [Path(model) for model in models]
        inside = [str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else None for path in paths]
        return asked(evals, *(place or model for place, model in zip(inside, models, strict=True)))

    def _once(self, act: Callable[[], Any]) -> None:
        """Acts on the main process; the others wait until it is done."""
        if self.main:
            act()
        PartialState().wait_for_everyone()

    def _start(self) -> None:
        run_folder.mark(self.folder, "running")
        kept = without_secrets({key: value for key, value in self.pipeline.raw.items() if key != "env"})
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        files.write_text(self.folder / STAGES_FILE, text)

    def _stage(self, stage: Stage, model: str) -> str:
        """Trains a stage unless it is finished; the folder of its whole model."""
        if stage.failures is not None:
            self._failed_prompts(stage, stage.failures)
        recipe = self.recipes[stage.name] = self._recipe(stage, model)
        done = stage_run(self.folder, stage.label)
        if done is None:
            begun = begun_run(self.folder, stage.label) is not None
            self.result.runs.append(train(recipe, resume=begun))
            _free()
            PartialState().wait_for_everyone()
            done = stage_run(self.folder, stage.label)
        assert done is not None  # `train` marks what it finished
        return self._whole_model(stage, recipe, done)

    def _recipe(self, stage: Stage, model: str) -> StageRecipe:
        """The stage's recipe from the model and the data that it starts from."""
        changes: dict[str, Any] = {"output_dir": str(self.folder / stage.label)}
        if stage.number > 1:
            changes["model_name_or_path"] = model
            changes["model_revision"] = None
        if stage.failures is not None:
            path = self._failures_file(stage, self._source(stage.failures))
            changes |= dict.fromkeys(DATA_KEYS) | {"dataset_name": str(path)}
        return self.pipeline.recipe_of(stage, **changes)

    def _source(self, failures: Failures) -> Stage:
        return next(s for s in self.pipeline.stages if s.name == failures.stage)

    def _failures_file(self, stage: Stage, source: Stage) -> Path:
        return self.folder / f"failures_{source.label}_for_{stage.label}.parquet"

    def _failed_prompts(self, stage: Stage, failures: Failures) -> None:
        """Writes the prompts that the earlier stage failed, unless they are there."""
        source = self._source(failures)
        recipe, done = self.recipes[source.name], stage_run(self.folder, source.label)
        path = self._failures_file(stage, source)

        def write() -> None:
            if done is not None and not path.exists():
                write_failures(failures, done, recipe.reward_names, load_data(recipe), path)

        self._once(write)

    def _model_of(self, stage: Stage, done: Path) -> str:
        """Where the stage's whole weights are: the run itself, or beside it if the run holds an adapter."""
        return str(self.folder / "models" / stage.label if (done / "adapter_config.json").exists() else done)

    def _whole_model(self, stage: Stage, recipe: StageRecipe, done: Path) -> str:
        """What the stage trained as whole weights; an adapter is merged into the model before."""
        out = Path(self._model_of(stage, done))
        if out == done:
            return str(done)
        # Weights that were trained in 32 bits are handed over in 32 bits; a quantized base gives its 16-bit original.
        args = recipe.model_args
        whole = args.dtype == "float32" and not (args.load_in_4bit or args.load_in_8bit)

        def merge() -> None:
            if not out.exists():
                merging.merge_adapter(str(done), str(out), hub_base(recipe), "float32" if whole else None)

        self._once(merge)
        _free()
        return str(out)

    def _evaluate(self, stage: Stage | None, before: str, model: str) -> None:
        """Asks the model that a stage left (None: the first one), and notes the stage's row of the report."""
        evals, label = self.pipeline.evals, _label(stage)
        scores: Evaluation | None = None
        tasks: dict[str, Any] = {}
        if evals is not None and evals.rows and self.main:
            device = self.pipeline.stages[0].recipe.training_args.device
            file, now = self._evaluation_file(stage), self._asked(evals, before, model)
            scores = sandbox_scores(evals, model, device, file, now)
        elif evals is not None and not evals.rows and stage is not None:
            place = self.folder / "eval"
            now = self._asked(evals, before, model)
            tasks = harness_scores(evals, before, model, place / label, place / "replies", self.main, now)
        _free()
        self.evaluations.append(scores)
        done = stage_run(self.folder, stage.label) if stage else None
        trainer = stage.recipe.trainer if stage else None
        self.rows.append(stage_report.Row(label, trainer, done, model, scores, tasks))
        self._once(lambda: stage_report.write(self.folder, self.pipeline, self.rows, finished=False))

    def _evaluation_file(self, stage: Stage | None) -> Path:
        return self.folder / "eval" / f"{_label(stage)}.json"

    def _finish(self) -> None:
        self.result.text = stage_report.write(self.folder, self.pipeline, self.rows, finished=True)
        run_folder.mark(self.folder, "finished")


def _label(stage: Stage | None) -> str:
    """The name of a stage's row, or of the start's."""
    return stage.label if stage else "0_start"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
