"""Sampling whose randomness belongs to the question, not to the run: base and adapter draw with the same noise.

A token is argmax(filtered logits + Gumbel noise), which is an exact draw from the softmax. The noise is a hash of
(row seed, position, token), so a reply depends neither on the batch it was drawn in nor on what was drawn before, and
a model that did not change answers in the same words. Source: EVALS.md section 2.5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

SCHEME = "gumbel-splitmix64-1"
"""Changes whenever the same seed would give another reply."""
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def row_seed(seed: int, task: str, item: str, sample: int) -> int:
    """A signed 64-bit seed of one reply."""
    text = f"{seed}/{task}/{item}/{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap around: every input bit reaches every output bit."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def gumbel(seeds: Tensor, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u), float64, for `tokens` at `position`; seeds and tokens broadcast, int64.

    u = (h + 1/2) / 2^52 with the upper 52 bits of the hash h, so that 0 < u < 1 holds exactly.
    """
    stream = mix(seeds + mix(torch.tensor(position + 1, device=seeds.device) * _GOLDEN))
    bits = _shifted(mix(stream + (tokens + 1) * _GOLDEN), 12)
    u = (bits.double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(u))


class SharedNoise(LogitsProcessor):
    """Adds the noise of each row; for use with `do_sample=False`, after temperature, top-k and top-p.

    seeds: one `row_seed` for each row of the batch; `start`: the length of the padded prompt. Tokens that a filter has
    set to -inf get none, which saves most of the work under top-k.
    """

    def __init__(self, seeds: Sequence[int], start: int) -> None:
        self._seeds = torch.tensor(list(seeds), dtype=torch.int64)
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, L), (B, V) -> (B, V) float64
        row, token = (scores > -torch.inf).nonzero(as_tuple=True)
        noisy = scores.double()
        noisy[row, token] += gumbel(self._seeds.to(scores.device)[row], input_ids.shape[1] - self._start, token)
        return noisy
