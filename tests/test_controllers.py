"""Controllers of a KL penalty: the card's worked sequence, phases, gate, penalties, preview; soft minimum in `ops`."""

from __future__ import annotations

import math

import pytest
import torch

from trl_ext import controllers, ops
from trl_ext.controllers import Gains, Pid, phase_of, pid_step

GAINS = Gains(kp=0.3, ki=0.01, kd=0.05, smoothing=0.95, target=0.001, integral_limit=1.0)
PHASE = {"window": 50, "rise": 0.01, "flat": 0.02, "high": 0.7}


@pytest.mark.parametrize(
    "pair, alpha, expected",
    [
        ((1.0, 0.4), 0.3, 0.569866),
        ((0.4, 1.0), 0.3, 0.569866),
        ((0.5, 0.5), 0.3, 0.5),
        ((1.0, 0.4), 0.001, 0.400693),
        ((1.0, 0.4), 1000.0, 0.699955),
    ],
)
def test_soft_min(pair, alpha, expected):
    values = torch.tensor(pair, dtype=torch.float64)
    found = float(ops.soft_min(values, alpha))
    assert found == pytest.approx(expected, abs=1e-6)
    assert min(pair) <= found + 1e-12 and found <= sum(pair) / 2 + 1e-12


def test_soft_min_of_an_ensemble():
    """Three reward models, two answers: by row, against the definition; its gradient sums to one and favours the lowest."""
    rewards = torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.3, 0.3]], requires_grad=True)
    found = ops.soft_min(rewards, 0.3, dim=1)
    slow = -0.3 * math.log((math.exp(-3) + math.exp(-1 / 3) + math.exp(-5 / 3)) / 3)
    assert found.tolist() == pytest.approx([slow, 0.3], abs=1e-6)
    found.sum().backward()
    assert rewards.grad.sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert rewards.grad[0].argmax() == 1


def test_soft_min_needs_a_temperature():
    with pytest.raises(ValueError, match="alpha is 0"):
        ops.soft_min(torch.ones(2), 0.0)


def test_pid_of_the_card():
    state, outputs = Pid(), []
    for reward in (0.5, 0.6, 0.4):
        state, output = pid_step(state, reward, GAINS)
        outputs.append(output)
    assert outputs == pytest.approx([0, 0.001440, -0.002410], abs=1e-6)
    tau = [controllers.threshold(0.3, output, 1.5, 0.1, 0.6) for output in outputs]
    assert tau == pytest.approx([0.45, 0.452160, 0.446385], abs=1e-6)


def test_integral_is_bounded():
    state = Pid()
    for step in range(300):
        state, _ = pid_step(state, 50.0 * step * (1 if step < 150 else -1), GAINS)
        assert abs(state.integral) <= 1
    assert state.integral == -1


@pytest.mark.parametrize("correction, factor, expected", [(-5.0, 1.0, 0.1), (5.0, 1.0, 0.6), (0.0, 0.8, 0.24)])
def test_threshold_stays_in_its_bounds(correction, factor, expected):
    assert controllers.threshold(0.3, correction, factor, 0.1, 0.6) == pytest.approx(expected)


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([0.9] * 49, "warmup"),
        ([0.9] * 50, "converged"),  # flat and high; a window compared with itself does not climb
        ([0.5] * 50, "plateau"),  # flat, not high
        ([0.7] * 50, "plateau"),  # 0.7 is not above 0.7
        ([0.8, 0.9] * 25, "plateau"),  # high, SD 0.05
        ([0.88, 0.91] * 25, "converged"),  # SD 0.015: of the population
        ([0.5] * 50 + [0.52] * 50, "climbing"),
        ([0.5] * 50 + [0.505] * 50, "plateau"),
        ([0.0] * 49 + [0.9] * 50, "converged"),  # 99 are not two windows: compared with itself
        ([9.0] * 7 + [0.5] * 50 + [0.52] * 50, "climbing"),  # older ones are forgotten
    ],
)
def test_phases(rewards, expected):
    assert phase_of(rewards, **PHASE) == expected


def test_gate():
    entropy = torch.tensor([0.0, 0.9, 1.5, 1.9, 3.9, 50.0])
    found = controllers.entropy_gate(entropy, 2.0, 0.5)
    assert found.tolist() == pytest.approx([20, 2, 1.25, 1, 0.5, 0.5], abs=1e-6)
    assert bool((found.diff() <= 0).all())


@pytest.mark.parametrize("kl, penalty", [(-1.0, 0), (0.2, 0), (0.3, 0), (0.5, 0.004), (1.0, 0.049)])
def test_one_sided(kl, penalty):
    value = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    found, slope = controllers.one_sided(value, 0.3, 0.1)
    assert float(found.detach()) == pytest.approx(penalty, abs=1e-6)
    (grad,) = torch.autograd.grad(found, value)
    assert float(slope.detach()) == pytest.approx(float(grad), abs=1e-12)
    if kl <= 0.3:
        assert float(found.detach()) == 0 and float(slope.detach()) == 0


def test_momentum():
    """Over a window of 3, m = (newest - third newest) / 3; 5 m^2, slope 10 m / 3."""
    history = torch.tensor([9.0, 0.1, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
    found, slope = controllers.momentum_penalty(history, 3, 5.0)
    assert float(found.detach()) == pytest.approx(5 * 0.2**2, abs=1e-9)
    (grad,) = torch.autograd.grad(found, history)
    assert float(slope.detach()) == pytest.approx(float(grad[-1]), abs=1e-12)
    assert float(grad[-1]) == pytest.approx(10 * 0.2 / 3, abs=1e-9)
    for history in (torch.tensor([0.1, 0.9]), torch.tensor([0.7, 0.2, 0.1])):  # too short; falling
        assert [float(v) for v in controllers.momentum_penalty(history, 3, 5.0)] == [0, 0]


@pytest.mark.parametrize("kl, scale", [(0.8, 0.625), (0.5, 1.0), (0.1, 1.0), (-0.2, 1.0)])
def test_preview(kl, scale):
    assert controllers.preview_scale(kl) == pytest.approx(scale)


def test_sampled_kl():
    """k3 by its definition, its derivative 1 - pi_ref / pi, and its mean under pi is KL(pi || ref)."""
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    logps = p.log().requires_grad_()
    found = controllers.sampled_kl(logps, q.log())
    pairs = zip(p.tolist(), q.tolist(), strict=True)
    assert found.tolist() == pytest.approx([b / a - math.log(b / a) - 1 for a, b in pairs])
    assert float((p * found).sum().detach()) == pytest.approx(float((p * (p / q).log()).sum()))
    found.sum().backward()
    torch.testing.assert_close(logps.grad, 1 - q / p)
