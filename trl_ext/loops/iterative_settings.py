"""What a recipe may set under `loop: {iterative: ...}`, and what that asks of the rest of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_ext.checks import unread
from trl_ext.loops.base import LoopSettings
from trl_ext.loops.pairs import Rubric
from trl_ext.loops.scorers import make_scorer, spec_of
from trl_ext.method import param

_KTO_ONLY, _DPO_ONLY = ("label_threshold",), ("pairs", "min_positive_score", "margin", "student_margin")
_RUBRIC_ONLY = ("min_positive_score", "margin", "student_margin")


@dataclass(frozen=True)
class Iterative(LoopSettings):
    """Rounds of sample, score, build pairs (or labels), train: each round's reference is the policy that it began with.

    The recipe's own keys (`methods`, `loss_type`, steps, batch) are those of every round's training. `max_steps` or
    `num_train_epochs` count one round. The data set gives prompts; every round takes new ones.
    """

    name: ClassVar[str] = "iterative"
    title: ClassVar[str] = (
        "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences"
    )
    paper: ClassVar[str] = "2404.03715"
    trainers: ClassVar[tuple[str, ...]] = ("dpo", "kto")
    makes_data: ClassVar[bool] = True
    in_rounds: ClassVar[bool] = True

    rounds: int = param(3, "T, rounds", source="card: paper", ge=1)
    prompts_per_round: int | None = param(
        None, "prompts of a round, none of which comes twice; none: an equal share of the data", source="ours", ge=1
    )
    eval_prompts: int = param(
        100, "prompts held out of all rounds, on which iterates are compared", source="card: validation data", ge=1
    )
    eval_samples: int = param(2, "replies to each held-out prompt", source="ours", ge=1)
    keep: str = param(
        "best",
        "the iterate that is saved: best (highest win rate over the start, on held-out prompts) or last",
        source="card: paper (algorithm 2)",
        choices=("best", "last"),
    )
    num_samples: int = param(5, "K, replies that the policy samples to each prompt", source="card: paper", ge=1)
    teacher_column: str | None = param(
        None,
        "column with another model's reply, which joins the K samples; a row with null has none",
        source="card: paper (y_gold, optional)",
    )
    temperature: float = param(0.7, "of the samples", source="card: paper", gt=0)
    top_p: float = param(0.95, "of the samples", source="card: paper", gt=0, le=1)
    max_completion_length: int = param(512, "tokens of a sample", source="ours", ge=1)
    generation_batch_size: int = param(64, "replies sampled at once", source="ours", ge=1)
    vllm_server_base_url: str | None = param(
        None, "sample from TRL's vLLM server there (`trl vllm-serve`) in place of transformers", source="ours"
    )
    scorer: dict[str, Any] | str = param(
        "verifier",
        "who judges: verifier (the recipe's rewards), or {ensemble: {...}}, {judge: {...}}",
        source="card: P is a judge, a verifier or a pair model",
    )
    reward_weights: list[float] | None = param(None, "of the verifier's rewards; none: theirs, or 1", source="ours")
    repeat_share: float | None = param(
        0.2,
        "a sample whose most frequent 4-gram covers more loses against all; none: off",
        source="card: decision",
        gt=0,
        le=1,
    )
    pairs: str = param(
        "rubric",
        "dpo: rubric (large margins, by scores), all (every two with different win rates) or best_worst",
        source="card: paper",
        choices=("rubric", "all", "best_worst"),
    )
    min_positive_score: float = param(5.0, "rubric: least score of a chosen reply", source="card: paper (5 of 6)")
    margin: float = param(2.0, "rubric: least gap below a teacher's reply", source="card: paper", gt=0)
    student_margin: float = param(1.0, "rubric: least gap below the policy's own sample", source="card: paper", gt=0)
    label_threshold: float | None = param(
        None, "kto: score from which a reply is desirable", source="card kto_iterative: recommended, task success"
    )
    replay: float | None = param(
        None,
        "dpo: share of the new pairs that may come from round t-1, half of it from t-2, ...; kto: share of the result. "
        "none: 0.3 for dpo, 0 for kto",
        source="card: paper (dpo); card kto_iterative: recommended (kto)",
        ge=0,
        lt=1,
    )
    learning_rate_factor: float = param(
        1.0, "learning rate of a round over that of the one before", source="card: lower in later rounds", gt=0, le=1
    )
    nesterov: dict[str, Any] | None = param(
        None,
        "{alpha, mode: weights, skip_first}: rounds begin with new + alpha (new - previous) weights, with skip_first: true "
        "not before round 3 (arXiv 2410.06293)",
        source="card nesterov: off, or alpha 0.3; skip_first false",
    )

    @property
    def alpha(self) -> float:
        """Momentum of the anchors; 0 is plain iteration."""
        return 0.0 if self.nesterov is None else float(self.nesterov.get("alpha", 0.3))

    @property
    def first_anchor(self) -> int:
        """The round whose end has the first anchor."""
        return 2 if self.nesterov is not None and self.nesterov.get("skip_first") else 1

    @property
    def rubric(self) -> Rubric:
        """The filter of `pairs: rubric`."""
        return Rubric(self.min_positive_score, self.margin, self.student_margin)

    def replay_of(self, trainer: str) -> float:
        """The share that is replayed."""
        return (0.3 if trainer == "dpo" else 0.0) if self.replay is None else self.replay

    def check_begun(self, recipe: Any, model: str, data: Any) -> None:
        """All settings that decide the rounds, the model and the rows."""
        from trl_ext.loops.iterative import check_begun  # here, since it loads the trainers

        check_begun(recipe, model, data)

    def check(self, args: Any, rewards: Sequence[str], peft: bool, tools: bool = False) -> list[str]:
        """Problems of these settings with the trainer's configuration, each with the key that fixes it."""
        kto = hasattr(args, "desirable_weight")
        evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        rules = {
            "label_threshold: kto needs the score from which a reply is desirable": kto
            and self.label_threshold is None,
            "eval_strategy: set it to no; every round is judged on its held-out prompts": evaluates,
            "runs in one process: start it without accelerate or torchrun": args.world_size > 1,
            "sync_ref_model moves the reference inside a round; set it to false": getattr(
                args, "sync_ref_model", False
            ),
            "num_samples: one reply alone makes no pair; take 2 or more, or a teacher_column": not kto
            and self.num_samples < 2
            and self.teacher_column is None,
            "methods: nesterov has one fixed previous policy; set nesterov: {alpha: ...} of this loop, whose anchor moves": (
                "nesterov" in (getattr(args, "methods", None) or {})
            ),
            "save_only_model: a round that is resumed needs the optimizer; set it to false": args.save_only_model,
        }
        found = [message for message, wrong in rules.items() if wrong]
        parts = {"trainer: kto": (kto, _KTO_ONLY), "trainer: dpo": (not kto, _DPO_ONLY)}
        parts |= {} if kto else {"pairs: rubric": (self.pairs == "rubric", _RUBRIC_ONLY)}
        return found + unread(self, parts) + self._scorer(rewards, kto) + self._nesterov()

    def _scorer(self, rewards: Sequence[str], kto: bool) -> list[str]:
        """The scorer can be made, has what it needs, and reads what is set."""
        try:
            name, _ = spec_of(self.scorer)
            scorer = make_scorer(self.scorer, [_stand_in] * len(rewards), self.reward_weights, ".")
        except ValueError as error:
            return [f"scorer: {error}"]
        weights = self.reward_weights
        rules = {
            f"rewards: the judge does not read them; remove {', '.join(rewards)}": name == "judge" and bool(rewards),
            f"reward_weights: the {name} does not read them; remove them": name != "verifier" and weights is not None,
            f"reward_weights: {len(weights or [])} weights for {len(rewards)} rewards ({', '.join(rewards)})": (
                name == "verifier" and weights is not None and len(weights) != len(rewards)
            ),
            "pairs: rubric takes scores, and this judge only compares; set pairs to all or best_worst, or the judge's "
            "mode to rubric": not scorer.scores and not kto and self.pairs == "rubric",
            "scorer: kto labels by scores, and this judge only compares; set its mode to rubric": kto
            and not scorer.scores,
        }
        return [message for message, wrong in rules.items() if wrong]

    def _nesterov(self) -> list[str]:
        given = self.nesterov or {}
        unknown = [key for key in given if key not in ("alpha", "mode", "skip_first")]
        alpha, mode, skip = given.get("alpha", 0.3), given.get("mode", "weights"), given.get("skip_first", False)
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        rules = {
            f"nesterov: unknown setting '{next(iter(unknown), '')}' (it has: alpha, mode, skip_first)": bool(unknown),
            f"nesterov: skip_first {skip!r} must be true or false": not isinstance(skip, bool),
            f"nesterov: skip_first has no effect in {self.rounds} rounds, as nothing follows the second; take 3 or more, or "
            "leave it out": skip is True and self.rounds < 3,
            f"nesterov: alpha {alpha} must be in [0, 1)": not number or not 0 <= alpha < 1,
            f"nesterov: mode {mode!r}: between rounds weights are extrapolated; set mode: weights": mode != "weights",
        }
        return [message for message, wrong in rules.items() if wrong]

    def describe(self, args: Any) -> str:
        """The loop in words, for `trl-ext plan`."""
        kto = hasattr(args, "desirable_weight")
        name, _ = spec_of(self.scorer)
        size = (
            "an equal share of the prompts" if self.prompts_per_round is None else f"{self.prompts_per_round} prompts"
        )
        teacher = f" and the reply in column {self.teacher_column}" if self.teacher_column else ""
        learned = f"labels, desirable from {self.label_threshold:g}" if kto else f"pairs ({self.pairs})"
        anchor = f"; rounds begin with weights extrapolated by {self.alpha:g}" if self.alpha else ""
        return (
            f"{self.name} (arXiv {self.paper}): {self.rounds} rounds; each samples {self.num_samples} replies{teacher} to "
            f"{size}, scores them ({name}), builds {learned}, replays {self.replay_of('kto' if kto else 'dpo'):g}, and trains "
            f"against the policy that it began with{anchor}. {self.eval_prompts} prompts are held out; the {self.keep} "
            "iterate is saved. The schedule is that of one round"
        )


def _stand_in(**kwargs: Any) -> list[float]:
    """In place of a reward whose name alone is known."""
    raise NotImplementedError
