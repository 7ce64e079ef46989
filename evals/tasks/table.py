"""The table of all tasks, and of groups of them. Longer than a module should be, for it is a table."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence

from evals.data import (
    aime,
    aime_synth,
    gpqa,
    gsm8k,
    gsm_json_synth,
    json_schema_bench,
    mcq_synth,
    sandbox_json,
    schema_synth,
)
from evals.data.hub import or_stand_in
from evals.graders.choice import CHOICE_METRICS
from evals.graders.math import MATH_METRICS
from evals.graders.structured import STRUCTURED_METRICS
from evals.task import Task
from evals.tasks import grading, presets

SEEN_2024 = "AIME 2024 shows strong signs of contamination (arXiv:2505.23281): compare it with AIME 2025."
SEEN_GSM8K = "Some model families lose up to 13 points on fresh problems of GSM8K's kind (arXiv:2405.00332)."


ALL = (
    Task(
        name="sandbox_json",
        title="Sandbox problems as JSON",
        version=1,
        origin="trl_ext.sandbox, generated; its held-out split",
        headline="valid_and_correct",
        metrics=STRUCTURED_METRICS,
        load=sandbox_json.load,
        grade=grading.sandbox,
        schema=grading.schema_of_sandbox,
        presets=presets.SANDBOX,
        format_metric="json_validity",
        kind="structured",
        generated=True,
    ),
    Task(
        name="gsm_json_synth",
        title="Generated word problems as JSON",
        version=1,
        origin="evals.data.gsm_json_synth, generated; two solvers per question",
        headline="valid_and_correct",
        metrics=STRUCTURED_METRICS,
        load=gsm_json_synth.load,
        grade=grading.word_problem,
        schema=grading.schema_of_word_problems,
        presets={**presets.WORD_PROBLEMS, "offline": presets.OFFLINE},
        format_metric="json_validity",
        kind="structured",
        generated=True,
    ),
    Task(
        name="aime_synth",
        title="Generated competition problems",
        version=1,
        origin="evals.data.aime_synth, generated; two solvers per question",
        headline="accuracy",
        metrics=MATH_METRICS,
        load=aime_synth.load,
        grade=grading.mathematics,
        presets={**presets.AIME, "offline": presets.OFFLINE},
        format_metric="answered",
        kind="math",
        generated=True,
    ),
    Task(
        name="mcq_synth",
        title="Generated calculations with four options",
        version=1,
        origin="evals.data.mcq_synth, generated; two solvers per question; each in four rotations",
        headline="accuracy",
        metrics=CHOICE_METRICS,
        load=mcq_synth.load,
        grade=grading.choice,
        presets={**presets.CHOICE, "offline": presets.OFFLINE_CHOICE},
        format_metric="answered",
        kind="choice",
        generated=True,
        chance=0.25,
    ),
    Task(
        name="schema_synth",
        title="Generated JSON schemas",
        version=1,
        origin="evals.data.schema_synth, generated; each with an instance checked twice",
        headline="valid_and_correct",
        metrics=STRUCTURED_METRICS,
        load=schema_synth.load,
        grade=grading.own_schema,
        schema=grading.schema_in_item,
        presets={**presets.STRUCTURED, "offline": presets.OFFLINE},
        format_metric="json_validity",
        kind="structured",
        generated=True,
    ),
    Task(
        name="aime24",
        title="AIME 2024",
        version=1,
        origin=f"{aime.AIME24.path} on the Hub, split train",
        headline="accuracy",
        metrics=MATH_METRICS,
        load=or_stand_in(functools.partial(aime.load, "aime24", aime.AIME24), "aime_synth"),
        grade=grading.mathematics,
        presets=presets.AIME,
        format_metric="answered",
        kind="math",
        stand_in="aime_synth",
        memorable=SEEN_2024,
    ),
    Task(
        name="aime25",
        title="AIME 2025",
        version=1,
        origin=f"{aime.AIME25.path} on the Hub, split test",
        headline="accuracy",
        metrics=MATH_METRICS,
        load=or_stand_in(functools.partial(aime.load, "aime25", aime.AIME25), "aime_synth"),
        grade=grading.mathematics,
        presets=presets.AIME,
        format_metric="answered",
        kind="math",
        stand_in="aime_synth",
    ),
    Task(
        name="gpqa_diamond",
        title="GPQA-Diamond",
        version=1,
        origin=f"{gpqa.DATA.path} on the Hub (gated), config gpqa_diamond, split train; each in four rotations",
        headline="accuracy",
        metrics=CHOICE_METRICS,
        load=or_stand_in(gpqa.load, "mcq_synth"),
        grade=grading.choice,
        presets=presets.CHOICE,
        format_metric="answered",
        kind="choice",
        gated=True,
        chance=0.25,
        stand_in="mcq_synth",
    ),
    Task(
        name="gsm8k",
        title="GSM8K, answers in prose",
        version=1,
        origin=f"{gsm8k.GSM8K.path} on the Hub, config main, split test",
        headline="accuracy",
        metrics=MATH_METRICS,
        load=or_stand_in(functools.partial(gsm8k.load_prose, "gsm8k", gsm8k.GSM8K), "gsm_json_synth"),
        grade=grading.mathematics,
        presets=presets.WORD_PROBLEMS,
        format_metric="answered",
        kind="math",
        stand_in="gsm_json_synth",
        memorable=SEEN_GSM8K,
    ),
    Task(
        name="gsm8k_json",
        title="GSM8K as JSON",
        version=1,
        origin=f"{gsm8k.GSM8K.path} on the Hub, config main, split test",
        headline="valid_and_correct",
        metrics=STRUCTURED_METRICS,
        load=or_stand_in(functools.partial(gsm8k.load_json, "gsm8k_json", gsm8k.GSM8K), "gsm_json_synth"),
        grade=grading.word_problem,
        schema=grading.schema_of_word_problems,
        presets=presets.WORD_PROBLEMS,
        format_metric="json_validity",
        kind="structured",
        stand_in="gsm_json_synth",
        memorable=SEEN_GSM8K,
    ),
    Task(
        name="gsm8k_json_platinum",
        title="GSM8K-Platinum as JSON",
        version=1,
        origin=f"{gsm8k.PLATINUM.path} on the Hub, config main, split test (wrong labels of GSM8K removed)",
        headline="valid_and_correct",
        metrics=STRUCTURED_METRICS,
        load=or_stand_in(functools.partial(gsm8k.load_json, "gsm8k_json_platinum", gsm8k.PLATINUM), "gsm_json_synth"),
        grade=grading.word_problem,
        schema=grading.schema_of_word_problems,
        presets=presets.WORD_PROBLEMS,
        format_metric="json_validity",
        kind="structured",
        stand_in="gsm_json_synth",
        memorable=SEEN_GSM8K,
    ),
    Task(
        name="structured",
        title="JSONSchemaBench, 300 schemas",
        version=1,
        origin=f"{json_schema_bench.DATA.path} on the Hub, 100 each of {', '.join(json_schema_bench.CONFIGS)}, split test",
        headline="schema_valid",
        metrics=grading.SCHEMA_METRICS,
        load=or_stand_in(json_schema_bench.load, "schema_synth"),
        grade=grading.own_schema,
        schema=grading.schema_in_item,
        presets=presets.STRUCTURED,
        format_metric="json_validity",
        kind="structured",
        stand_in="schema_synth",
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in ALL}
GROUPS: dict[str, tuple[str, ...]] = {
    "offline": tuple(task.name for task in ALL if task.generated),
    "aime": ("aime24", "aime25"),
    "real": ("aime24", "aime25", "gpqa_diamond", "gsm8k_json", "structured"),
    "all": tuple(task.name for task in ALL),
}


def get_tasks(names: Iterable[str]) -> list[Task]:
    """Tasks by their names and by the names of groups, each once, in the order named.

    ValueError that lists every unknown name with what may have been meant.
    """
    known = [*TASKS, *GROUPS]
    names = list(names)
    if not names:
        raise ValueError(f"no task named; there are {', '.join(TASKS)}; groups {', '.join(GROUPS)}")
    unknown = [_unknown(name, known) for name in names if name not in known]
    if unknown:
        raise ValueError("\n".join([*unknown, f"tasks: {', '.join(TASKS)}; groups: {', '.join(GROUPS)}"]))
    wanted = [member for name in names for member in GROUPS.get(name, (name,))]
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"no task or group {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
