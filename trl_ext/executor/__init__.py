"""Running model-written Python apart from everything else. Off unless a recipe names an executor.

    executor = make_executor("auto")  # or bubblewrap, unshare, container; NoIsolation if none works here
    executor.run(Job("def double(x): return 2 * x", "assert double(2) == 4", "double")).passed

There is no executor without isolation, and none is chosen silently: one that does not pass `probe` is refused.
"""

from trl_ext.executor.base import Executor, Job, Limits, NoIsolation, Outcome
from trl_ext.executor.choice import EXECUTORS, make_executor, probe

__all__ = ["EXECUTORS", "Executor", "Job", "Limits", "NoIsolation", "Outcome", "make_executor", "probe"]
