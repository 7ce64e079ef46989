"""The contract between a paper and the trainers: what a method declares, what its hooks receive and return.

A method is a frozen dataclass. Its fields are the paper's hyperparameters (`param` keeps the documentation, the source
of the default and the bounds beside each), the hooks that it overrides are what the paper changes, and `state` is all
that must survive a restart. A hook receives values and returns values: it never mutates its input, never sees the
trainer, the accelerator or another method, and never synchronises the device (`.item()`) in the loss.

Letters: P prompts, G completions per prompt, B micro-batch rows, T completion tokens, V vocabulary, H hidden,
F reward functions, L prompt tokens, N chosen positions. "rows" are this process's completions of one rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trl_ext.forward import Features

TEACHER = "teacher"
"""A snapshot of the trained weights that `sync_teacher` refreshes."""
REFERENCE = "reference"
"""The model at the start of training: adapter off under PEFT, TRL's `ref_model`, or a copy of the first weights.

A `PeftModel` that is passed in trains on: its reference is the adapter as it came, not the bare base."""
POLICY = "policy"
"""The current weights, as `other(POLICY, ...)` runs them without gradient. Needs nothing."""
HIDDEN = "hidden"
"""The last hidden states of the policy, captured in the forward that runs anyway."""
ENTROPY_AT_ROLLOUT = "entropy_at_rollout"
"""One more forward without gradient per rollout, for the entropies of the generation batch."""
HIDE_PROMPT = "hide_prompt"
"""Forwards without gradient per rollout in which part of the prompt is hidden."""
REF_LOGPS = "ref_logps"
"""Reference log-probabilities of the sampled tokens: TRL's when `beta` is not zero, else one forward per rollout."""
FROZEN = "frozen"
"""Another frozen model in memory, for `reference_logps`; `frozen_models` names it."""
GRADIENT_NOISE = "gradient_noise"
"""Squared norms of the micro-batches' own gradients, for `observe_gradients`: a copy of the accumulated gradient."""
NEEDS = {TEACHER, REFERENCE, HIDDEN, ENTROPY_AT_ROLLOUT, HIDE_PROMPT, REF_LOGPS, FROZEN, GRADIENT_NOISE}


def param(
    default: Any,
    doc: str,
    *,
    source: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A hyperparameter: a dataclass field with its meaning, the source of its default, and its allowed values.

    Args:
        default: The vetted setting; a list or a mapping is copied for each instance.
        doc: One line for `trl-ext methods NAME`.
        source: Where the default comes from ("card: paper table 3", "card: inferred").
        ge, gt, le, lt: Bounds for numbers; None is never compared.
        choices: The allowed values.
    """
    metadata = {"doc": doc, "source": source, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Metrics:
    """Weighted means that are added up on the device and reduced over ranks once, when the trainer logs.

    `mean(name, value, weight)` adds sum(value * weight) to a numerator and sum(weight) to a denominator, both detached;
    the logged value is their quotient over all micro-batches and ranks since the last log. A zero denominator logs
    nothing rather than a fake zero.
    """

    def __init__(self, totals: dict[str, Tensor] | None = None, prefix: str = "") -> None:
        self.totals: dict[str, Tensor] = {} if totals is None else totals  # name -> [numerator, denominator]
        self.prefix = prefix

    def under(self, name: str) -> Metrics:
        """The same store; names get the prefix `name/`."""
        return Metrics(self.totals, f"{name}/")

    def mean(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Adds `value` (any shape) with `weight` (a scalar, or of the same shape)."""
        value = torch.as_tensor(value, dtype=torch.float32).detach()
        weight = torch.as_tensor(weight, dtype=torch.float32, device=value.device).detach().expand_as(value)
        counted = torch.where(weight == 0, 0.0, value * weight)  # what does not count may be NaN
        total = torch.stack([counted.sum(), weight.sum()])
        key = self.prefix + name
        self.totals[key] = total.to(self.totals[key].device) + self.totals[key] if key in self.totals else total


@dataclass(frozen=True)
class Setup:
    """What is known when a plan is checked. None means "not known yet": the config alone knows less than the trainer.

    `images`: whether the model takes images. `methods`: all names in order of application, `built`: the methods
    themselves; both are filled in by the plan. `group_rewards`: rewards that compare the completions of a prompt, and how
    many they need at least.
    """

    args: Any
    reward_names: Sequence[str] | None = None
    engine: str | None = None
    images: bool | None = None
    methods: Sequence[str] = ()
    built: Sequence[Method] = ()
    group_rewards: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunShape:
    """How a run is cut: `max_steps` optimizer steps, and rollouts that serve `steps_per_rollout` of them.

    Below 1, several rollouts make one optimizer step. `num_generations` is G.
    """

    max_steps: int
    num_generations: int
    steps_per_rollout: float


@dataclass(frozen=True)
class Group:
    """All completions of one rollout on all processes, in whole groups.

    `rewards` (P, G, F) float32, NaN where a function returned None, as `shape_rewards` left them (in that hook: as the
    functions gave them); `outcomes` (P, G, F): as the functions gave them, and of the completions without help where
    `revise` replaced some by such with help; `reward_weights` (F,); `advantages` (P, G); `lengths` (P, G) completion
    tokens; `truncated` (P, G) bool; `tool_calls`, `tool_turns` (P, G): how many tools a completion called, and in how
    many turns; `questions` (P,) int64: the same number for the same prompt, in every epoch and on every machine;
    `reward_names` (F); `step` optimizer steps done so far, of `run.max_steps`.
    `drawn` (P,) rows of the training set, or numbers of `Chosen` ones, if a `choose_prompts` chose them; `discarded_drawn` (D,) and
    `discarded_rewards` (D, G, F): the same of groups that `revise` replaced or made in vain; `measured`: this method's `measure`, (P, G)
    each; `seed` the run's.
    """

    rewards: Tensor
    advantages: Tensor
    lengths: Tensor
    truncated: Tensor
    reward_names: Sequence[str]
    step: int
    run: RunShape
    metrics: Metrics
    reward_weights: Tensor
    seed: int
    outcomes: Tensor = None  # type: ignore[assignment]
    drawn: Tensor | None = None
    discarded_drawn: Tensor | None = None
    discarded_rewards: Tensor | None = None
    tool_calls: Tensor = torch.zeros(0, 0)
    tool_turns: Tensor = torch.zeros(0, 0)
    questions: Tensor = torch.zeros(0, dtype=torch.long)
    measured: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcomes is None:
            object.__setattr__(self, "outcomes", self.rewards)

    @property
    def total(self) -> Tensor:
        """(P, G): the weighted sum of the rewards, as TRL sums them; NaN counts as nothing."""
        return self.reward_of(self.rewards, None)

    @property
    def unscored(self) -> Tensor:
        """(P, G) bool: completions that no reward function scored, which TRL leaves out."""
        return self.rewards.isnan().all(-1)

    def reward(self, name: str | None) -> Tensor:
        """(P, G): the reward called `name`, 0 where it is NaN; None: `total`. ValueError for an unknown name."""
        return self.reward_of(self.rewards, name)

    def reward_of(self, rewards: Tensor, name: str | None) -> Tensor:
        """The same for other `rewards` (..., F), such as those of discarded groups."""
        return one_reward(rewards, name, self.reward_names, self.reward_weights)

    def for_method(self, name: str) -> Group:
        """The same data as one method sees it: what it measured without prefix, its own metric names."""
        own = own_values(self.measured, name)
        return dataclasses.replace(self, metrics=self.metrics.under(name), measured=own)


def one_reward(rewards: Tensor, name: str | None, names: Sequence[str], weights: Tensor) -> Tensor:
    """(..., F) -> (...): the reward called `name`, or the weighted sum of all for None. ValueError: unknown name."""
    if name is None:
        return (rewards * weights).nansum(-1)
    if name not in names:
        raise ValueError(f"no reward is called '{name}'; this run has: {', '.join(names)}")
    return rewards[..., list(names).index(name)].nan_to_num()


def own_values(values: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those that `name` put there, without its prefix."""
    prefix = f"{name}/"
    return {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}


class Unavailable(RuntimeError):
    """Something outside of the run is missing, such as an endpoint that is down: no fault of the run's own.

    Raised in a rollout, on all processes alike, it makes the trainer keep a checkpoint of the last step, with all state as
    it was then (`trl_ext.last_step`).
    """


@dataclass(frozen=True)
class Chosen:
    """Rows that a method made or found itself, and the numbers (count,) by which `Group.drawn` names them."""

    rows: Sequence[dict[str, Any]]
    numbers: Tensor


def _call(make: Callable[[], Any]) -> Any:
    return make()


@dataclass(frozen=True)
class Draw:
    """What the next rollout asks for: `count` different rows of a training set of `size`, for all processes together.

    Every process asks and must get the same answer. `row(i)` is row i of the set. `seed` is the run's, `step` optimizer
    steps done so far, `folder` the run's. `on_main(make)` runs a function on the main process alone and gives what it
    returned, or raised, to all of them: for what is asked of the outside or written to a file.
    """

    count: int
    size: int
    seed: int
    step: int
    metrics: Metrics
    row: Callable[[int], dict[str, Any]]
    folder: str = "."
    on_main: Callable[[Callable[[], Any]], Any] = _call

    def for_method(self, name: str) -> Draw:
        """The same data; metrics get the method's name as prefix."""
        return dataclasses.replace(self, metrics=self.metrics.under(name))


@dataclass(frozen=True)
class Samples:
    """Completions that `Attempt.sample` made: `ids` (n,) by which a revision names them, `rewards` (n, F), and `lengths`
    (n,), the tokens that the model generated (no tool output)."""

    ids: Sequence[int]
    rewards: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Attempt:
    """A scored rollout before anything is trained on: whole, and the same on all processes.

    `rows` (P,): the training row of each prompt; `rewards` (P, G, F) as the functions gave them, or as an earlier
    `revise` left them.

    Services, which every process must call alike: `sample(rows)` makes and scores one more completion for each of these
    rows, whose "prompt" is shown to the model; `fresh(n, number)` gives n rows of the training set, drawn by the method
    that draws prompts or else uniformly from the run's seed and `number` (declare `Method.asks_fresh`).
    `prompt_tokens(row)` counts its prompt.
    """

    rows: Sequence[Mapping[str, Any]]
    rewards: Tensor
    reward_names: Sequence[str]
    reward_weights: Tensor
    step: int
    run: RunShape
    seed: int
    metrics: Metrics
    sample: Callable[[Sequence[Mapping[str, Any]]], Samples]
    fresh: Callable[[int, int], list[dict[str, Any]]]
    prompt_tokens: Callable[[Mapping[str, Any]], int]

    def reward(self, name: str | None, rewards: Tensor | None = None) -> Tensor:
        """(..., F) -> (...) of `rewards`, or of the rollout: the reward called `name`, or the weighted sum for None."""
        found = self.rewards if rewards is None else rewards
        return one_reward(found, name, self.reward_names, self.reward_weights)

    def for_method(self, name: str) -> Attempt:
        """The same data; metrics get the method's name as prefix."""
        return dataclasses.replace(self, metrics=self.metrics.under(name))


@dataclass(frozen=True)
class Revision:
    """Completions of a rollout to replace: (prompt, place in the group) -> id of a sample.

    A group whose G places are all replaced has changed its prompt. `helped`: the samples had help, so TRL's reward
    metrics keep describing the rollout as it was. `own_prompt`: the places that take a sample's completion alone, which
    is then scored and trained under the prompt that stood there. `unused`: the ids of whole groups (n, G) that were made
    of `Attempt.fresh` rows and not taken, for those who count what was drawn (`Group.discarded_drawn`).
    """

    swaps: Mapping[tuple[int, int], int]
    helped: bool = False
    own_prompt: frozenset[tuple[int, int]] = frozenset()
    unused: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class StepRows:
    """Rows whose losses depend on one another, in whole groups, with log-probs under the weights that the loss will see.

    They are those of one micro-batch, if it holds whole groups; else those of the coming optimizer step (of one rollout,
    where several rollouts make a step); else of the rollout on all processes. `mask` (rows, T) loss tokens.

    Services: `drift()` (rows, T) is log pi_theta - log pi_old of the sampled tokens without gradient, and
    `logps()` (rows, T) is log pi_theta: both cost a forward unless the weights or the micro-batch give it away (`drift`
    is zero as long as the weights are those that sampled); `ref_logps` (rows, T) or None; `streams`: this method's, for
    these rows. `by_group(values)` (rows,) -> (P, G) whole groups, `own(values)` (P, G) -> (rows,) back.
    """

    mask: Tensor
    drift: Callable[[], Tensor]
    logps: Callable[[], Tensor]
    ref_logps: Tensor | None
    streams: Mapping[str, Tensor]
    by_group: Callable[[Tensor], Tensor]
    own: Callable[[Tensor], Tensor]
    step: int
    run: RunShape
    metrics: Metrics

    def for_method(self, name: str) -> StepRows:
        """The same data as one method sees it: its own streams without prefix, its own metric names."""
        return dataclasses.replace(self, streams=own_values(self.streams, name), metrics=self.metrics.under(name))


@dataclass(frozen=True)
class GradientNoise:
    """How far the micro-batch gradients of one optimizer step agree, before clipping.

    `mean_square`: mean of ||g_k||^2 over the micro-batches; `square_of_mean`: ||mean of g_k||^2; `samples` M
    micro-batches over all processes. `step` optimizer steps done so far.
    """

    mean_square: float
    square_of_mean: float
    samples: int
    step: int
    metrics: Metrics

    def for_method(self, name: str) -> GradientNoise:
        """The same data; metrics get the method's name as prefix."""
        return dataclasses.replace(self, metrics=self.metrics.under(name))


@dataclass(frozen=True)
class Rollout:
    """This process's completions right after scoring, and the services that a hook may call (all without gradient).

    `rows`: the data set row behind each completion; `prompts`: what was shown to the model (messages or text);
    `completions`: the decoded text; `completion_ids`, `mask` (rows, T), right padded; `rewards` (rows, F);
    `advantages` (rows,). `prompt_ids`, `prompt_mask` (rows, L), left padded; `images` (rows, L) bool: the prompt tokens
    that stand for an image or a video.

    Services: `decode_one(id)` is the text of one token, `decode(ids)` of several, both without special tokens;
    `encode_prompts(prompts)` applies the chat template;
    `generate(prompts, max_new_tokens)` answers greedily with the current policy, thinking off;
    `entropies()` (rows, T) of the current policy at the sampling temperature (declare `ENTROPY_AT_ROLLOUT`);
    `gather(values)` joins (n,) values of all processes (n may differ) and tells which slice is this process's;
    `other(which, rows)` runs `POLICY`, `TEACHER` or `REFERENCE` on these rows, `micro_batch` of which fit at once;
    `ref_logps()` (rows, T) of the sampled tokens under the reference (declare `REF_LOGPS`); `old_logps` (rows, T) under
    the current policy or None, as TRL made them; `sampled`: what this method's `sampled` returned, (rows, ...) each, or
    nothing where TRL made no such forward;
    `blind_logps(hide)` (rows, T) of the sampled tokens under the current policy when nothing attends to the prompt
    tokens that `hide` (rows, L) marks, which keep their positions; `other(which, rows, hide=...)` does the same for
    (R, L) (declare `HIDE_PROMPT`).
    """

    rows: Sequence[Mapping[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[str]
    completion_ids: Tensor
    mask: Tensor
    rewards: Tensor
    advantages: Tensor
    reward_names: Sequence[str]
    step: int
    run: RunShape
    pad_token_id: int
    metrics: Metrics
    decode_one: Callable[[int], str]
    encode_prompts: Callable[[Sequence[Any]], list[list[int]]]
    generate: Callable[[Sequence[Any], int], list[str]]
    entropies: Callable[[], Tensor]
    gather: Callable[[Tensor], tuple[Tensor, slice]]
    other: Callable[..., Features]
    micro_batch: int
    prompt_ids: Tensor
    prompt_mask: Tensor
    images: Tensor
    decode: Callable[[Sequence[int]], str]
    blind_logps: Callable[[Tensor], Tensor]
    ref_logps: Callable[[], Tensor]
    old_logps: Tensor | None
    sampled: Mapping[str, Tensor]

    def for_method(self, name: str) -> Rollout:
        """The same data as one method sees it: its own `sampled` without prefix, its own metric names."""
        return dataclasses.replace(self, metrics=self.metrics.under(name), sampled=own_values(self.sampled, name))


@dataclass(frozen=True)
class OptimizerStep:
    """The optimizer step that this loss leads to: `learning_rate` and the `betas`, `eps` of its first parameter group.

    `betas` and `eps` are None with an optimizer that has none of them.
    """

    learning_rate: float
    betas: tuple[float, float] | None
    eps: float | None


@dataclass(frozen=True)
class LossInput:
    """One micro-batch inside the loss, after the one forward.

    `completion_ids`, `mask` (B, T): `mask` is 1 on tokens that TRL trains on (no padding, no tool output).
    `logps` (B, T) with gradient, `entropy` (B, T) of the distribution at each position at the sampling temperature,
    with gradient; both 0 where masked by padding. `advantages` (B,) as TRL made them. A stage sees what the stages
    before it made, of all methods whatever their order: from `loss_mask` on `advantages` are those that
    `token_advantages` left, (B,) or (B, T), from `token_weights` on `mask` is the one that `loss_mask` left, and in
    `surrogate` the weights are in `advantages`. `aux_loss` and `observe_loss` see the original mask and advantages.
    `old_logps`, `ref_logps` (B, T) or None. `streams`: what this method's `streams` returned for these rows. `step`: optimizer steps done so far.
    `optimizer`: learning rate and moments' decay of the coming step. `first_pass`: whether these rows are seen for the
    first time (`num_iterations` passes over each rollout). `row_scale` turns a mean over the B rows into one over the
    rows that `keep_rows` kept; 1 where nothing was dropped. `distill_weights` (B,): what a method's own distillation
    loss multiplies each row's term with; None is all ones.

    Services: `policy` holds hidden states and head of the forward (declare `HIDDEN`); `other(which, rows, prompt_ids,
    prompt_mask)` runs `TEACHER` or `REFERENCE` without gradient on chosen rows, with another prompt if given (the rows'
    images stay, so it must hold their tokens);
    `aggregate(per_token)` reduces (B, T) to a scalar with the denominators of TRL's `loss_type` over `mask`;
    `gather(values)` joins (n,) values of all processes and tells which slice is this process's. `scratch` is the
    method's own, for values that one of its hooks leaves for a later one on the same micro-batch.
    """

    completion_ids: Tensor
    mask: Tensor
    logps: Tensor
    entropy: Tensor
    advantages: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    streams: Mapping[str, Tensor]
    step: int
    run: RunShape
    first_pass: bool
    row_scale: float
    optimizer: OptimizerStep
    loss_type: str
    metrics: Metrics
    policy: Features | None
    other: Callable[..., Features]
    aggregate: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], tuple[Tensor, slice]]
    scratch: dict[str, Any]
    distill_weights: Tensor | None = None

    def for_method(self, name: str) -> LossInput:
        """The same data as one method sees it: its own streams without prefix, its own metric names."""
        own, scratch = own_values(self.streams, name), self.scratch.setdefault(name, {})
        return dataclasses.replace(self, streams=own, metrics=self.metrics.under(name), scratch=scratch)


@dataclass(frozen=True)
class PairInput:
    """One micro-batch of preference pairs inside the DPO loss, after the policy's and the reference's forward.

    `logps`, `ref_logps` (2B, S) per-token log-probabilities of the sequence shifted by one, chosen rows first, 0 outside
    the completion; `ref_logps` is None with `precompute_ref_log_probs`. `mask` (2B, S). `chosen`, `rejected`,
    `ref_chosen`, `ref_rejected` (B,) sequence sums as TRL forms them (`ld_alpha` included). `beta` as in TRL.
    `columns`: name -> (B,), the numbers of the data set that the plan's methods asked for (`pair_columns`).
    """

    logps: Tensor
    ref_logps: Tensor | None
    mask: Tensor
    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    beta: float
    step: int
    metrics: Metrics
    policy: Features | None
    gather: Callable[[Tensor], tuple[Tensor, slice]]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    training: bool = True
    scratch: dict[str, Any] = field(default_factory=dict)

    def for_method(self, name: str) -> PairInput:
        """The same data; metrics get the method's name as prefix."""
        scratch = self.scratch.setdefault(name, {})
        return dataclasses.replace(self, metrics=self.metrics.under(name), scratch=scratch)


@dataclass(frozen=True)
class ReferenceInput:
    """One micro-batch of preference pairs after the reference's forward: in the loss, or ahead of it when precomputed.

    `mask` (2B, S) bool: tokens of the completions, chosen rows first. `training`: False in evaluation, and ahead of
    training, where nothing is logged.

    Services: `other(path)` (2B, S): log-probs of the same tokens under the frozen model or adapter in `path`, one of
    `frozen_models`, 0 where `mask` is 0.
    """

    mask: Tensor
    training: bool
    metrics: Metrics
    other: Callable[[str], Tensor]

    def for_method(self, name: str) -> ReferenceInput:
        """The same data; metrics get the method's name as prefix."""
        return dataclasses.replace(self, metrics=self.metrics.under(name))


@dataclass(frozen=True)
class LabelInput:
    """One micro-batch of labelled completions inside the KTO loss, after the policy's and the reference's forward.

    `logps` (B,) with gradient and `ref_logps` (B,): log-probabilities of the completions, summed over their tokens.
    `label` (B,) bool: thumbs up. `beta` as in TRL. `training`: False in evaluation, which must not move any state.
    `scratch` is the method's own, for what `label_loss` leaves for `observe_labels`.

    Services: `gather(values)` joins (n,) values of all processes and tells which slice is this process's;
    `embed_prompts(rows, encoder)`: (n,) indices of rows -> (n, E), the mean of the last hidden states over each prompt
    under the reference (declare `REFERENCE`), or under the sentence encoder in the folder or repository `encoder`, one
    of `sentence_encoders`. Only of rows with `has_prompt` (B,) bool: an empty prompt has no mean.
    """

    logps: Tensor
    ref_logps: Tensor
    label: Tensor
    beta: float
    step: int
    training: bool
    metrics: Metrics
    gather: Callable[[Tensor], tuple[Tensor, slice]]
    embed_prompts: Callable[[Tensor, str | None], Tensor]
    has_prompt: Tensor
    scratch: dict[str, Any] = field(default_factory=dict)

    def for_method(self, name: str) -> LabelInput:
        """The same data; metrics get the method's name as prefix."""
        scratch = self.scratch.setdefault(name, {})
        return dataclasses.replace(self, metrics=self.metrics.under(name), scratch=scratch)


@dataclass(frozen=True)
class LabelSet:
    """The training set of the KTO trainer before its first loss: `label` (N,) bool on the CPU, `has_prompt` (N,) bool
    whether the prompt has a token, and the run's `seed`.

    `embed_prompts(indices, encoder)`: (n,) rows of the set -> (n, E) on the CPU, the same on all processes, which share
    the work; see `LabelInput`.
    """

    label: Tensor
    has_prompt: Tensor
    seed: int
    embed_prompts: Callable[[Tensor, str | None], Tensor]


@dataclass(frozen=True)
class Method:
    """Base of all methods. Every hook here is neutral: it returns its input unchanged, or nothing.

    A hook that returns the very object that it received costs nothing and keeps TRL's path bit for bit, so a method at
    its neutral setting should do that. Hooks run in training only. Evaluation is plain TRL, but for what makes
    `eval_loss`: `reference_logps`, `pair_loss` and `label_loss`. It never changes `state`.
    """

    name: ClassVar[str]
    """The card's name: key under `methods:` in a recipe."""
    title: ClassVar[str]
    """The paper's title."""
    paper: ClassVar[str]
    """arXiv id."""
    trainer: ClassVar[str] = "grpo"
    """Which trainer runs it: "grpo", "dpo" or "kto"."""
    also_in: ClassVar[tuple[str, ...]] = ()
    """Other trainers that run it too, each through the hooks of its own kind of data."""
    owns: ClassVar[tuple[str, ...]] = ()
    """Exclusive slots ("teacher", "surrogate", "baseline", ...); two owners of one slot are refused."""
    conflicts: ClassVar[Mapping[str, str]] = {}
    """Other method -> why the two do not go together and which flag resolves it; shown to the user."""

    column_ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Column of `pair_columns` -> lowest and highest number that it may hold; without an entry any finite one."""

    headline: ClassVar[tuple[str, ...]] = ()
    """The metrics to show first while training, without the method's name."""

    state: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What a checkpoint must hold: tensors, numbers and text. Changed in `start_training`, `start_labels`, `choose_prompts`,
    `revise` and the `observe` hooks only."""

    # What a method declares

    @property
    def idle(self) -> frozenset[str]:
        """Hooks of this class that do nothing with these settings: they are not called, nor listed in the plan."""
        return frozenset()

    def needs(self) -> frozenset[str]:
        """What the trainer must compute for these settings, of `NEEDS`; it costs time or memory."""
        return frozenset()

    @property
    def asks_fresh(self) -> bool:
        """Whether `revise` asks for `Attempt.fresh` rows with these settings; such a method is refused with a stream."""
        return False

    def check(self, setup: Setup) -> list[str]:
        """Problems with these settings in this setup, each with the flags that fix it. Called before the model loads."""
        return []

    def cost(self) -> str:
        """One line for `trl-ext plan`: what it adds to a step in time and memory."""
        return "no extra forward"

    def state_problem(self, state: Mapping[str, Any]) -> str | None:
        """Why a checkpoint's `state` of this method does not go on with these settings, with what to set; None: it does.

        Called before training resumes, which is then refused.
        """
        return None

    def start_training(self) -> None:
        """A call of `train` begins at step 0, or at a checkpoint's step, whose state comes after this.

        The place to let go of what `state` holds of an optimizer step.
        """

    def summary(self, decode_one: Callable[[int], str]) -> list[str]:
        """Lines for the report at the end of a run, from `state`; `decode_one(id)` is the text of a token."""
        return []

    # Rollout

    def choose_prompts(self, draw: Draw) -> Tensor | list[dict[str, Any]] | Chosen | None:
        """(count,) different rows of the training set for the next rollout, in place of the data loader's. Own "sampler".

        A list, or `Chosen`, holds the rows themselves, of wherever they come from. None leaves the loader's. Epochs are counted as if
        the loader's rows had been used.
        """
        return None

    def edit_prompts(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Data set rows -> rows of the same length and order, before generation. Return copies of changed rows."""
        return rows

    def revise(self, attempt: Attempt) -> Revision | None:
        """Replaces completions, or whole groups, before rewards are shaped and old log-probs computed; chained.

        The place for second attempts: hints, resampling, fresh prompts. May change `state`.
        """
        return None

    def shape_rewards(self, rewards: Tensor, group: Group) -> Tensor:
        """(P, G, F) -> (P, G, F), before TRL forms advantages; chained. `group.advantages` is not known yet (zeros)."""
        return rewards

    def measure(self, rollout: Rollout) -> dict[str, Tensor]:
        """Values (rows,) that `group_advantages` and `observe` need in whole groups, as `group.measured` (P, G)."""
        return {}

    def group_advantages(self, advantages: Tensor, group: Group) -> Tensor:
        """(P, G) -> (P, G), after TRL's normalisation; chained."""
        return advantages

    def streams(self, rollout: Rollout) -> dict[str, Tensor]:
        """Values per row that the loss needs later: tensors whose first dimension is rows. They survive TRL's shuffle."""
        return {}

    def keep_rows(self, rollout: Rollout) -> Tensor | None:
        """(rows,) bool of this process: rows to train on; None keeps all; several methods keep what all of them keep.

        Dropped rows leave the batch before the forward of the loss, and the denominators of `loss_type` count what is
        left. To keep shapes equal over processes and micro-batches some stay in as fillers without loss tokens.
        """
        return None

    def sampled(self, policy: Features, completion_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Values of some rows (b, T) under the weights that sampled them, without gradient; they join the streams.

        Called block by block in the forward for the old log-probs, and only if TRL makes one. It does when a rollout
        outlives its weights (and with vLLM's correction); if not, the loss's own forward has these weights (`HIDDEN`).
        """
        return {}

    def observe(self, group: Group) -> None:
        """End of a rollout: the place to change `state` from values of all ranks."""

    # Loss

    def coupled(self, rows: StepRows) -> dict[str, Tensor]:
        """Values (rows,) that depend on other rows of the same group under the current weights; they join the streams.

        The two-pass form of a loss over groups: here g_k = dL/ds_k from whole groups, in the loss sum_k g_k s_k.
        """
        return {}

    def token_advantages(self, advantages: Tensor, x: LossInput) -> Tensor:
        """(B,) or (B, T) -> the same or (B, T); chained."""
        return advantages

    def loss_mask(self, mask: Tensor, x: LossInput) -> Tensor:
        """(B, T) -> (B, T): a dropped token leaves the policy term, the KL term **and** the denominators; chained."""
        return mask

    def token_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        """(B, T), first all ones -> (B, T): scales the policy term alone, denominators stay; chained."""
        return weights

    def surrogate(self, x: LossInput) -> Tensor | None:
        """Replaces TRL's policy term: per-token (B, T), aggregated as `loss_type` says, or a scalar. Own "surrogate"."""
        return None

    def distill_weights(self, weights: Tensor, x: LossInput) -> Tensor:
        """(B,), first all ones -> (B,): scales every row's distillation loss (of whatever method has one); chained."""
        return weights

    def aux_loss(self, x: LossInput) -> Tensor | None:
        """A scalar with its own denominator that is added to the loss; None adds nothing. Mean over the micro-batch:
        the trainer divides by the accumulation steps."""
        return None

    def observe_loss(self, x: LossInput) -> None:
        """End of the loss of a micro-batch: the place to change `state`, from values reduced with `x.gather`."""

    # Step

    def kl_coef(self, beta: float, step: int) -> float:
        """TRL's `beta` -> the coefficient of the reference KL in this step; chained. With 0 TRL logs no `kl`."""
        return beta

    def sync_teacher(self, step: int, run: RunShape) -> bool:
        """Whether the `TEACHER` snapshot is refreshed before optimizer step `step` (0, 1, ...). Own "teacher"."""
        return False

    def observe_gradients(self, noise: GradientNoise) -> None:
        """After the last backward of an optimizer step (declare `GRADIENT_NOISE`): the place to change `state`.

        Not called where one step has a single gradient, which tells nothing about noise.
        """

    def learning_rate(self, lr: float, step: int) -> float:
        """The scheduler's rate -> the rate of this step, for every parameter group alike; chained. Own "learning rate"."""
        return lr

    # Preference pairs (DPO)

    def pair_columns(self) -> tuple[str, ...]:
        """Names of the data set's columns, one number for each pair, that `PairInput.columns` must hold.

        `column_ranges` bounds them.
        """
        return ()

    def frozen_models(self) -> tuple[str, ...]:
        """Folders or Hub names of models, or folders of adapters, that `reference_logps` asks for (declare `FROZEN`)."""
        return ()

    def reference_logps(self, logps: Tensor, x: ReferenceInput) -> Tensor:
        """(2B, S) log-probs of TRL's reference -> those that every loss sees as the reference's, TRL's own too; chained.

        Without gradient; in evaluation as well. With `precompute_ref_log_probs` it runs once for each pair, before
        training.
        """
        return logps

    def pair_loss(self, x: PairInput) -> Tensor | None:
        """(B,) loss per pair under the method's own name in `loss_type`; weighted by `loss_weights` as TRL's are."""
        return None

    def pair_aux_loss(self, x: PairInput) -> Tensor | None:
        """A scalar that is added to the loss; None adds nothing."""
        return None

    def observe_pairs(self, x: PairInput) -> None:
        """End of the loss of a micro-batch of pairs: the place to change `state`."""

    # Labelled completions (KTO)

    def sentence_encoders(self) -> tuple[str, ...]:
        """Folders or Hub names of the encoders that `embed_prompts` is asked for; loaded with the trainer."""
        return ()

    def start_labels(self, data: LabelSet) -> None:
        """Once before the first loss of training, after a checkpoint was read: the place to fit something to the data.

        May change `state`; what a checkpoint brought back should stay.
        """

    def label_loss(self, x: LabelInput) -> Tensor | None:
        """(B,) loss per completion that replaces TRL's when `loss_type` names the method; TRL's weights of the two
        classes multiply it. Called in evaluation too."""
        return None

    def observe_labels(self, x: LabelInput) -> None:
        """End of the loss of a micro-batch of labelled completions: the place to change `state`."""


def overrides(method: Method, hook: str) -> bool:
    """Whether `method` changes `hook`: its class defines it, and its settings do not leave it idle."""
    return getattr(type(method), hook) is not getattr(Method, hook) and hook not in method.idle
