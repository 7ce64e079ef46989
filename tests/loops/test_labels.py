"""Labels from scores, per role; cap, replay and balance; the card's worked KTO numbers against TRL's own loss."""

from __future__ import annotations

import doctest
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from tests.tiny import tiny_path, tiny_tokenizer
from trl_ext.loops import Episode, balance, capped, labels, role_rows
from trl_ext.loops.labels import Balance, labels_from_scores


def test_a_score_at_the_threshold_is_desirable() -> None:
    assert labels_from_scores([1.0, 0.5, 0.49, 0.0], 0.5) == [True, True, False, False]


def test_what_is_unclear_is_dropped() -> None:
    assert labels_from_scores([None, float("nan"), 0.6, 0.4, 0.7, 0.3], 0.5, 0.15) == [
        None,
        None,
        None,
        None,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="margin"):
        labels_from_scores([1.0], 0.5, -0.1)


def test_labels_are_per_role() -> None:
    """The same episode is desirable for the adversary and undesirable for the learner."""
    assert labels.role_labels({"learner": 0.0, "adversary": 1.0}) == {"learner": False, "adversary": True}


def test_a_tie_labels_nobody() -> None:
    assert labels.role_labels({"learner": 1.0, "adversary": 1.0}) == {"learner": None, "adversary": None}
    assert labels.role_labels({"learner": 1.0}) == {"learner": True}, "alone there is nobody to tie with"


EPISODES = [
    Episode("e1", {"A": 1.0, "B": 0.0}, {"A": [("p1", "a1"), ("p2", "a2")], "B": [("p1", "b1")]}),
    Episode("e2", {"A": 0.5, "B": 0.5}, {"A": [("p3", "a3")], "B": [("p3", "b3")]}),
    Episode("e3", {"A": 0.0, "B": 1.0}, {"A": [("p4", "a4")]}),
]


def test_every_turn_takes_its_episodes_label() -> None:
    rows = labels.role_rows(EPISODES, "A")
    assert [(r["prompt"], r["completion"], r["label"]) for r in rows] == [
        ("p1", "a1", True),
        ("p2", "a2", True),
        ("p4", "a4", False),
    ]
    assert [(r["completion"], r["label"]) for r in labels.role_rows(EPISODES, "B")] == [("b1", False)]
    with pytest.raises(ValueError, match=r"episode 'e1' has no outcome for 'C' \(it has: A, B\)"):
        labels.role_rows(EPISODES, "C")


def test_a_cap_keeps_long_episodes_from_dominating() -> None:
    rows = [{"episode": name, "n": n} for name, count in (("long", 9), ("short", 2)) for n in range(count)]
    kept = labels.capped(rows, 3, seed=0)
    own = [r["n"] for r in kept if r["episode"] == "long"]
    assert len(own) == 3 and own == sorted(own) and sum(r["episode"] == "short" for r in kept) == 2
    assert labels.capped(rows, 3, seed=0) == kept and labels.capped(rows, None, seed=0) == rows
    drawn = {tuple(r["n"] for r in labels.capped(rows, 3, seed) if r["episode"] == "long") for seed in range(20)}
    assert len(drawn) > 1, "not always the first turns"
    with pytest.raises(ValueError, match="at least 1"):
        labels.capped(rows, 0, seed=0)


def test_the_example_runs() -> None:
    found = doctest.testmod(labels, raise_on_error=False)
    assert found.attempted == 9 and found.failed == 0


def test_a_script_trains_each_role_on_its_labels(tmp_path: Path) -> None:
    """The library's way, with TRL's own trainer: two episodes that were played elsewhere, a data set for each role."""
    turns = {role: [("Left?", " No."), ("Sure?", " Yes.")] for role in ("blue", "red")}
    episodes = [Episode("a", {"blue": 1.0, "red": 0.0}, turns), Episode("b", {"blue": 0.0, "red": 1.0}, turns)]
    for role, first in (("blue", True), ("red", False)):
        rows = capped(role_rows(episodes, role), 1, seed=0)
        assert [row["label"] for row in rows] == [first, not first]
        args = KTOConfig(
            str(tmp_path / role),
            per_device_train_batch_size=2,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        )
        data = Dataset.from_list(rows)
        trainer = KTOTrainer(tiny_path(), args=args, train_dataset=data, processing_class=tiny_tokenizer())
        trainer.train()
        assert trainer.state.global_step == 1


def test_replay_takes_the_newest_first() -> None:
    new, middle, old = ([{"i": i}] * n for i, n in ((3, 6), (2, 2), (1, 4)))
    assert [r["i"] for r in labels.with_replay(new, [old, middle], 1 / 3)] == [3] * 6 + [2, 2, 1], "a third of nine"
    assert labels.with_replay(new, [old, middle], 0.0) == new
    assert len(labels.with_replay(new, [old, middle], 0.9)) == 12, "there are no more"
    with pytest.raises(ValueError, match="below 1"):
        labels.with_replay(new, [], 1.0)


def test_the_cards_balance() -> None:
    found = Balance(63, 37)
    assert found.ratio == pytest.approx(1.702703, abs=1e-6) and not found.balanced
    assert found.undesirable_weights == pytest.approx((1.280228, 1.702703), abs=1e-6)
    assert found.desirable_weights == pytest.approx((0.587302, 0.781111), abs=1e-6)
    words = found.warning()
    assert words is not None and "1.280..1.703" in words and "0.587..0.781" in words and "not both" in words


@pytest.mark.parametrize("end", [0, 1])
def test_each_end_of_a_range_keeps_the_rule(end: int) -> None:
    for weights in ((0.7, 1.0), (1.0, 1.0), (2.0, 0.5)):
        found = Balance(63, 37, *weights)
        within = 1e-9 * (1 - 2 * end)  # just inside
        assert Balance(63, 37, found.desirable_weights[end] * (1 + within), weights[1]).balanced
        assert Balance(63, 37, weights[0], found.undesirable_weights[end] * (1 + within)).balanced
        assert not Balance(63, 37, found.desirable_weights[end] * (1 - 1e3 * within), weights[1]).balanced


def test_balance_counts_labels() -> None:
    assert balance([True, False, None, True, False]) == Balance(2, 2)
    assert balance([True, False]).warning() is None
    missing = balance([True, True]).warning()
    assert missing is not None and "no undesirable example among 2" in missing
    with pytest.raises(ValueError, match="above 0"):
        balance([True], 0.0)


LR, KL = [3.0, 1.0, -2.0, 0.5], [0.4, -0.2, 0.6, 0.8]
LABELS = [True, True, False, False]


def kto(
    lr: torch.Tensor,
    kl: list[float],
    desirable: float = 1.0,
    undesirable: float = 1.0,
    labels: Sequence[bool] = LABELS,
) -> tuple[Any, float]:
    """TRL's loss and z of a batch with log-ratios `lr` and, of the mismatched pairs, `kl`; the reference gives 0."""
    rows = len(lr)
    matched = torch.arange(rows)[:, None] * torch.ones(1, 2, dtype=torch.long)
    batch = {
        "input_ids": matched,
        "attention_mask": torch.ones(rows, 2),
        "completion_mask": torch.tensor([[0, 1]] * rows),
    }
    batch |= {"KL_" + key: value for key, value in batch.items()} | {"KL_input_ids": matched + rows}
    batch |= {"label": torch.tensor(labels[:rows]), "ref_logps": torch.zeros(rows), "ref_KL_logps": torch.zeros(rows)}

    def model(input_ids: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        given = lr if int(input_ids[0, 0]) < rows else torch.tensor(kl)
        return SimpleNamespace(
            log_probs=given[:, None], entropy=torch.zeros(rows, 1), mean_logits=torch.zeros(rows, 1)
        )

    trainer = object.__new__(KTOTrainer)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    trainer.__dict__ |= {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "calculate_KL": True,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "loss_type": "kto",
        "beta": 0.1,
        "desirable_weight": desirable,
        "undesirable_weight": undesirable,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    loss = trainer._compute_loss(model, batch, False)
    return loss, trainer._metrics["train"]["kl"][0]


def test_the_cards_kto_numbers_are_trls() -> None:
    lr = torch.tensor(LR, requires_grad=True)
    loss, z = kto(lr, KL)
    loss.backward()
    assert z == pytest.approx(0.4, abs=1e-6)
    assert loss.item() == pytest.approx(0.465789, abs=1e-6)
    assert lr.grad is not None
    assert lr.grad.tolist() == pytest.approx([-0.006146, -0.006244, 0.006161, 0.006250], abs=1e-6)


def test_each_loss_of_the_card() -> None:
    """TRL's loss of a batch that is one example four times, with the card's mismatched pairs; the weight of its class
    scales it, the other one does not."""
    for lr, label, expected in zip(LR, LABELS, [0.435364, 0.485004, 0.440286, 0.502500], strict=True):
        four, own = torch.tensor([lr] * 4), [label] * 4
        assert kto(four, KL, labels=own)[0].item() == pytest.approx(expected, abs=1e-6)
        desirable, undesirable = (2.0, 3.0) if label else (3.0, 2.0)
        assert kto(four, KL, desirable, undesirable, own)[0].item() == pytest.approx(2 * expected, abs=2e-6)


def test_z_is_never_negative_and_at_the_reference_each_loss_is_a_half() -> None:
    assert kto(torch.tensor(LR), [-1.0, -2.0, 0.5, -1.0])[1] == 0
    loss, z = kto(torch.zeros(4), [0.0] * 4)
    assert (loss.item(), z) == (0.5, 0)
