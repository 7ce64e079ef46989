"""What a recipe may set under `loop: {pasodoble: ...}`, and what that asks of the rest of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_ext.checks import unread
from trl_ext.loops.base import LoopSettings
from trl_ext.method import Setup, param
from trl_ext.plan import PlanError, make_plan

_OWN_ROWS = ("choose_prompts", "edit_prompts", "revise", "keep_rows", "coupled")
"""Hooks that choose, change or regroup the rows of a rollout, which is what the loop does."""


@dataclass(frozen=True)
class PasoDoble(LoopSettings):
    """A Proposer writes questions with answers, a Solver learns to answer them; both are trained by GRPO, without labels.

    The recipe's own keys (`methods`, `rewards`, lengths, group size) are the Solver's. I, the questions of one round, is
    what its rollout holds: per_device_train_batch_size x steps_per_generation / num_generations.
    """

    name: ClassVar[str] = "pasodoble"
    title: ClassVar[str] = "PasoDoble: Better LLM Reasoning via Dual-Play"
    paper: ClassVar[str] = "2511.11881"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)

    schedule: str = param(
        "online",
        "online: both are trained on every round; offline: blocks of Proposer updates, then of Solver rounds",
        source="card: paper",
        choices=("online", "offline"),
    )
    tau_low: float = param(0.2, "pass rate that a valid question must exceed", source="card: paper", ge=0, lt=1)
    p_high: float = param(1.0, "pass rate below which a question trains the Solver", source="card: paper", gt=0, le=1)
    tau_div: float = param(0.3, "diversity that a question must exceed to earn anything", source="card: paper", lt=1)
    diversity_weight: float = param(0.2, "w, the weight of the diversity", source="card: paper", ge=0)
    history_size: int = param(100, "earlier questions that a new one is compared with", source="card: paper", ge=1)
    jaccard: float = param(
        0.8, "similarity of token sets above which two questions count as the same", source="card: paper", ge=0, le=1
    )
    filter: str = param(
        "checked",
        "pass rate that selects the Solver's questions: checked (0 if a gate fails) or raw",
        source="card: decision; official code: raw",
        choices=("checked", "raw"),
    )
    answer_check: str = param(
        "substring",
        "gate `answer in question`: substring, tokens (whole numbers), off",
        source="card: official code; tokens is ours",
        choices=("substring", "tokens", "off"),
    )
    proposer_updates: int = param(
        10, "offline: Proposer updates in a block", source="card: official code (overrides the signature's 30)", ge=1
    )
    solver_rounds: int = param(
        5, "offline: Solver rounds in a block; 0 trains the Proposer alone", source="card: official code", ge=0
    )
    proposal: str = param(
        "blocks",
        "form of a proposal: blocks (<problem>, \\boxed) or json (a question, then the sandbox's reply)",
        source="card: official code; json is ours",
        choices=("blocks", "json"),
    )
    solver_prompt: str = param(
        "{question}", "the Solver's user turn; {question} stands for the question", source="card: official code"
    )
    verifier: str | None = param(
        None, "the reward (0 or 1) whose mean is the pass rate; none: the first", source="card: decision"
    )
    proposer_adapter: str | None = param(
        None,
        "folder of the adapter to start from, or `sandbox`; none: a new one",
        source="card: cold start is optional",
    )
    proposer_length: int | None = param(
        None, "max_completion_length of the Proposer; none: the Solver's", source="card: paper (both 6144)", ge=1
    )
    proposer_methods: dict[str, Any] | None = param(
        None, "methods of the Proposer's trainer, as under `methods`", source="card: decision"
    )

    def check(self, args: Any, rewards: Sequence[str], peft: bool, tools: bool = False) -> list[str]:
        """Problems of these settings with the Solver's GRPOConfig, each with the key that fixes it."""
        rollout, micro_batches = (
            args.per_device_train_batch_size * args.steps_per_generation,
            args.steps_per_generation,
        )
        questions, answers = rollout // args.num_generations, args.num_generations
        split = f"steps_per_generation {micro_batches} must divide the {questions} questions and the {answers} answers"
        rules = {
            "use_peft: set it to true; both players are adapters on one base": not peft,
            "beta: set it to 0; the paper has no KL term, and the players have no common reference": args.beta != 0,
            "num_iterations: set it to 1; every round is played with new answers": args.num_iterations != 1,
            "gradient_accumulation_steps: one round is one step, so set it to steps_per_generation "
            f"({micro_batches})": args.gradient_accumulation_steps != micro_batches,
            f"{split} of a round": bool(questions % micro_batches or answers % micro_batches),
            f"per_device_train_batch_size: a round has {questions} question; a group takes at least 2": questions < 2,
            "max_steps: say how many rounds to play": args.max_steps <= 0,
            "fp16: a skipped round has no gradients, which its scaler refuses; use bf16": args.fp16,
            "use_vllm: its copy of the weights holds one player; set it to false": args.use_vllm,
            "eval_strategy: set it to no; the data set holds the Proposer's prompts, which have no answers": str(
                getattr(args.eval_strategy, "value", args.eval_strategy)
            )
            != "no",
            "runs in one process: start it without accelerate or torchrun": args.world_size > 1,
            "tools: not supported; a question has one turn": tools,
            f"verifier: no reward is called '{self.verifier}' (this recipe has: {', '.join(rewards)})": (
                self.verifier is not None and self.verifier not in rewards
            ),
            "rewards: name the reward that compares with the column `answer`": not rewards,
            "p_high: must be above tau_low": self.p_high <= self.tau_low,
            "solver_prompt: it has no {question}, which stands for the question": "{question}"
            not in self.solver_prompt,
        }
        found = [message for message, wrong in rules.items() if wrong]
        offline = {"schedule: offline": (self.schedule == "offline", ("proposer_updates", "solver_rounds"))}
        return (
            found
            + unread(self, offline)
            + self._methods(args.methods, args, "methods")
            + self._methods(self.proposer_methods, args, "proposer_methods")
        )

    def _methods(self, spec: Any, args: Any, key: str) -> list[str]:
        try:
            plan = make_plan(spec, "grpo", Setup(args))
        except PlanError as error:
            return [] if key == "methods" else [f"{key}: {problem}" for problem in error.problems]
        return [
            f"{key}: {m.name} chooses or regroups the rows of a rollout, which is what this loop does; leave it out"
            for m in plan.using(*_OWN_ROWS)
        ]

    def describe(self, args: Any) -> str:
        """The loop in words, for `trl-ext plan`."""
        answers = args.num_generations
        questions = args.per_device_train_batch_size * args.steps_per_generation // answers
        length = self.proposer_length or args.max_completion_length
        text = (
            f"{self.name} (arXiv {self.paper}), {self.schedule}: a step is a round of {questions} questions x {answers} "
            f"answers; the Proposer writes up to {length} tokens, the Solver {args.max_completion_length}; "
        )
        if self.schedule == "online":
            return f"{text}both learn from every round that is not skipped; two adapters and two optimizers in memory"
        return (
            f"{text}{self.proposer_updates} Proposer updates, then {self.solver_rounds} Solver rounds from the buffer, and "
            "again; two adapters and two optimizers in memory"
        )
