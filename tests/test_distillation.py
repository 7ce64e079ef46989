"""PACED on TRL's DistillationTrainer: worked losses, neutral setting, stages, sources, splits, restart; the scoring pass."""

from __future__ import annotations

import math

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM

from tests.tiny import QUIET, assert_equal, prompts, tiny_path, tiny_tokenizer, weights
from trl_ext.batch import replaced
from trl_ext.distillation import SCALE, PacedDistillationConfig, PacedDistillationTrainer
from trl_ext.method import Metrics
from trl_ext.plan import PlanError
from trl_ext.rollouts.scoring import pass_rates, with_pass_rates

RATES = [0.5, 0.125, 0.875, 0.25] * 4
NEUTRAL = {"paced_a": 0, "paced_b": 0, "loss_mean": "token", "forward_responses": "student"}
STUDENT, TEACHER = torch.tensor([2.0, 0, -1]), torch.tensor([0.0, 1, -1])


def teacher():
    return tiny_path(initializer_range=0.4, num_hidden_layers=1)


def data(rates=RATES):
    return prompts(len(rates)).add_column("pass_rate", rates)


def settings(folder, **kwargs):
    own = {"output_dir": str(folder), "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    return QUIET | own | {"max_completion_length": 6, "loss_mean": "sequence"} | kwargs


def make(folder, rows=None, cls=PacedDistillationTrainer, config=PacedDistillationConfig, **kwargs):
    args = settings(folder, **kwargs)
    args = args if config is PacedDistillationConfig else {k: v for k, v in args.items() if k != "loss_mean"}
    return cls(tiny_path(), teacher(), config(**args), data() if rows is None else rows)


def train(folder, resume=None, **kwargs):
    trainer = make(folder, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# The loss


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_neutral_is_trl(tmp_path, beta):
    ours = train(tmp_path, beta=beta, gradient_accumulation_steps=2, **NEUTRAL)
    theirs = train(
        tmp_path,
        cls=trl.DistillationTrainer,
        config=trl.DistillationConfig,
        beta=beta,
        gradient_accumulation_steps=2,
    )
    assert_equal(weights(ours), weights(theirs))


class Watched(PacedDistillationTrainer):
    """Keeps each micro-batch and its loss, and the loss of each row alone as TRL computes it: {beta: [...]}."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _compute_loss(self, student, inputs, num_items):
        found = super()._compute_loss(student, inputs, num_items)
        alone = {
            beta: [self.alone(student, inputs, i, beta) for i in range(len(inputs[SCALE]))] for beta in (0.0, 1.0)
        }
        self.seen.append((float(found[0].detach()), alone, inputs))
        return found

    def alone(self, student, inputs, i, beta):
        row = {k: v[i : i + 1] for k, v in inputs.items() if v.ndim > 0 and k != SCALE}
        with torch.no_grad(), replaced(self, beta=beta):
            return float(trl.DistillationTrainer._compute_loss(self, student, row, None)[0])


def raw(p, a=1, b=1):
    return [x**a * (1 - x) ** b for x in p]


@pytest.mark.parametrize("how", ["batch", "max", "none"])
def test_the_loss_is_the_weighted_mean_of_the_rows_own_means(tmp_path, how):
    """Each row alone through TRL gives (1/T) sum D; the weights are formed by hand."""
    trainer = train(tmp_path, cls=Watched, max_steps=1, paced_normalize=how, paced_a=2)
    loss, alone, inputs = trainer.seen[0]
    w, rows = raw(inputs["paced/p"].tolist(), a=2), alone[1.0]
    scale = {"batch": sum(w) / len(w), "max": max(w), "none": 1.0}[how]
    expected = sum(x * y for x, y in zip(w, rows, strict=True)) / len(w) / scale
    assert loss == pytest.approx(expected, rel=1e-5)


def test_token_mean_keeps_trls_denominator(tmp_path):
    trainer = train(tmp_path, cls=Watched, max_steps=1, loss_mean="token")
    loss, alone, inputs = trainer.seen[0]
    rows = alone[1.0]
    w, lengths = raw(inputs["paced/p"].tolist()), inputs["completion_mask"].sum(1).tolist()
    mean = sum(w) / len(w)
    expected = sum(x / mean * y * t for x, y, t in zip(w, rows, lengths, strict=True)) / sum(lengths)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_scaling_w_does_not_matter_under_batch(tmp_path):
    """All p alike: w is a constant, and the run is that of weight 1."""
    same = train(tmp_path, rows=data([0.125] * 16))
    one = train(tmp_path, rows=data([0.125] * 16), paced_a=0, paced_b=0)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(same)[name], value, rtol=1e-4, atol=1e-6)


def test_accumulation_does_not_matter(tmp_path):
    runs = []
    for size in (8, 2):
        extra = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = make(tmp_path, optim="sgd", learning_rate=0.1, **extra)
        trainer._generate_single_turn = lambda ids, *a, **k: [[40 + len(x) % 7] * (2 + sum(x) % 4) for x in ids]
        trainer.train()
        runs.append(weights(trainer))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-3, atol=1e-5)


# Data


def test_prompts_of_weight_0_are_left_out(tmp_path):
    trainer = make(tmp_path, rows=data([0.0, 0.5, 1.0, 0.25] * 4))
    assert trainer.dropped == 8 and set(trainer.train_dataset["pass_rate"]) == {0.5, 0.25}
    assert make(tmp_path, rows=data([0.0, 1.0] * 8), paced_a=0, paced_b=0).dropped == 0
    assert set(make(tmp_path, rows=data([0.0, 1.0] * 8), paced_b=0).train_dataset["pass_rate"]) == {1.0}
    with pytest.raises(PlanError, match="all 16 prompts have weight 0"):
        make(tmp_path, rows=data([0.0, 1.0] * 8))


@pytest.mark.parametrize("rows", [prompts(), data([0.5, 7.0] * 8)])
def test_a_row_without_pass_rate_is_an_error(tmp_path, rows):
    with pytest.raises(ValueError, match="must hold a pass rate from 0 to 1"):
        make(tmp_path, rows=rows)


# Stages


def test_divergence_switches_at_s1(tmp_path):
    """At S1 - 1 the loss is the forward KL of TRL, at S1 the reverse one."""
    trainer = train(tmp_path, cls=Watched, switch_step=2, max_steps=4)
    assert [entry["paced/beta"] for entry in logged(trainer)] == [0, 0, 1, 1]
    for step, (loss, alone, inputs) in enumerate(trainer.seen):
        w = raw(inputs["paced/p"].tolist())
        mean = {beta: sum(x * y for x, y in zip(w, rows, strict=True)) / sum(w) for beta, rows in alone.items()}
        used = 0.0 if step < 2 else 1.0
        assert loss == pytest.approx(mean[used], rel=1e-5) and mean[used] != pytest.approx(mean[1 - used], rel=1e-3)


def test_forward_and_reverse_kl_of_the_card():
    """Student [2, 0, -1], teacher [0, 1, -1]: FKL 0.938024, RKL 0.811154, with the gradients in closed form."""
    from trl_ext.distillation import Weighted

    log_p, log_q = STUDENT.log_softmax(0), TEACHER.log_softmax(0)
    p, q = log_p.exp(), log_q.exp()
    expected = {0.0: p - q, 1.0: p * (log_p - log_q - 0.811154)}
    for beta, value in ((0.0, 0.938024), (1.0, 0.811154)):
        hidden = STUDENT.view(1, 3).clone().requires_grad_()
        metrics = Metrics()
        seam = Weighted(torch.tensor([0.25]), torch.ones(1, 1), beta, True, metrics)
        args = (hidden, torch.eye(3), None, TEACHER.view(1, 3), torch.eye(3), None, beta, 1.0, 1.0, None, 1.0, None)
        divergence, _ = seam.apply(*args)
        assert divergence.item() == pytest.approx(0.25 * value, abs=1e-6)
        found = {k: float(t[0] / t[1]) for k, t in metrics.totals.items()}
        assert found == pytest.approx({"forward_kl": 0.938024, "reverse_kl": 0.811154}, abs=1e-6)
        divergence.sum().backward()
        torch.testing.assert_close(hidden.grad[0], 0.25 * expected[beta], atol=1e-5, rtol=1e-5)


def test_weights_find_their_rows_when_only_valid_positions_are_projected(monkeypatch):
    """On a GPU TRL passes the valid positions alone: 3 of 2 x 2 here."""
    from trl_ext import distillation

    class Fake:
        @staticmethod
        def apply(*args):
            return torch.ones(args[0].size(0)), torch.zeros(args[0].size(0))

    monkeypatch.setattr(distillation, "_TRLS_DIVERGENCE", Fake)
    mask, scale = torch.tensor([[1, 0], [1, 1]]), torch.tensor([2.0, 5.0])
    for states, expected in ((torch.zeros(3, 1), [2, 5, 5]), (torch.zeros(4, 1), [2, 2, 5, 5])):
        metrics = Metrics()
        seam = distillation.Weighted(scale, mask, 1.0, False, metrics)
        assert seam.apply(states)[0].tolist() == expected
        assert metrics.totals["reverse_kl"].tolist() == [3, 3]


def test_who_answers(tmp_path, monkeypatch):
    """Forward KL: the teacher; reverse KL: the student."""
    asked = []
    original = trl.DistillationTrainer._generate_single_turn

    def spy(self, *args, **kwargs):
        asked.append("teacher" if self.model_wrapped is self.teacher_model else "student")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trl.DistillationTrainer, "_generate_single_turn", spy)
    train(tmp_path, switch_step=2, max_steps=3)
    train(tmp_path, beta=0.0, max_steps=1)
    train(tmp_path, beta=0.0, max_steps=1, forward_responses="student")
    train(tmp_path, max_steps=1)
    assert asked == ["teacher", "teacher", "student", "teacher", "student", "student"]


def test_reference_responses(tmp_path):
    rows = data().map(lambda row: {"completion": [{"role": "assistant", "content": row["answer"]}]})
    trainer = train(
        tmp_path, rows=rows, cls=Watched, beta=0.0, forward_responses="reference", max_steps=1, max_completion_length=2
    )
    texts = tiny_tokenizer().batch_decode(trainer.seen[0][2]["completion_ids"])
    assert len(texts) == 8 and all(len(t.replace("<|pad|>", "").replace("<|im_end|>", "x")) == 2 for t in texts)
    digits = {t[0] for t in texts}
    assert digits <= set("0123456789")
    with pytest.raises(ValueError, match="has no 'gold'"):
        train(tmp_path, beta=0.0, forward_responses="reference", reference_column="gold", max_steps=1)


# Log, restart, evaluation


def test_metrics(tmp_path):
    """p = 0.5, 0.125, 0.875, 0.25 in equal parts over both batches: counted over the whole data set."""
    entries = logged(train(tmp_path, max_steps=2, lr_scheduler_type="constant"))
    mean = {k: sum(e[k] for e in entries) / 2 for k in entries[0] if k.startswith("paced/p_")}
    bins = {"p_0.0": 0.25, "p_0.2": 0.25, "p_0.4": 0.25, "p_0.6": 0, "p_0.8": 0.25, "p_mean": 0.4375}
    assert mean == pytest.approx({f"paced/{k}": v for k, v in bins.items()})
    for entry in entries:
        assert entry["paced/zero_weight"] == 0 and 0 < entry["paced/effective_prompts"] <= 8
        assert entry["paced/forward_kl"] > 0 and entry["paced/reverse_kl"] > 0
        assert any(entry.get(f"paced/gradient_p_{b}", 0) > 0 for b in ("0.0", "0.2", "0.4", "0.8"))
        assert "paced/gradient_p_0.6" not in entry


def test_gradient_metric_does_not_depend_on_the_weight(tmp_path):
    """The norm is that of the unweighted L_distill of a prompt."""
    found = []
    for extra in ({}, {"paced_a": 0, "paced_b": 0}):
        (entry,) = logged(train(tmp_path, max_steps=1, **extra))
        found.append({k: v for k, v in entry.items() if k.startswith("paced/gradient")})
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0]


def test_resume_equals_not_stopping(tmp_path):
    """One epoch: TRL's sampler itself starts its first order again when it resumes in a later one."""
    extra = {"switch_step": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "rows": data(RATES * 2)}
    whole = train(tmp_path, **extra)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **extra)
    assert_equal(weights(whole), weights(resumed))


def test_evaluation_is_trls(tmp_path):
    """No column, no weight, no stage."""
    trainer = make(tmp_path, switch_step=2)
    assert math.isfinite(trainer.evaluate(prompts(8))["eval_loss"])


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"paced_normalize": "mean"}, "batch, none, max"),
        ({"paced_a": -1}, "paced_a: -1 must be >= 0"),
        ({"switch_step": -1}, "switch_step: -1"),
        ({"switch_step": 2, "beta": 0.0}, "set beta: 1.0"),
        ({"beta": 0.0, "use_vllm": True}, "forward_responses: reference or student"),
    ],
)
def test_bad_settings_are_refused(tmp_path, extra, words):
    with pytest.raises(PlanError, match=words):
        PacedDistillationConfig(**settings(tmp_path, **extra))


# The scoring pass


def starts_with_low_letter(completions, answer, **kwargs):
    assert len(answer) == len(completions)
    return [float(c[0]["content"][:1] < "Z") for c in completions]


def test_scoring_pass():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_path()), tiny_tokenizer()
    before = torch.random.get_rng_state()
    found = pass_rates(model, tokenizer, prompts(5), starts_with_low_letter, samples=4, max_new_tokens=3, batch_size=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(found) == 5 and all(p * 4 == int(p * 4) for p in found) and len(set(found)) > 1
    again = with_pass_rates(
        prompts(5), model, tokenizer, starts_with_low_letter, samples=4, max_new_tokens=3, batch_size=2, smoothing=1.0
    )
    assert again["pass_rate"] == pytest.approx([(4 * p + 1) / 6 for p in found])


def test_scoring_counts_the_verdicts_of_each_row():
    """Rewards 1, 0.5, 0.2, None for the four rollouts of every row: 2 of 3."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_path()), tiny_tokenizer()

    def graded(completions, **kwargs):
        return [1.0, 0.5, 0.2, None] * (len(completions) // 4)

    assert pass_rates(model, tokenizer, prompts(3), graded, samples=4, max_new_tokens=2) == pytest.approx([2 / 3] * 3)
    with pytest.raises(ValueError, match="no verdict on any rollout of row 0"):
        pass_rates(model, tokenizer, prompts(2), lambda completions, **kw: [None] * len(completions), samples=2)
