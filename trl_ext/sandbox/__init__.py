"""The offline world: a tiny warm-started model, generated tasks, a deterministic annotator, tools and rewards."""

from trl_ext.sandbox.annotator import rule_annotator
from trl_ext.sandbox.cache import ensure_model
from trl_ext.sandbox.calculator import calculator
from trl_ext.sandbox.evaluate import Record, evaluate
from trl_ext.sandbox.rewards import answer_correct, json_valid
from trl_ext.sandbox.tasks import dataset

__all__ = [
    "Record",
    "answer_correct",
    "calculator",
    "dataset",
    "ensure_model",
    "evaluate",
    "json_valid",
    "rule_annotator",
]
