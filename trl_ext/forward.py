"""What the trainers compute for methods beyond TRL's log-probs: hidden states, full distributions, other weights.

TRL's forward never builds logits. A hook on the backbone keeps the last hidden states of that same forward, and a
full distribution is projected only where a method asks for it. Teacher and reference are other values of the trained
weights, put in place for one forward without gradient: with LoRA that is a second adapter which never enters PEFT's
registry, so it is neither saved nor published with the run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from trl.trainer.utils import use_adapter

from trl_ext.batch import replaced

LOGITS_BUDGET = 2**25
"""Entries of one (positions, V) block of float32 logits: 128 MiB. More positions are done in blocks."""
CPU_BUDGET = 6 * 2**20
"""The same on a CPU where no gradient is needed: 24 MiB. glibc takes every tensor of 32 MiB or more afresh from the
system; below that DGPO's distances take 0.6 (V = 151,936) to 0.8 (V = 8,192) of the time (measured)."""


@dataclass(frozen=True)
class Head:
    """The output projection as TRL's fused head applies it: scale, soft cap, then the sampling temperature.

    `weight` (V, H), `bias` (V) or None. With `fp32` the projection runs in float32, outside autocast.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    scale: float
    fp32: bool

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) float32: log softmax of `logits`. Build it for chosen positions only."""
        return torch.log_softmax(self.logits(hidden), dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) float32: logits / temperature, with the scalings of the model's config."""
        if self.fp32:
            with torch.autocast(hidden.device.type, enabled=False):
                bias = None if self.bias is None else self.bias.float()
                logits = nn.functional.linear(hidden.float(), self.weight.float(), bias)
        else:
            logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        # A block is large, and every copy of it counts: a scaling by one is left out.
        logits = logits if self.scale == 1 else logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1 else logits / self.temperature


@dataclass(frozen=True)
class Features:
    """Hidden states (rows, T, H) that predict each completion token, and the head that goes with them."""

    hidden: Tensor
    head: Head

    def at(self, positions: Tensor) -> Tensor:
        """`positions` (rows, T) bool -> (N, H), row by row."""
        return self.hidden[positions]

    def log_probs_at(self, positions: Tensor) -> Tensor:
        """`positions` (rows, T) bool -> (N, V) log-probabilities at the sampling temperature."""
        return self.head.log_probs(self.at(positions))


def positions_at_once(head: Head, budget: int | None = None) -> int:
    """Positions in a block of `budget` logits that needs no gradient, at least 1; None: what suits the head's device."""
    if budget is None:
        budget = CPU_BUDGET if head.weight.device.type == "cpu" else LOGITS_BUDGET
    return max(1, budget // head.weight.size(0))


def head_of(model: nn.Module, temperature: float, fp32: bool, detach: bool = False) -> Head:
    """The head of a causal model (PEFT's wrapper taken off) with the scalings that its text config declares.

    `detach` takes the weights as they are now: without gradient, and unchanged when a snapshot leaves its place.
    """
    base: Any = base_model(model)
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if detach:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return Head(weight, bias, temperature, getattr(config, "final_logit_softcapping", None), _scale(config), fp32)


def _scale(config: Any) -> float:
    """Multiplier of the logits; models name it differently, and some state its inverse (TRL.md section 3)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def base_model(model: nn.Module) -> nn.Module:
    """The causal model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]


@contextlib.contextmanager
def captured_hidden(model: nn.Module, completion_length: int, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Keeps the last hidden states of every forward of `model` inside the block, with their gradient, if `wanted`.

    Each entry is (rows, T, H): position t is the state that predicts completion token t.
    """
    seen: list[Tensor] = []
    with watched_hidden(model, completion_length, seen.append) if wanted else contextlib.nullcontext():
        yield seen


@contextlib.contextmanager
def watched_hidden(model: nn.Module, completion_length: int, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `see` with the hidden states (rows, T, H) of every forward inside the block, as soon as they are there."""

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        see(output.last_hidden_state[:, :-1][:, -completion_length:])

    backbone: Any = base_model(model).base_model
    handle = backbone.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def per_position(
    fn: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    student: tuple[Head, Tensor],
    teacher: tuple[Head, Tensor],
    budget: int = LOGITS_BUDGET,
) -> tuple[Tensor, ...]:
    """Applies `fn(log_p (n, V), log_q (n, V)) -> tuple of (n,)` to N positions in blocks of at most `budget` entries.

    `student` and `teacher` are (head, hidden (N, H)). With more than one block the (n, V) tensors are rebuilt in the
    backward pass, so memory is that of one block whatever N is; the price is one more projection.
    """
    (head_p, hidden_p), (head_q, hidden_q) = student, teacher
    size = max(1, budget // head_p.weight.size(0))

    def block(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return fn(head_p.log_probs(p), head_q.log_probs(q))

    blocks = list(zip(hidden_p.split(size), hidden_q.split(size), strict=True))
    if len(blocks) == 1:
        return block(*blocks[0])
    parts = [checkpoint(block, p, q, use_reentrant=False) for p, q in blocks]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@torch.no_grad()
def per_position_detached(
    fn: Callable[..., Tensor], sides: Sequence[tuple[Head, Tensor]], *values: Tensor, budget: int | None = None
) -> Tensor:
    """Applies `fn(*log_probs, *values) -> (n, ...)` to N positions in blocks, without gradient: (N, ...).

    `sides` are (head, hidden (N, H)), of which `fn` gets log-probs (n, V) in their order, at most `budget` entries
    each (`positions_at_once`); `values` (N,) come along with their positions. One projection for each side, and memory of one block.
    """
    size = positions_at_once(sides[0][0], budget)
    hidden = zip(*(states.split(size) for _, states in sides), strict=True)
    rest = zip(*(value.split(size) for value in values), strict=True) if values else itertools.repeat(())
    parts = []
    for states, own in zip(hidden, rest, strict=False):
        log_probs = [head.log_probs(block) for (head, _), block in zip(sides, states, strict=True)]
        parts.append(fn(*log_probs, *own))
    return torch.cat(parts)


class Snapshot:
    """A copy of the trained weights that can stand in for them: teacher, or the reference of full fine-tuning.

    Memory: the size of the trained parameters (with LoRA: the adapter). Parameters are looked up by name at each use,
    since loading an adapter or preparing a model may replace them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[str, Tensor] = {}
        self.refresh()

    def _params(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the current weights into the snapshot."""
        self.values = {name: p.detach().clone() for name, p in self._params().items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the snapshot's values inside the block. Only for forwards without gradient."""
        params = self._params()
        current = {name: p.data for name, p in params.items()}
        try:
            for name, param in params.items():
                param.data = self.values[name]
            yield
        finally:
            for name, param in params.items():
                param.data = current[name]

    def load(self, values: dict[str, Tensor]) -> None:
        """Takes over saved values; ValueError when they belong to other parameters."""
        params = self._params()
        if set(values) != set(params):
            odd = sorted(set(values) ^ set(params))
            raise ValueError(f"the saved teacher holds other weights than this model trains: {', '.join(odd[:5])}")
        self.values = {name: value.to(params[name].device) for name, value in values.items()}


@contextlib.contextmanager
def weights_of(which: str, model: nn.Module, snapshot: Snapshot | None) -> Iterator[None]:
    """Puts teacher or reference weights in place: the snapshot if there is one, else PEFT's reference adapter or none."""
    if snapshot is not None:
        with snapshot.in_place():
            yield
    elif which == "reference" and is_peft_model(model):
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):  # type: ignore[arg-type, operator]
            yield
    else:
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no checkpointing inside the block; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def generated(model: nn.Module, **asked: Any) -> Tensor:
    """`model.generate(**asked)`: token ids (rows, prompt and completion), by what is asked and transformers' defaults.

    `generate` fills every field that is not named from the model's own generation config, as its checkpoint brings it
    (typical_p, repetition_penalty, num_beams, suppress_tokens, ...); here it finds an empty one. Name the end tokens.
    """
    with replaced(base_model(model), generation_config=GenerationConfig()):
        return model.generate(**asked)  # type: ignore[operator]


@contextlib.contextmanager
def undisturbed(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode and a seeded generator; mode and generators are given back as they were."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)
