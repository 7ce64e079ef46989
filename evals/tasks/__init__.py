"""The benchmarks by name: `TASKS`, `GROUPS` and `get_tasks`."""

from evals.tasks.table import GROUPS, TASKS, get_tasks

__all__ = ["GROUPS", "TASKS", "get_tasks"]
