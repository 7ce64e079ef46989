"""Weights made from weights: an adapter merged into its base, and an anchor pushed past the last weights.

Merging adds the adapter's change to the base: W + s B A for LoRA with scaling s = alpha / r (alpha / sqrt(r) for rslora),
and what PEFT computes for the other kinds. It is done in float32 and rounded once, to the precision of the file.

Extrapolation takes merged weights only: the mean, or any combination, of two LoRA pairs is not the pair of the means,

    (B1 + B2) (A1 + A2) = B1 A1 + B2 A2 + B1 A2 + B2 A1,

and even equal products B A can have factors of opposite sign, whose mean is zero.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor
from trl.trainer.utils import create_model_from_path

from trl_ext import saved
from trl_ext.sandbox.cache import model_folder

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {"float32": saved.TOLERANCE, "float16": 0.05, "bfloat16": 0.3}
"""Largest difference of a log-probability, in nats, that rounding merged weights to this precision may make. They keep
24, 11 and 8 bits; all else is compared in float32 within `saved.TOLERANCE`."""
ADAPTER_NAMES = ("base_model.model.", "lora_", "hada_", "lokr_", "vera_", "oft_", "ia3_")
"""Parts of the names of tensors that belong to PEFT's adapters."""
NOTED = 0.1
"""A rounding that moves the probe by more than this share of what the adapter does is worth a warning."""
PROBE = [{"role": "user", "content": "A train leaves at 9:40 and arrives at 12:15. How long does the journey take?"}]


class MergeError(RuntimeError):
    """Weights that cannot be merged or extrapolated; the message says what to do."""


# Extrapolation


def extrapolated(new: Mapping[str, Tensor], previous: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """State dict of the anchor: new + alpha (new - previous), elementwise, for every float tensor.

    In float32 (float64 stays), then rounded to the precision of `new`. What is not float comes from `new`. Tensors that
    share memory in `new` (tied embeddings) are computed once and share it again. `alpha` 0 is a copy of `new`, bit for
    bit. The arguments are not changed.

    Raises MergeError for `alpha` outside [0, 1), for names or shapes that differ, for LoRA matrices and for quantized
    weights, which have no sum.
    """
    check_alpha(alpha)
    _check_alike(new, previous)
    made: dict[tuple[Any, ...], Tensor] = {}
    result = {}
    for name, value in new.items():
        key = _memory(name, value)
        if key not in made:
            made[key] = _pushed(value.detach(), previous[name].detach(), alpha)
        result[name] = made[key]
    return result


def anchor_distance(new: Mapping[str, Tensor], previous: Mapping[str, Tensor], alpha: float) -> float:
    """Norm of alpha (new - previous) over all float tensors, tied ones counted once."""
    _check_alike(new, previous)
    own = {_memory(name, value): name for name, value in new.items() if value.is_floating_point()}
    total = 0.0
    for name in own.values():  # one tensor at a time: all differences together are as large as the model
        difference = new[name].float() - previous[name].to(new[name].device).float()
        total += float(difference.square_().sum(dtype=torch.float64))
    return alpha * math.sqrt(total)


def check_alpha(alpha: float) -> None:
    """MergeError unless 0 <= alpha < 1."""
    if not 0 <= alpha < 1:
        raise MergeError(
            f"alpha {alpha} is outside [0, 1): at 1 the steps of an iterated extrapolation no longer shrink"
        )


def _pushed(value: Tensor, before: Tensor, alpha: float) -> Tensor:
    if alpha == 0 or not value.is_floating_point():
        return value.clone()
    wide = torch.promote_types(value.dtype, torch.float32)
    now, then = value.to(wide), before.to(value.device, wide)
    # What did not move stays: an infinite entry of a mask has no difference.
    return torch.where(now == then, now, now + alpha * (now - then)).to(value.dtype)


def _memory(name: str, value: Tensor) -> tuple[Any, ...]:
    """The same for tensors that are the same memory."""
    if value.numel() == 0:
        return (name,)
    return (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())


def _check_alike(new: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> None:
    if odd := sorted(set(new) ^ set(previous)):
        where = [f"{name} ({'new' if name in new else 'previous'} only)" for name in odd[:5]]
        raise MergeError(f"new and previous weights have different names: {', '.join(where)}, {len(odd)} in all")
    if odd := [name for name in new if new[name].shape != previous[name].shape]:
        shapes = f"{tuple(new[odd[0]].shape)} and {tuple(previous[odd[0]].shape)}"
        raise MergeError(f"new and previous weights have different shapes: {odd[0]} {shapes}, {len(odd)} in all")
    if odd := [name for name in new if any(part in name for part in ADAPTER_NAMES)]:
        raise MergeError(
            f"{odd[0]} is part of an adapter: combining factors such as A and B one by one is not combining B A; merge the "
            "adapter first (`trl-ext merge`)"
        )
    if odd := [name for name in new if new[name].dtype in (torch.uint8, torch.int8)]:
        raise MergeError(f"{odd[0]} holds quantized weights, which have no sum; load the model in 16 or 32 bits")


# Adapters


@dataclass(frozen=True)
class Merged:
    """What came out: where, of what, and largest differences of the log-probabilities of a probe, in nats.

    `moved`: base against base plus adapter; `merging`: base plus adapter against the merged weights, in float32;
    `rounding`: the former against the weights as the file holds them; `stored`: those against the file, loaded again.
    """

    folder: str
    base: str
    adapters: tuple[str, ...]
    precision: str
    moved: float
    merging: float
    rounding: float
    stored: float

    def text(self) -> str:
        """Lines for people."""
        lines = [
            f"Merged {' + '.join(self.adapters)} into {self.base}: {self.folder} ({self.precision})",
            "Largest differences of a log-probability on a probe, in nats:",
            f"  the adapter moves the base by      {self.moved:.3g}",
            f"  merged against base plus adapter   {self.merging:.3g} (allowed: {saved.TOLERANCE})",
            f"  rounded to {self.precision:<8}                {self.rounding:.3g} (allowed: {ROUNDING[self.precision]})",
            f"  loaded again from the folder       {self.stored:.3g} (allowed: {saved.TOLERANCE})",
        ]
        if self.moved == 0:
            lines.append("Warning: the adapter changes nothing on the probe; is it the one that was trained?")
        elif self.rounding > NOTED * self.moved:
            lines.append(
                f"Warning: rounding to {self.precision} undoes a good part of what the adapter does: its changes are small "
                "beside the last bit of the weights; --dtype float32 keeps them"
            )
        return "\n".join(lines)


def merge_adapter(
    adapter: str | Sequence[str], out: str, base: str | nn.Module | None = None, precision: str | None = None
) -> Merged:
    """Writes `base` with the `adapter` (or the sum of several) merged in to the new folder `out`, and checks it.

    `base` is a folder, a Hub name or a loaded model, which is used up; None takes the one that the adapter names. An
    adapter that was trained on a base in 4 bits is merged into the weights that were rounded for it. `precision` is a
    key of `PRECISIONS`; None keeps that of the base. All is computed in float32 on the base's device: 4 bytes per weight.

    Raises MergeError when it cannot be done, SavedModelError when the result is not base plus adapter; `out` is then
    not there.
    """
    adapters = (adapter,) if isinstance(adapter, str) else tuple(adapter)
    named = {str(_adapter_config(folder).base_model_name_or_path) for folder in adapters}
    if base is None and len(named) > 1:
        raise MergeError(f"the adapters name different bases ({', '.join(sorted(named))}); say which: --base")
    source = base if base is not None else named.pop()
    if precision is not None and precision not in PRECISIONS:
        raise MergeError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise MergeError(f"{out} is already there; name another folder, or remove it")
    model, own = _base_in_float32(source)
    tokenizer = _tokenizer([*adapters, model.config._name_or_path])
    ids = saved.probe_ids(tokenizer, PROBE if tokenizer.chat_template else PROBE[0]["content"])
    held = [model]
    del model
    return _merge(held, adapters, tokenizer, ids, out, precision or own)


def _merge(
    held: list[Any], adapters: tuple[str, ...], tokenizer: Any, ids: Tensor, out: str, precision: str
) -> Merged:
    """`held`: the base alone, taken out, so that nobody else keeps it when the file is loaded again."""
    model = held.pop()
    name, dtype = str(model.config._name_or_path), PRECISIONS[precision]
    before = saved.log_probs(model, ids)
    adapted = _with_adapters(model, adapters)
    expected = saved.log_probs(adapted, ids)
    merged = adapted.merge_and_unload(safe_merge=True, adapter_names=list(map(str, range(len(adapters)))))
    whole = saved.log_probs(merged, ids)
    _round(merged, dtype, torch.float32)
    rounded = saved.log_probs(merged, ids)
    _round(merged, dtype, dtype)
    merged.config.dtype = dtype
    part = f"{out.rstrip(os.sep)}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        merged.save_pretrained(part)
        tokenizer.save_pretrained(part)
        del adapted, merged, model  # room for the second model
        stored = saved.log_probs(create_model_from_path(part, dtype="float32", device_map=None), ids)
        _check(expected, whole, saved.TOLERANCE, "merging changed what base plus adapter computes")
        _check(whole, rounded, ROUNDING[precision], f"rounding to {precision} changed the merged model; take float32")
        _check(rounded, stored, saved.TOLERANCE, "the saved weights are not those that were merged")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    pairs = ((before, expected), (expected, whole), (whole, rounded), (rounded, stored))
    return Merged(out, name, adapters, precision, *(_largest(first, second) for first, second in pairs))


def _with_adapters(model: nn.Module, adapters: Sequence[str]) -> Any:
    """`model` with every adapter active, under the names "0", "1", ..."""
    adapted: Any = None
    try:
        for i, folder in enumerate(adapters):
            if adapted is None:
                adapted = PeftModel.from_pretrained(model, folder, adapter_name=str(i))
            else:
                adapted.load_adapter(folder, adapter_name=str(i))
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.peft_config["0"].peft_type.value
            raise MergeError(f"PEFT cannot merge an adapter of type {kind}: it is no change of weights")
        if len(adapters) > 1:
            adapted.base_model.set_adapter([str(i) for i in range(len(adapters))])
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MergeError):
            raise
        raise MergeError(f"the adapter does not fit {model.config._name_or_path}: {error}") from error  # type: ignore[union-attr]
    return adapted


def _base_in_float32(base: str | nn.Module) -> tuple[Any, str]:
    """The loaded model in float32, and the name of the precision that it had."""
    if isinstance(base, str):
        base = model_folder(base)
        try:
            config = AutoConfig.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise MergeError(f"cannot read the base model '{base}' (name another with --base): {error}") from error
    else:
        config = base.config
    text = config.get_text_config()  # type: ignore[union-attr]
    if getattr(config, "quantization_config", None) is not None or getattr(base, "is_quantized", False):
        raise MergeError(
            f"the weights of '{base if isinstance(base, str) else config._name_or_path}' are quantized: merging would "
            "add the adapter to rounded weights and round again, which loses part of both. Merge into the 16- or 32-bit "
            "model that they were made from: --base (an adapter that was trained on 4 bits fits it)"
        )
    own = str(getattr(config, "dtype", None) or text.dtype or "float32").removeprefix("torch.")
    model = create_model_from_path(base, dtype="float32", device_map=None) if isinstance(base, str) else base.float()
    return model, own if own in PRECISIONS else "float32"


def _adapter_config(folder: str) -> PeftConfig:
    path = Path(folder)
    if path.is_dir() and not (path / "adapter_config.json").exists():
        nearby = sorted(str(found.parent) for found in path.glob("*/adapter_config.json"))
        if nearby:
            raise MergeError(f"{folder} holds no adapter itself; name one of {', '.join(nearby)}")
        if (path / "config.json").exists():
            raise MergeError(f"{folder} holds a whole model, not an adapter: there is nothing to merge")
        raise MergeError(f"{folder} holds no adapter (adapter_config.json)")
    try:
        return PeftConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MergeError(f"cannot read an adapter from '{folder}': {error}") from error


def _tokenizer(places: Sequence[str]) -> Any:
    """The tokenizer (or processor) of the first place that has one: the run's own before the base's."""
    tried = []
    for place in places:
        if Path(place).is_dir() and not any(Path(place).glob("tokenizer*")):
            continue
        try:
            return AutoProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            tried.append(f"{place}: {error}")
    raise MergeError(f"no tokenizer beside adapter or base ({'; '.join(tried) or ', '.join(places)})")


@torch.no_grad()
def _round(model: nn.Module, to: torch.dtype, then: torch.dtype) -> None:
    """Rounds the parameters to one precision and holds them in another; buffers keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(to).to(then)


def _largest(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _check(first: Tensor, second: Tensor, allowed: float, what: str) -> None:
    difference = _largest(first, second)
    if not difference <= allowed:
        raise saved.SavedModelError(
            f"{what}: a log-probability differs by {difference:.3g} nats on a probe (allowed: {allowed})"
        )
