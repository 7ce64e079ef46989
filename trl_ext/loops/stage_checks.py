"""Whether what a pipeline's folder holds came from the settings of now: a resume asks this before it writes anything."""

from __future__ import annotations

from pathlib import Path

import yaml

from trl_ext import run_folder
from trl_ext.checkpoints import CheckpointError, last_whole
from trl_ext.loops.stages import Stage, StageRecipe

_SET_BY_US = ("output_dir", "logging_dir", "run_name")


def stage_run(folder: Path, label: str) -> Path | None:
    """The finished run of a stage in a pipeline's folder, or None."""
    return next((f for f in reversed(run_folder.numbered(folder / label)) if run_folder.finished(f)), None)


def begun_run(folder: Path, label: str) -> Path | None:
    """The unfinished run of a stage that a resume goes on with: the newest with a whole checkpoint or rounds."""
    runs = [f for f in run_folder.numbered(folder / label) if not run_folder.finished(f)]
    return next((f for f in reversed(runs) if last_whole(f) or run_folder.rounds_begun(f)), None)


def check_same(stage: Stage, recipe: StageRecipe, run: Path) -> None:
    """Raises CheckpointError when the stage's `run` was made with other settings than `recipe`, what it would be now."""
    then, now = yaml.safe_load((run / "recipe.yaml").read_text()), recipe.resolved()
    ours = (*_SET_BY_US, "model_name_or_path") if stage.number > 1 else _SET_BY_US
    if stage.failures is not None:  # a file of ours in the pipeline's folder, which may be moved
        then, now = ({**each, "dataset_name": Path(each["dataset_name"]).name} for each in (then, now))
    keys = [key for key in {**then, **now} if key not in ours and then.get(key) != now.get(key)]
    if keys:
        changes = "; ".join(f"{key} {then.get(key)!r} then, {now.get(key)!r} now" for key in keys)
        state = "finished" if run_folder.finished(run) else "begun"
        raise CheckpointError(
            f"stage '{stage.name}' is {state} in {run} with other settings ({changes}). Resume with the same ones, or "
            "start without --resume."
        )
