"""The YAML twins of the tasks, for `lm_eval --include_path`: written from the table, `python -m evals.tasks.twins`."""

from __future__ import annotations

from typing import Any

import yaml

from evals.task import Task
from evals.tasks import TASKS
from evals.tasks.lm_eval import config, metric_list, yaml_folder

HEADER = "# Written by `python -m evals.tasks.twins` from evals/tasks/table.py; edit that, not this.\n"


class _Function(str):
    """A name that YAML writes as `!function name`."""


class _Dumper(yaml.SafeDumper):
    """No aliases, and functions by their tag."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def preset_of(task: Task) -> str:
    """`offline` for generated tasks, `full` for real ones."""
    return "offline" if task.generated else "full"


def twin(task: Task) -> str:
    """The YAML text of a task with its preset."""
    sampling = task.presets[preset_of(task)]
    functions = {
        "custom_dataset": _Function("utils.load"),
        "dataset_kwargs": {"benchmark": task.name},
        "doc_to_text": _Function("utils.user_text"),
        "doc_to_target": _Function("utils.gold_text"),
        "process_results": _Function("utils.score_named"),
        "metric_list": metric_list(task, pool=_Function("utils.pooled")),
    }
    fields = config(task, sampling.samples, sampling) | functions
    return HEADER + yaml.dump(fields, Dumper=_Dumper, sort_keys=False, width=120)


def main() -> None:
    """Writes all twins."""
    for task in TASKS.values():
        (yaml_folder() / f"{task.name}.yaml").write_text(twin(task), encoding="utf-8")


if __name__ == "__main__":
    main()
