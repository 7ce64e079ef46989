"""A model card's metadata for the Hub, and the facts about a run that its text needs as well."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from evals.report.markdown import model_index
from evals.result import Result
from trl_ext.loops import LOOPS
from trl_ext.methods import METHODS
from trl_ext.run_facts import PublishError, Run

TRAINERS = {
    "grpo": (
        "GRPO",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "2402.03300",
    ),
    "dpo": ("DPO", "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290"),
    "kto": ("KTO", "KTO: Model Alignment as Prospect Theoretic Optimization", "2402.01306"),
    "sft": ("SFT", None, None),
}
"""`trainer` of a recipe -> its name, and the paper that it comes from."""
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class License:
    """The Hub's identifier; a licence called "other" has a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Subject:
    """An evaluation and which of its subjects this run is."""

    result: Result
    name: str


@dataclass(frozen=True)
class Card:
    """What a card is made of. `files`: names that are published beside it."""

    run: Run
    repo: str
    base: str
    license: License
    files: Sequence[str]
    evaluation: Subject | None = None

    @property
    def name(self) -> str:
        """The last part of the repository's name."""
        return self.repo.rpartition("/")[2]


def evaluation_of(folder: str | Path, run: Run) -> Subject:
    """The evaluation in `folder` and the name under which it knows this run's weights, by their hash.

    Raises PublishError when the folder holds none, or one of other weights.
    """
    from evals.generation.store import StoreError
    from evals.models import WEIGHTS, folder_digest
    from evals.report.files import load
    from evals.session import load_session

    what = f"--results {folder} cannot be used"
    try:
        result, session = load(folder), load_session(folder)
    except (OSError, ValueError, StoreError) as error:
        raise PublishError(what, [f"expected a folder that `trl-ext eval` wrote: {error}"]) from None
    adapter = run.adapter is not None
    own = folder_digest(run.weights, ("adapter_model.*", "adapter_config.json") if adapter else WEIGHTS)
    for subject, about in zip(session.subjects, session.tasks[0].abouts, strict=False):
        if about.get("adapter" if adapter else "model") == own:
            return Subject(result, subject.name)
    names = ", ".join(subject.name for subject in session.subjects)
    raise PublishError(
        what, [f"it evaluated {names}, and none has the weights of {run.folder}: trl-ext eval {run.folder}"]
    )


def metadata(facts: Card) -> ModelCardData:
    """The card's metadata; results are not verified by the Hub and say so."""
    whole = facts.run.adapter is None
    kind = [] if whole else [f"base_model:adapter:{facts.base}", str(facts.run.adapter.get("peft_type", "")).lower()]  # type: ignore[union-attr]
    tags = ["trl-ext", "trl", *trainers(facts.run), *kind, *named(facts.run)]
    found = _index(facts)
    index: dict[str, Any] = {"model-index": found} if found else {}
    return ModelCardData(
        base_model=facts.base,
        library_name="transformers" if whole else "peft",
        license=facts.license.id,
        license_name=facts.license.name,
        license_link=facts.license.link,
        pipeline_tag="image-text-to-text" if facts.run.images else "text-generation",
        datasets=[name for name, _ in data_sets(facts.run) if facts.run.on_hub(name)] or None,
        tags=[tag for tag in tags if tag],
        base_model_relation=relation(facts.run),
        trl_ext_run=facts.run.name,
        **index,
    )


def relation(run: Run) -> str:
    """What a run is to its base, in the Hub's words."""
    return "finetune" if run.adapter is None else "adapter"


def check(data: ModelCardData) -> None:
    """Raises PublishError for metadata that the Hub would refuse or could not show."""
    problems = []
    if not LICENSE.fullmatch(data.license or ""):
        problems.append(f"license: {data.license!r} is no identifier of the Hub, such as apache-2.0")
    if data.license == "other" and not (data.license_name and data.license_link):
        problems.append("license: `other` needs its name and its link: --license-name and --license-link")
    problems += [
        f"{name}: not a name on the Hub"
        for name in (data.base_model, *(data.datasets or ()))
        if "/" in name and name.count("/") != 1
    ]
    for found in data.eval_results or ():
        if not isinstance(found.metric_value, int | float) or not math.isfinite(found.metric_value):
            problems.append(f"model-index: {found.metric_type} of {found.dataset_type} is no number")
    if problems:
        raise PublishError("the model card's metadata are not right", problems)


def _index(facts: Card) -> list[dict[str, Any]]:
    """`model-index` from the evaluation, else from the run's own before and after, else empty."""
    if facts.evaluation is not None:
        index = model_index(facts.evaluation.result, facts.name, facts.evaluation.name)
    elif own := facts.run.report.get("evaluation"):
        index = [{"name": facts.name, "results": [_own_result(own, facts.run.recipe)]}]
    else:
        return []
    for result in index[0]["results"]:
        result["metrics"] = [{**m, "verified": False} for m in result["metrics"] if not _nan(m["value"])]
    index[0]["results"] = [result for result in index[0]["results"] if result["metrics"]]
    return json.loads(json.dumps(index)) if index[0]["results"] else []


def _nan(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _own_result(own: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    trained_on = str(recipe.get("dataset_name") or "")
    name = trained_on if trained_on.startswith("sandbox/") else "sandbox"  # the problems are the sandbox's in any case
    metrics = [
        {"type": key, "name": f"{key} after training, %", "value": _rounded(measure["after"]["mean"])}
        for key, measure in own["measures"].items()
    ]
    dataset = {"name": f"{name}, {own['problems']} generated held-out problems", "type": f"generated/{name}"}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def trainers(run: Run) -> list[str]:
    """The trainers of all stages, each once."""
    return list(dict.fromkeys(str(recipe.get("trainer", "grpo")) for recipe in run.recipes))


def named(run: Run) -> list[str]:
    """Names of the loops and of the methods of all stages."""
    parts = [name for recipe in run.recipes for key in ("loop", "methods") for name in recipe.get(key) or {}]
    return list(dict.fromkeys(parts))


def papers(run: Run) -> list[tuple[str, str, str]]:
    """(name, title, arXiv id): the trainers', the loops' and each method's."""
    known: dict[str, Any] = {**LOOPS, **METHODS}
    found = [TRAINERS[name] for name in trainers(run) if name in TRAINERS]
    found += [(one, known[one].title, known[one].paper) for one in named(run) if one in known]
    return [(name, title, paper) for name, title, paper in found if title and paper]


def data_sets(run: Run) -> list[tuple[str, str]]:
    """(name, split) of each data set of all stages."""
    found = []
    for recipe in run.recipes:
        mixed = [(str(one["path"]), str(one.get("split") or "train")) for one in recipe.get("datasets") or ()]
        own = recipe.get("dataset_name")
        found += mixed or ([(str(own), str(recipe.get("dataset_train_split") or "train"))] if own else [])
    return list(dict.fromkeys(found))
