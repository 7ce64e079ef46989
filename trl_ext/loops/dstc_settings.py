"""What a recipe may set under `loop: {dstc: ...}`, and what that asks of the rest of the recipe."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_ext.executor import EXECUTORS, Limits
from trl_ext.executor.choice import AUTO
from trl_ext.loops.base import LoopSettings
from trl_ext.loops.dstc import SELECTIONS
from trl_ext.method import param
from trl_ext.plan import make_plan

OFF = "none"
"""Not `off`, which YAML reads as false."""
_FORM = "Answer with one block fenced by ```python and ```, and nothing else."
CODE_PROMPT = (
    "{prompt}\n\nWrite the Python function `{entry_point}`, with the imports and helpers that it needs, but no example of "
    f"its use. {_FORM}"
)
TEST_PROMPT = (
    "{prompt}\n\nDo not solve this. Write one test for the Python function `{entry_point}` that solves it: a few assert "
    "statements at top level that call `{entry_point}` with plain values and compare the results. Import what the test "
    f"needs, and do not define the function. {_FORM}"
)


@dataclass(frozen=True)
class Dstc(LoopSettings):
    """The model writes codes and tests for each instruction, all are run against each other, and it learns from the pairs.

    Pairs are made once, before training, from the model that training starts with. The data set gives instructions
    (`prompt`) and, unless all get the same, the name of the function that solves each (`entry_point`). What the model wrote is run, and only in a
    sandbox that was tried out: `executor` is off until the recipe names one.

    The card's `dstc_mask_tests` (test tokens out of the log-probability sum) is not here: TRL's DPO and KTO tell prompt
    from completion and nothing finer, and `concat: false` leaves the tests out altogether.
    """

    name: ClassVar[str] = "dstc"
    title: ClassVar[str] = "Direct Preference Learning with Only Self-Generated Tests and Code"
    paper: ClassVar[str] = "2411.13611"
    trainers: ClassVar[tuple[str, ...]] = ("dpo", "kto")
    makes_data: ClassVar[bool] = True

    executor: str = param(
        OFF,
        "what runs model-written code: bubblewrap, unshare, container, or auto, the first that works; none runs nothing",
        source="card: off by default",
        choices=(OFF, AUTO, *EXECUTORS),
    )
    entry_point: str | None = param(
        None, "name that every prompt gives the function; none: the column `entry_point`", source="ours"
    )
    num_codes: int = param(10, "J, codes for each instruction", source="card: recommended", ge=2)
    num_tests: int = param(10, "K, tests for each instruction", source="card: recommended", ge=2)
    concat: bool = param(True, "train on code and test; false: on codes alone", source="card: paper")
    selection: str = param(
        "minimax", "how a pair is chosen", source="card: paper; others are ablations", choices=tuple(SELECTIONS)
    )
    require_gap: bool = param(
        True, "skip a pair whose rejected code passes as many tests as its chosen one", source="card: inferred"
    )
    judging: str = param(
        "separate",
        "separate: code and test in two sandboxes, so that no code can fake a pass; together: as one program",
        source="ours; card: together",
        choices=("separate", "together"),
    )
    exec_timeout_s: float = param(5.0, "wall clock of one run", source="card: recommended", gt=0)
    memory_mb: int = param(512, "memory of one sandbox", source="ours", ge=64)
    at_once: int | None = param(None, "runs at a time; none: one for each processor", source="ours", ge=1)
    temperature: float = param(1.0, "of the samples", source="card: 0.8 to 1.0 recommended", gt=0)
    top_p: float = param(1.0, "of the samples", source="ours", gt=0, le=1)
    max_completion_length: int = param(512, "tokens of a code, and of a test", source="ours", ge=1)
    generation_batch_size: int = param(80, "replies sampled at once", source="ours", ge=1)
    vllm_server_base_url: str | None = param(
        None, "sample from TRL's vLLM server there (`trl vllm-serve`) in place of transformers", source="ours"
    )
    code_prompt: str = param(CODE_PROMPT, "asks for a code; {prompt} and {entry_point} are put in", source="ours")
    test_prompt: str = param(TEST_PROMPT, "asks for a test of the same function", source="card: same entry point")
    train_prompt: str = param(
        "{prompt}",
        "what the pair is a completion of; {prompt} is put in, and {entry_point} where the prompts do not name it",
        source="card: prompt = x, which asks for no particular form",
    )

    @property
    def limits(self) -> Limits:
        """Bounds of one run."""
        return Limits(wall_s=self.exec_timeout_s, cpu_s=max(1, round(self.exec_timeout_s)), memory_mb=self.memory_mb)

    @property
    def backend(self) -> str:
        """What samples; the replies depend on it."""
        return "transformers" if self.vllm_server_base_url is None else "vllm"

    def check_begun(self, recipe: Any, model: str, data: Any) -> None:
        """The loop's settings that decide the pairs, the seed, the model, the rows and max_length. DataError for
        rows that it cannot use."""
        from trl_ext.loops.dstc_data import check_begun  # here, since it loads the samplers

        args = recipe.training_args
        check_begun(data.train, self, args.output_dir, args.seed, model, args.max_length)

    def check(self, args: Any, rewards: Sequence[str], peft: bool, tools: bool = False) -> list[str]:
        """Problems of these settings with the trainer's configuration, each with the key that fixes it."""
        evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        rules = {
            "executor: model-written code is run, which is off by default; name bubblewrap, unshare or container, or auto": (
                self.executor == OFF
            ),
            f"entry_point: {self.entry_point!r} is no name of a function": not (
                self.entry_point or "f"
            ).isidentifier(),
            f"rewards: tests are the judges here; remove {', '.join(rewards)}": bool(rewards),
            "eval_strategy: set it to no; the data set holds instructions, not pairs": evaluates,
            "runs in one process: start it without accelerate or torchrun": args.world_size > 1,
        }
        found = [message for message, wrong in rules.items() if wrong] + _column_problems(args)
        both = ("prompt", "entry_point")
        for key, needed in {"code_prompt": both, "test_prompt": both, "train_prompt": ("prompt",)}.items():
            found += [f"{key}: {problem}" for problem in _template_problems(getattr(self, key), needed)]
        return found

    def describe(self, args: Any) -> str:
        """The loop in words, for `trl-ext plan`."""
        kto = hasattr(args, "desirable_weight")
        return (
            f"{self.name} (arXiv {self.paper}): before training, {self.num_codes} codes and {self.num_tests} tests are sampled "
            f"for each instruction and run against each other ({self.executor}, {self.judging}, {self.exec_timeout_s:g} s "
            f"each); {self.selection} makes {'two labelled rows' if kto else 'one pair'} of "
            f"{'code and test' if self.concat else 'codes'}, or skips the instruction"
        )


def _column_problems(args: Any) -> list[str]:
    """Methods that read a column which the pairs made here do not have."""
    plan = make_plan(getattr(args, "methods", None), "kto" if hasattr(args, "desirable_weight") else "dpo")
    return [
        f"methods: {method.name} reads the column {' and '.join(columns)}, which the pairs made here do not have; take a "
        "variant of it that reads none, or remove it"
        for method in plan.methods
        if (columns := method.pair_columns())
    ]


def _template_problems(template: str, needed: Sequence[str]) -> list[str]:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        return [f"{error}; write {{{{ and }}}} for literal braces"]
    missing = [name for name in needed if name not in fields]
    return [f"it has no {{{name}}}" for name in missing] + [
        f"unknown field {{{name}}} (it has: {{prompt}}, {{entry_point}})"
        for name in fields - {"prompt", "entry_point"}
    ]
