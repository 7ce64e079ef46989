"""What a person sees of a run: the plan at the start, progress, and at the end a comparison, a picture and the files."""

from trl_ext.report.closing import finish
from trl_ext.report.evaluation import Evaluation, evaluate_sandbox
from trl_ext.report.opening import start
from trl_ext.report.recorder import Recorder, quiet

__all__ = ["Evaluation", "Recorder", "evaluate_sandbox", "finish", "quiet", "start"]
