"""The critic: its heads against modules of PyTorch, the losses, running statistics, and training against torch.optim."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl_ext import critic, ops

LOSS = {"weight": 0.5, "alpha": 0.3, "clip": 0.2, "delta": 0.5}


def module(heads):
    """The same two heads as modules; the LayerNorm is shared."""
    hidden = heads["norm.weight"].numel()
    norm = nn.LayerNorm(hidden)
    first = [nn.Linear(hidden, hidden // 4) for _ in range(2)]
    second = [nn.Linear(hidden // 4, 1) for _ in range(2)]
    with torch.no_grad():
        norm.weight.copy_(heads["norm.weight"])
        norm.bias.copy_(heads["norm.bias"])
        for k in range(2):
            first[k].weight.copy_(heads["first.weight"][k])
            first[k].bias.copy_(heads["first.bias"][k])
            second[k].weight.copy_(heads["second.weight"][k].unsqueeze(0))
            second[k].bias.copy_(heads["second.bias"][k].view(1))
    paths = [nn.Sequential(first[k], nn.GELU(), second[k]) for k in range(2)]
    parameters = [norm.weight, norm.bias, *(p for path in paths for p in path.parameters())]
    return (lambda h: torch.stack([path(norm(h)).squeeze(-1) for path in paths])), parameters


def test_heads():
    heads = critic.new_heads(16, seed=3)
    hidden = torch.randn(5, 16)
    torch.testing.assert_close(critic.values(heads, hidden), module(heads)[0](hidden))
    again, other = critic.new_heads(16, seed=3), critic.new_heads(16, seed=4)
    assert all(torch.equal(heads[k], again[k]) for k in heads)
    assert not torch.equal(heads["first.weight"], other["first.weight"])
    assert float(heads["first.weight"].abs().max()) <= 16**-0.5 and float(heads["second.bias"].abs().max()) <= 4**-0.5
    assert not torch.equal(*critic.values(heads, hidden)), "two heads that start alike would stay alike"


def test_values_do_not_round_under_autocast():
    heads, hidden = critic.new_heads(16, 0), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(critic.values(heads, hidden), critic.values(heads, hidden.float()))
        assert critic.values(heads, hidden.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "value, expected",
    [
        # target 1, old 0: huber with delta 0.5 of the difference d is d^2 / 2 up to 0.5, then 0.5 (|d| - 0.25)
        (0.1, 0.5 * (0.5 * 0.65 + 0.5 * 0.65)),  # within the clip: twice the same
        (0.9, 0.5 * (0.005 + 0.5 * 0.55)),  # clipped at 0.2
        (-1.0, 0.5 * (0.5 * 1.75 + 0.5 * 0.95)),  # clipped at -0.2
    ],
)
def test_value_loss(value, expected):
    found = critic.value_loss(torch.tensor(value), torch.tensor(0.0), torch.tensor(1.0), 0.2, 0.5)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_last_states():
    """Of each row's last loss token, gaps (tool output) and padding aside; a row without any takes its first."""
    hidden = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    assert critic.last_states(hidden, mask).tolist() == [[2, 3], [14, 15], [16, 17]]


def test_running_statistics():
    """Batches one after the other: by hand for the first, and near the moments of all values after many."""
    batch = torch.tensor([1.0, 3.0])
    stats = critic.merged(critic.fresh_stats(), batch)
    # mean 2 * 2 / 2.0001; squares 1 * 1e-4 + 2 (unbiased variance) * 2 + 4 * 1e-4 * 2 / 2.0001
    assert stats.tolist() == pytest.approx([2.0001, 4 / 2.0001, (4.0001 + 8e-4 / 2.0001) / 2.0001], rel=1e-6)
    assert critic.standardised(batch, stats).tolist() == pytest.approx(
        [(v - float(stats[1])) / float(stats[2]) ** 0.5 for v in (1, 3)], rel=1e-5
    )
    everything = torch.randn(40, 32) * 3 + 5
    for part in everything:
        stats = critic.merged(stats, part)
    seen = torch.cat([batch, everything.flatten()])
    assert float(stats[1]) == pytest.approx(float(seen.mean()), rel=1e-3)
    assert float(stats[2]) == pytest.approx(float(seen.var()), rel=0.05)
    assert torch.equal(critic.merged(stats, torch.zeros(0)), stats)
    assert torch.isfinite(critic.merged(stats, torch.ones(1))).all()


@pytest.mark.parametrize("max_norm, binds", [(0.01, True), (10.0, False)])
def test_training_is_adamw_on_the_mean_of_all_rows(max_norm, binds):
    """Three steps in uneven micro-batches, one row not counted, against modules, clipping and AdamW of PyTorch."""
    torch.manual_seed(0)
    ours = critic.new_critic(8, seed=1, step=0)
    network, parameters = module(ours["heads"])
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(3):
        hidden, old, target = torch.randn(6, 8), torch.randn(6), torch.randn(6)
        target[4] = torch.nan
        rows = ~target.isnan()
        for part in (slice(0, 1), slice(1, 6)):
            ours = critic.with_rows(ours, hidden[part], rows[part], old[part], target[part], **LOSS)
        ours = critic.updated(ours, step + 1, lr=1e-2, max_norm=max_norm)
        optimizer.zero_grad()
        value = ops.soft_min(network(hidden[rows]), 0.3)
        (0.5 * critic.value_loss(value, old[rows], target[rows], 0.2, 0.5).mean()).backward()
        assert (float(nn.utils.clip_grad_norm_(parameters, max_norm)) > max_norm) == binds
        optimizer.step()
    torch.testing.assert_close(critic.values(ours["heads"], hidden), network(hidden), rtol=1e-4, atol=1e-5)
    assert ours["at"] == 3 and float(ours["updates"]) == 3 and float(ours["rows"]) == 0


def test_an_update_leaves_what_it_was_given():
    """A method looks ahead without changing its state."""
    before = critic.with_rows(
        critic.new_critic(8, 0, 0), torch.randn(2, 8), torch.ones(2), torch.zeros(2), torch.ones(2), **LOSS
    )
    copy = {k: v.clone() for k, v in before["heads"].items()}
    critic.updated(before, 1, 1e-2, 0.5)
    assert all(torch.equal(before["heads"][k], copy[k]) for k in copy)
    assert float(before["updates"]) == 0 and float(before["rows"]) == 2
    assert not float(before["exp_avg"]["first.weight"].abs().sum())
