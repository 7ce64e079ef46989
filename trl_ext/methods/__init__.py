"""The table of methods. Nothing registers itself: a paper is here or it does not exist."""

from trl_ext.method import Method
from trl_ext.methods.grpo.high_entropy import HighEntropy
from trl_ext.methods.grpo.trace import Trace

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (HighEntropy, Trace)}
