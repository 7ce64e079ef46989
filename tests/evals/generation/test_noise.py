"""Shared sampling noise: exact draws, the same in any batch, another for every reply, position and token."""

from __future__ import annotations

import math

import torch
from transformers import LogitsProcessorList, TopKLogitsWarper

from evals.generation.noise import SharedNoise, gumbel, mix, row_seed


def splitmix_reference(x: int) -> int:
    """The finaliser in plain unsigned arithmetic, as its author writes it."""
    mask = 2**64 - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


def test_mix_is_splitmix64() -> None:
    values = [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64, 123456789]
    assert mix(torch.tensor(values)).tolist() == [splitmix_reference(v) for v in values]


def test_noise_is_standard_gumbel_and_independent_of_its_neighbours() -> None:
    seeds = torch.tensor([row_seed(0, "t", str(i), 0) for i in range(200)])[:, None]
    noise = torch.stack([gumbel(seeds, position, torch.arange(100)[None]) for position in range(5)])
    assert abs(noise.mean() - 0.5772) < 0.01  # Euler's constant; SE = 1.28 / sqrt(1e5) = 0.004
    assert abs(noise.std() - math.pi / math.sqrt(6)) < 0.02
    assert noise.unique().numel() == noise.numel()
    for other in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2)):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.02


def test_argmax_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    seeds = [row_seed(0, "t", "q", n) for n in range(20_000)]
    drawn = SharedNoise(seeds, 3)(torch.zeros(20_000, 4, dtype=torch.long), logits.repeat(20_000, 1)).argmax(-1)
    frequency = torch.bincount(drawn, minlength=5) / 20_000
    assert (frequency - logits.softmax(-1)).abs().max() < 0.012  # 3.4 standard errors of p = 0.64
    assert frequency[4] == 0, "a filtered token is never drawn"


def test_a_row_draws_the_same_in_any_batch() -> None:
    seeds = [row_seed(0, "t", "q", n) for n in range(6)]
    ids, scores = torch.zeros(6, 9, dtype=torch.long), torch.randn(6, 50)
    warp = TopKLogitsWarper(10)
    together = LogitsProcessorList([warp, SharedNoise(seeds, 4)])(ids, scores)
    alone = LogitsProcessorList([warp, SharedNoise(seeds[2:3], 4)])(ids[2:3], scores[2:3])
    assert torch.equal(together[2:3], alone)
    wider = SharedNoise(seeds, 6)(torch.zeros(6, 11, dtype=torch.long), warp(ids, scores))
    assert torch.equal(together, wider), "the position counts from the end of the padded prompt"


def test_seeds_name_the_reply() -> None:
    names = [(0, "a", "q", 0), (1, "a", "q", 0), (0, "b", "q", 0), (0, "a", "r", 0), (0, "a", "q", 1)]
    assert len({row_seed(*name) for name in names}) == 5
    assert all(-(2**63) <= row_seed(*name) < 2**63 for name in names)
