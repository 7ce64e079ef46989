"""Combining members, best of n, and their statistics: the card's worked numbers, limits, and slow references."""

from __future__ import annotations

import doctest
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from trl_ext.rewards import best_of_n as best_of_n_module
from trl_ext.rewards.best_of_n import best_of_n, coefficients, kl_best_of_n
from trl_ext.rewards.ensemble import OBJECTIVES, Moments, combine, group_z, summary, variance

NAN = math.nan
S = torch.tensor([[0.6, 0.4, 0.2, 0.9], [0.5, 0.5, 0.3, -0.5], [0.7, 0.6, 0.1, 1.7]], dtype=torch.float64)
PROXY = torch.tensor([0.3, 0.9, 0.5, 0.95, 0.2], dtype=torch.float64)
GOLD = torch.tensor([0.1, 0.7, 0.4, 0.2, 0.9], dtype=torch.float64)


def near(found: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    assert found.tolist() == pytest.approx(expected, abs=tolerance, nan_ok=True)


# The card's worked example


def test_the_worked_example() -> None:
    near(combine(S, "mean"), [0.6, 0.5, 0.2, 0.7])
    near(combine(S, "wco"), [0.5, 0.4, 0.1, -0.5])
    near(variance(S), [0.02 / 3, 0.02 / 3, 0.02 / 3, 2.48 / 3])
    near(variance(S), [0.006667, 0.006667, 0.006667, 0.826667])
    near(combine(S), [0.596667, 0.496667, 0.196667, 0.286667])
    near(combine(S, ddof=1), [0.595, 0.495, 0.195, 0.080])
    assert [int(combine(S, name).argmax()) for name in ("mean", "wco", "uwo")] == [3, 0, 0]


def test_best_of_n_of_the_worked_example() -> None:
    gold = [best_of_n(PROXY, GOLD, n) for n in range(1, 6)]
    proxy = [best_of_n(PROXY, PROXY, n) for n in range(1, 6)]
    assert gold == pytest.approx([0.46, 0.38, 0.37, 0.3, 0.2], abs=1e-6)
    assert proxy == pytest.approx([0.57, 0.78, 0.89, 0.94, 0.95], abs=1e-6)
    kl = [kl_best_of_n(n) for n in range(1, 6)]
    assert kl == pytest.approx([0, 0.193147, 0.431946, 0.636294, 0.809438], abs=1e-6)


def test_the_documented_way_from_reward_functions_to_best_of_n() -> None:
    found = doctest.testmod(best_of_n_module)
    assert found.attempted >= 8 and found.failed == 0


# combine


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_properties_of_every_objective(objective: str) -> None:
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, mean = combine(scores, objective), scores.mean(0)
    assert (found <= mean + 1e-12).all()
    torch.testing.assert_close(combine(scores[[3, 1, 4, 0, 2]], objective), found)
    torch.testing.assert_close(combine(scores + 7, objective), found + 7)
    lower = scores.clone()
    lower[scores.argmin(0), torch.arange(40)] -= 0.5
    assert (combine(lower, objective) < found).all(), "the lowest member's score, lowered, lowers the reward"
    agree = scores[:1].expand(5, -1)
    torch.testing.assert_close(combine(agree, objective), scores[0])
    torch.testing.assert_close(combine(scores[:1], objective), scores[0])


def test_a_single_member_has_no_variance_and_no_nan() -> None:
    assert combine(S[:1], "uwo", ddof=1).tolist() == S[0].tolist()
    assert variance(S[:1], 1).tolist() == [0.0] * 4


def test_limits() -> None:
    near(combine(S, "uwo", variance_weight=0.0), combine(S, "mean").tolist())
    near(combine(S, "soft_min", soft_alpha=1e-3), combine(S, "wco").tolist(), 2e-3)
    near(combine(S, "soft_min", soft_alpha=1e4), combine(S, "mean").tolist(), 1e-3)
    by_hand = [-0.3 * math.log(statistics.fmean(math.exp(-v / 0.3) for v in column)) for column in S.T.tolist()]
    near(combine(S, "soft_min"), by_hand)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_member_that_abstains_is_left_out_and_all_nan_stays(objective: str) -> None:
    scores = torch.cat([S, torch.full((1, 4), NAN)])
    scores[0, 1] = scores[:, 3] = NAN
    expected = [
        combine(S[:, [0]], objective)[0].item(),
        combine(S[1:, [1]], objective)[0].item(),
        combine(S[:, [2]], objective)[0].item(),
        NAN,
    ]
    near(combine(scores, objective), expected, 1e-12)


def test_the_reward_carries_no_gradient_and_keeps_the_type() -> None:
    scores = S.float().requires_grad_()
    for objective in OBJECTIVES:
        found = combine(scores, objective)
        assert not found.requires_grad and found.dtype == torch.float32
    with pytest.raises(ValueError, match="'max' is not one of mean, wco, uwo, soft_min"):
        combine(S, "max")
    with pytest.raises(ValueError, match="infinite"):
        combine(torch.tensor([[math.inf], [0.0]]), "mean")


# Normalisation


def test_group_z_against_a_slow_reference() -> None:
    scores = torch.tensor([[1.0, 3.0, NAN, 5.0, 5.0, 7.0, 9.0], [0.0, 0.0, 1.0, 2.0, 4.0, 2.0, NAN]])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    found = group_z(scores.double(), groups)
    for m, g in itertools.product(range(2), range(3)):
        inside = [i for i in range(7) if groups[i] == g]
        own = [float(scores[m, i]) for i in inside if not math.isnan(scores[m, i])]
        std = statistics.stdev(own) if len(own) > 1 else 0.0
        expected = [(float(scores[m, i]) - statistics.fmean(own or [NAN])) / (std + 1e-4) for i in inside]
        near(found[m, inside], expected)


def test_running_moments_equal_those_of_all_scores_at_once() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100 + 1000
    scores[0, ::3] = NAN
    moments = Moments.empty(3)
    for part in scores.split([7, 1, 30, 12], 1):
        moments = moments.updated(part)
    for m in range(3):
        own = [v for v in scores[m].tolist() if not math.isnan(v)]
        expected = [(v - statistics.fmean(own)) / statistics.pstdev(own) for v in scores[m].tolist()]
        near(moments.z(scores)[m], expected)
    constant = Moments.empty(1).updated(torch.full((1, 4), 2.0))
    assert constant.z(torch.tensor([[2.0, 5.0]])).tolist() == [[0.0, 3.0]], "no spread: only centred"
    silent = Moments.empty(1).updated(torch.tensor([[NAN]]))
    assert silent.count.item() == 0 and silent.z(torch.tensor([[NAN]])).isnan().all()


def test_summary() -> None:
    scores = torch.cat([S, torch.full((3, 1), NAN)], 1)
    found = summary(scores, combine(scores))
    # lowest members: 1, 0, 2, 1 -> most often member 1, which two of four completions do not have
    std = [math.sqrt(v) for v in (0.02 / 3, 0.02 / 3, 0.02 / 3, 2.48 / 3)]
    assert found == pytest.approx(
        {
            "mean": 0.5,
            "std": statistics.fmean(std),
            "min": 0.125,
            "combined": (0.596667 + 0.496667 + 0.196667 + 0.286667) / 4,
            "gap": 0.5 * (0.02 * 3 + 2.48) / 12,
            "lowest_differs": 0.5,
        },
        abs=1e-6,
    )
    assert summary(torch.full((2, 1), NAN), torch.tensor([NAN])) == {}


# Best of n


def test_the_estimator_is_the_average_over_all_subsets() -> None:
    proxy = torch.tensor([0.3, 0.9, 0.5, 0.95, 0.2, 0.7, -1.0])
    gold = torch.tensor([0.1, 0.7, 0.4, 0.2, 0.9, -3.0, 2.0])
    for n in range(1, 8):
        best = [max(subset, key=lambda i: proxy[i].item()) for subset in itertools.combinations(range(7), n)]
        assert best_of_n(proxy, gold, n) == pytest.approx(statistics.fmean(gold[i].item() for i in best), abs=1e-6)
        assert coefficients(7, n).sum().item() == pytest.approx(1.0, abs=1e-12)
        assert coefficients(7, n).tolist() == pytest.approx(
            [math.comb(i - 1, n - 1) / math.comb(7, n) for i in range(1, 8)]
        )
    assert best_of_n(proxy, gold, 1) == pytest.approx(gold.mean().item())
    assert best_of_n(proxy, gold, 7) == pytest.approx(0.2)


def test_ties_share_their_gold_and_prompts_are_averaged() -> None:
    proxy = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    gold = torch.tensor([[0.0, 1.0, 5.0], [3.0, 2.0, 1.0]])
    assert best_of_n(proxy, gold, 3) == pytest.approx((0.5 + 1.0) / 2)
    assert best_of_n(proxy[:, [1, 0, 2]], gold[:, [1, 0, 2]], 2) == pytest.approx(best_of_n(proxy, gold, 2))
    assert coefficients(12_500, 4_096).sum().item() == pytest.approx(1.0, abs=1e-6)
    for n in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to the number of samples, 3"):
            best_of_n(proxy, gold, n)
    with pytest.raises(ValueError, match="not finite"):
        best_of_n(torch.tensor([NAN, 1.0]), torch.tensor([0.0, 1.0]), 1)
    with pytest.raises(ValueError, match="expected at least 1"):
        kl_best_of_n(0)


def test_single_and_mean_rise_and_fall_while_wco_and_uwo_keep_rising() -> None:
    """The card's demonstration: 2% hacks, which member 0 loves and the gold score does not."""
    rng, sizes = np.random.default_rng(0), (1, 4, 16, 64, 256)
    hack = rng.random((4000, 256)) < 0.02
    gold = rng.standard_normal((4000, 256)) - 2 * hack
    members = gold + rng.standard_normal((5, 4000, 256))
    members[0] += 20 * hack
    scores, gold = torch.from_numpy(members), torch.from_numpy(gold)
    proxies = {"single": scores[0]}
    flat = scores.flatten(1)
    proxies |= {name: combine(flat, name).view(4000, 256) for name in ("mean", "wco", "uwo")}
    picks = {
        name: [float(gold.gather(1, p[:, :n].argmax(1, keepdim=True)).mean()) for n in sizes]
        for name, p in proxies.items()
    }
    card = {
        "single": [-0.03, 0.51, 0.38, -0.88, -1.21],
        "mean": [-0.03, 0.76, 1.20, 1.12, 0.88],
        "wco": [-0.03, 0.83, 1.50, 2.02, 2.43],
        "uwo": [-0.03, 0.88, 1.57, 2.10, 2.53],
    }
    for name, values in card.items():
        assert picks[name] == pytest.approx(values, abs=0.1), name
    for name in ("single", "mean"):
        assert picks[name][-1] < max(picks[name]) - 0.2
    for name in ("wco", "uwo"):
        assert picks[name] == sorted(picks[name])
