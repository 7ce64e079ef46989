"""A run that must end in a rollout leaves a checkpoint of its last optimizer step, from which `--resume` goes on exactly.

A reward that fails, or an endpoint that is down, is found in a rollout, when things that a checkpoint holds have moved on:
random number generators, the state of methods and of reward functions, the place in the generation window. The weights have
not, up to the step's end. So the rest is remembered at the end of each step, and put back before the checkpoint is written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.annotate.base import AnnotatorError
from trl_ext.base import MethodTrainer
from trl_ext.checkpoints import CheckpointError
from trl_ext.method import Method, Unavailable
from trl_ext.randomness import generator_states, restore_generators
from trl_ext.rewards import stateful
from trl_ext.rewards.checked import RewardError

STOPS = (RewardError, Unavailable, AnnotatorError)
"""What ends a run through no fault of its own; it is raised on all processes, or on none."""
LARGE = 2**26
"""Bytes of a tensor from which on it is not copied."""
_PLAIN = frozenset({int, float, str, bool, type(None)})


class Overwritten(RuntimeError):
    """A large tensor was written to since it was remembered."""


@dataclass(frozen=True)
class Large:
    """A tensor that is not copied, and torch's count of the times it was written to."""

    tensor: Tensor
    writes: int


def remembered(value: Any) -> Any:
    """A copy of a method's state: containers, numbers, text and tensors. Tensors of `LARGE` bytes are not copied: most
    methods replace theirs, and those which write into them do so in the loss."""
    if isinstance(value, Tensor):
        large = value.nbytes >= LARGE
        return Large(value, value._version) if large else value.detach().clone()
    # A pool has a mapping for each row of the data, so what is plain costs no call
    if type(value) is dict:
        return {key: v if type(v) in _PLAIN else remembered(v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(v if type(v) in _PLAIN else remembered(v) for v in value)
    return copy.deepcopy(value)


def recalled(value: Any) -> Any:
    """What `remembered` was given, as it was then. Raises Overwritten."""
    if isinstance(value, Large):
        if value.tensor._version != value.writes:
            raise Overwritten
        return value.tensor
    if type(value) is dict:
        return {key: recalled(v) for key, v in value.items()}
    return type(value)(map(recalled, value)) if type(value) in (list, tuple) else value


def put_back(methods: Sequence[Method], states: Mapping[str, Any]) -> None:
    """The state of each method as it was `remembered`, by its name. Raises Overwritten, and then changes none."""
    found = {name: recalled(state) for name, state in states.items()}
    for method in methods:
        method.state.clear()
        method.state.update(found[method.name])


@dataclass(frozen=True)
class LastStep:
    """What moves between the end of `step` and the next one of the things that its checkpoint holds. `more`: a
    subclass's own."""

    step: int
    methods: dict[str, Any]
    rewards: Any
    tokens: int
    flops: float
    generators: dict[str, Any]
    micro_batch: int
    buffer: Any
    more: Any = None


class KeepsLastStep(MethodTrainer):
    """Mixin in front of all others of the GRPO trainer."""

    _last_step: LastStep | None = None
    _missed_evaluation: bool = False

    # Set by TRL's trainer
    _buffered_inputs: Any
    _step: int
    current_flos: float
    is_deepspeed_enabled: bool
    num_iterations: int
    reward_funcs: list[Any]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's train. What ends it in a rollout (`STOPS`) leaves a checkpoint of the last step, if there was one."""
        self._last_step = None
        return super().train(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        try:
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        except STOPS as error:
            if self.model.training:
                self._save_last_step(error)
            raise

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """TRL's end of a step, and of an epoch. An evaluation that fails is made up for by the run that resumes."""
        self._missed_evaluation = False
        if self.control.should_evaluate:
            self._last_step = self._as_it_is()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        except STOPS as error:
            self._missed_evaluation = True
            self._save_last_step(error)
            raise
        self._last_step = self._as_it_is()

    def _as_it_is(self) -> LastStep:
        inside = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return LastStep(
            step=self.state.global_step,
            methods={method.name: remembered(method.state) for method in self.plan.methods},
            rewards=remembered(stateful.states_of(self.reward_funcs)),
            tokens=self.state.num_input_tokens_seen,
            flops=self.current_flos,
            generators=generator_states(self.accelerator.device),
            micro_batch=self._step,
            buffer=self._buffered_inputs if inside else None,
        )

    def _save_last_step(self, error: Exception) -> None:
        """Before the first step there is nothing to save; a run that resumed and made none has what it came from."""
        last = self._last_step
        if last is None or last.step != self.state.global_step:
            return
        if self._step != last.micro_batch and self.is_deepspeed_enabled:
            return  # its engine counts the micro-batches of a step on its own
        try:
            self._put_back(last)
            self._save_checkpoint(self.model, None)
        except Overwritten:
            return  # in the middle of a step
        except CheckpointError as problem:
            error.add_note(str(problem))

    def _put_back(self, last: LastStep) -> None:
        rewards = recalled(last.rewards)
        put_back(self.plan.methods, last.methods)
        stateful.load_states(self.reward_funcs, rewards)
        self.state.num_input_tokens_seen = last.tokens
        self.current_flos = last.flops
        restore_generators(last.generators, self.accelerator.device)
        self._step, self._buffered_inputs = last.micro_batch, last.buffer

    # The evaluation that a checkpoint missed, at the place where it would have been: before the next step draws anything

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        self._make_up()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if 0 < self.state.max_steps <= self.state.global_step:
            self._load_rng_state(kwargs["resume_from_checkpoint"])
        super()._run_epoch(*args, **kwargs)

    def _make_up(self) -> None:
        if self._missed_evaluation:
            self.control.should_log = self.control.should_save = False
            self.control.should_evaluate = True
            none = torch.zeros((), device=self.accelerator.device)
            self._maybe_log_save_evaluate(none, None, self.model, None, self.state.epoch, None, 0.0)
