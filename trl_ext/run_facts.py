"""A finished run as its folder tells it: an ordinary run, or a staged pipeline, which is its last stage's whole model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from trl_ext import run_folder
from trl_ext.report.evaluation import TEMPERATURE

RECIPE, ADAPTER_CONFIG, PIPELINE = "recipe.yaml", "adapter_config.json", "pipeline.json"
LOCAL = "local_names.json"
FILE_ENDINGS = (
    ".jsonl",
    ".json",
    ".parquet",
    ".csv",
    ".tsv",
    ".txt",
    ".arrow",
    ".yaml",
    ".yml",
    ".jinja",
    ".zst",
    ".gz",
)
"""What the names of files end in, and those of models and data sets on the Hub do not."""


class PublishError(RuntimeError):
    """A run that cannot be published; `problems` lists every reason, each with what to do."""

    def __init__(self, what: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{what}:\n" + "\n".join(f"  - {problem}" for problem in problems))


@dataclass(frozen=True)
class Run:
    """A finished run. `adapter`: PEFT's configuration, None for a whole model, whose files are in `weights`.

    `earlier`: of a pipeline, the recipes of the stages before, by their names. `local`: names in the recipes that were
    files or folders when the run began -> where they are.
    """

    folder: Path
    weights: Path
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    versions: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    local: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's folder; a pipeline's is above that of its last stage."""
        return (self.folder if self.weights == self.folder else self.folder.parent).resolve().name

    def on_hub(self, name: str) -> bool:
        """Whether a name of the recipe is one on the Hub."""
        return name not in self.local and is_hub_name(name)

    @property
    def recipes(self) -> list[Mapping[str, Any]]:
        """Of all stages, in order; the last one is the run's."""
        return [*self.earlier.values(), self.recipe]

    @property
    def images(self) -> bool:
        """Whether the model takes images: it was saved with a processor of them."""
        return any((self.folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))

    @property
    def loading(self) -> dict[str, Any]:
        """How `from_pretrained` must load the base, beside its name: a revision that is not the newest, its own code."""
        first, found = self.recipes[0], {}
        if first.get("model_revision") not in (None, "main"):
            found["revision"] = first["model_revision"]
        return found | ({"trust_remote_code": True} if first.get("trust_remote_code") else {})

    @property
    def first_model(self) -> str:
        """What the first stage, or the only one, started from, as its recipe names it."""
        return str(self.recipes[0]["model_name_or_path"])

    @property
    def trained_from(self) -> str:
        """What the published weights belong to: an adapter's base, a whole model's ancestor."""
        if self.adapter is None or (self.first_model == "sandbox" and not self.earlier):
            return self.first_model
        return str(self.adapter["base_model_name_or_path"])

    @property
    def base_folder(self) -> Path | None:
        """The base's folder, if it lies on this machine."""
        named = self.first_model if self.adapter is None else str(self.adapter["base_model_name_or_path"])
        folder = Path(self.local.get(named, named)).expanduser()
        return folder if folder.is_dir() else None


def read_run(folder: str | Path) -> Run:
    """The run in a folder that `trl-ext train` wrote. Raises PublishError when it is none or did not finish."""
    folder = Path(folder)
    what = f"{folder} cannot be published"
    pipeline = (folder / PIPELINE).exists()
    if not pipeline and not ((folder / RECIPE).exists() and (folder / "versions.json").exists()):
        raise PublishError(what, ["it is no run of `trl-ext train`: it has no recipe.yaml"])
    if not run_folder.finished(folder):
        raise PublishError(what, ["the run did not finish: trl-ext train RECIPE --resume"])
    if pipeline:
        return _pipeline(folder)
    adapter = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).exists() else None
    report = read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    versions, before = read_json(folder / "versions.json"), _stages_before(folder)
    local = {name: place for one in (*before.values(), folder) for name, place in _local(one).items()}
    earlier = {stage: _recipe(one) for stage, one in before.items()}
    return Run(folder, folder, _recipe(folder), report, versions, adapter, earlier, local)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises PublishError, which names the file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PublishError(f"{path} cannot be read", [f"it is no JSON: {error}"]) from None


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load((folder / RECIPE).read_text()))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        raise PublishError(f"{folder / RECIPE} cannot be read", [f"it is no YAML of a recipe: {said}"]) from None


def _local(folder: Path) -> dict[str, str]:
    return dict(read_json(folder / LOCAL)) if (folder / LOCAL).exists() else {}


def local_names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Names of the model and the data in a recipe that are files or folders here and now -> their absolute paths."""
    names = [recipe.get("model_name_or_path"), recipe.get("dataset_name")]
    names += [one.get("path") for one in recipe.get("datasets") or ()]
    paths = {str(name): Path(str(name)).expanduser() for name in names if name}
    return {name: str(path.resolve()) for name, path in paths.items() if path.exists()}


def _pipeline(folder: Path) -> Run:
    """The last stage with its whole weights: its adapter alone fits nothing that is on the Hub."""
    state = read_json(folder / PIPELINE)
    run, last = read_run(folder / state["last"]["run"]), folder / state["last"]["model"]
    report = {**run.report, "evaluation": _start_to_end(state["stages"])}
    return dataclasses.replace(run, weights=last, adapter=None, report=report)


def _start_to_end(stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first model against the last in the form of a run's report; None when the pipeline did not compare them."""
    first, last = stages[0].get("scores"), stages[-1].get("scores")
    found = stages[-1].get("versus_start") or stages[-1].get("versus_previous")
    if not first or not last or not found:
        return None
    measures = {m: {"before": first[m], "after": last[m], "words": found[m]["words"]} for m in last}
    about = next(iter(last.values()))
    return {"problems": about["n"], "samples": about["samples"], "temperature": TEMPERATURE, "measures": measures}


def _stages_before(run: Path) -> dict[str, Path]:
    """Stage -> folder of the stages before the one that `run` is; none outside of a pipeline."""
    state = run.resolve().parent / PIPELINE
    if not state.exists():
        return {}
    before: dict[str, Path] = {}
    for stage in read_json(state)["stages"]:
        if stage["run"] == run.resolve().name:
            return before
        if stage["run"] is not None:
            before[stage["stage"]] = state.parent / stage["run"]
    return {}


def is_hub_name(name: str) -> bool:
    """Whether `name` may be one on the Hub: name or user/name, no ending of files, and no path or `sandbox` here."""
    if name == "sandbox" or name.startswith("sandbox/") or Path(name).expanduser().exists():
        return False
    if name.lower().endswith(FILE_ENDINGS):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def base_name(run: Run, given: str | None) -> str:
    """The base's name on the Hub: the run's own, or `given` (--base) where that is local. Raises PublishError."""
    own, what = run.trained_from, f"{run.folder} cannot be published"
    if run.on_hub(own):
        if given not in (None, own):
            raise PublishError(what, [f"--base {given}: the run was trained from {own}"])
        return own
    merged = run.adapter is not None and own != run.first_model != "sandbox"
    if merged and given in (None, run.first_model):
        raise PublishError(
            what,
            [
                "its adapter belongs to weights that were merged before it was trained, not to the first model: publish "
                "the whole model (a pipeline's folder with --full-model), or name those weights on the Hub with --base"
            ],
        )
    if given is None:
        raise PublishError(
            what, ["its base is a folder of this machine, which nobody else can load: name it on the Hub with --base"]
        )
    if not is_hub_name(given):
        raise PublishError(what, [f"--base {given}: not a name on the Hub, such as Qwen/Qwen3-1.7B"])
    return given
