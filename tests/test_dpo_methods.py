"""What methods see and add in DPO: values against a slow reference, weights of losses, state, metrics, errors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import trl
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

from tests.tiny import assert_equal, dpo_args, pairs, tiny_path, tiny_tokenizer, weights
from trl_ext.checkpoints import CheckpointError
from trl_ext.dpo import DPOConfig, DPOTrainer
from trl_ext.method import ENTROPY_AT_ROLLOUT, HIDDEN, REF_LOGPS, TEACHER, Method, param
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError


@dataclass(frozen=True)
class Pairwise(Method):
    """Base of the methods here; keeps the last input that it saw."""

    title = "A paper"
    paper = "2305.18290"
    trainer = "dpo"
    seen = None

    def observe_pairs(self, x):
        type(self).seen = x


@dataclass(frozen=True)
class Logistic(Pairwise):
    """TRL's sigmoid loss, a metric, and a count and a running margin as state. The margin moves the loss once it is
    known, so that a resume without state would train another model."""

    name = "logistic"
    use_state: bool = param(False, "Shift the loss by the running margin", source="test")

    def margin(self, x):
        return (x.chosen - x.ref_chosen) - (x.rejected - x.ref_rejected)

    def pair_loss(self, x):
        margin = self.margin(x)
        x.metrics.mean("margin", margin)
        shift = self.state.get("margin", 0.0) if self.use_state else 0.0
        return -logsigmoid(x.beta * (margin - shift))

    def observe_pairs(self, x):
        super().observe_pairs(x)
        everyone, _ = x.gather(self.margin(x).detach())
        self.state["margin"] = 0.5 * self.state.get("margin", torch.zeros(())) + 0.5 * everyone.mean()
        self.state["batches"] = self.state.get("batches", 0) + 1


@dataclass(frozen=True)
class Anchor(Pairwise):
    """weight * -mean(log pi(chosen)) beside TRL's loss."""

    name = "anchor"
    weight: float = param(0.5, "Weight", source="test", ge=0.0)

    def pair_aux_loss(self, x):
        return None if self.weight == 0 else -self.weight * x.chosen.mean()


@dataclass(frozen=True)
class Curious(Pairwise):
    """Changes nothing and needs hidden states and the reference per token."""

    name = "curious"

    def needs(self):
        return frozenset({HIDDEN, REF_LOGPS})


@dataclass(frozen=True)
class Greedy(Pairwise):
    """Needs what only GRPO has."""

    name = "greedy"

    def needs(self):
        return frozenset({TEACHER, ENTROPY_AT_ROLLOUT})


@dataclass(frozen=True)
class Scalar(Pairwise):
    """Returns a mean where a loss per pair is due."""

    name = "scalar"

    def pair_loss(self, x):
        return x.chosen.mean()


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    for cls in (Logistic, Anchor, Curious, Greedy, Scalar):
        monkeypatch.setitem(METHODS, cls.name, cls)
        monkeypatch.setattr(cls, "seen", None)


def make(folder, cls=DPOTrainer, config=DPOConfig, lora=False, evaluation=None, callbacks=None, **kwargs):
    return cls(
        tiny_path(),
        args=config(**dpo_args(str(folder), **kwargs)),
        train_dataset=pairs(),
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def shaken(trainer):
    """Moves the trained weights off the reference, by the same amounts for every trainer of one kind."""
    generator = torch.Generator().manual_seed(1)
    for param_ in trainer.model.parameters():
        if param_.requires_grad:
            param_.data.add_(0.05 * torch.randn(param_.shape, generator=generator))
    return trainer


def batch_of(trainer, n=4):
    """The first n pairs as the trainer collates them, with precomputed reference sums if it has them."""
    rows = [trainer.train_dataset[i] for i in range(n)]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    return trainer._prepare_inputs(trainer.data_collator([{k: r[k] for k in keys if k in r} for r in rows]))


def loss_and_gradient(trainer):
    """Loss (scalar) and gradients of one batch at shaken weights."""
    shaken(trainer).model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_gradient(first, second):
    (loss, gradient), (other_loss, other_gradient) = first, second
    torch.testing.assert_close(loss, other_loss, atol=1e-6, rtol=1e-6)
    assert gradient.keys() == other_gradient.keys() and any(g.abs().max() > 1e-3 for g in gradient.values())
    for name, value in gradient.items():
        torch.testing.assert_close(value, other_gradient[name], atol=1e-6, rtol=1e-6)


# What a method sees


def by_hand(model, batch, ld_alpha):
    """Per-token log-probs (2B, S) from full logits, and sums with one loop per row."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    logps = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask
    half, sums = len(logps) // 2, []
    for i, row in enumerate(logps):
        shared = min(int(mask[i % half].sum()), int(mask[i % half + half].sum()))
        own = [value for value, used in zip(row, mask[i], strict=True) if used]
        sums.append(sum(own[:shared]) + (1.0 if ld_alpha is None else ld_alpha) * sum(own[shared:]))
    return logps, torch.stack([torch.as_tensor(s) for s in sums])


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("lora", [False, True])
def test_values_of_both_forwards(tmp_path, lora, ld_alpha):
    trainer = shaken(make(tmp_path, lora=lora, methods="curious", ld_alpha=ld_alpha))
    batch = batch_of(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    x, n = Curious.seen, 4
    logps, sums = by_hand(trainer.model, batch, ld_alpha)
    stock = make(tmp_path).model  # the weights before they were shaken
    ref_logps, ref_sums = by_hand(stock, batch, ld_alpha)
    assert (logps - ref_logps).abs().max() > 0.1
    for got, expected in [(x.logps, logps), (x.ref_logps, ref_logps)]:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for got, expected in [(x.chosen, sums[:n]), (x.rejected, sums[n:]), (x.ref_chosen, ref_sums[:n])]:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(x.ref_rejected, ref_sums[n:], atol=1e-4, rtol=1e-5)
    assert torch.equal(x.mask, batch["completion_mask"][:, 1:]) and x.beta == 0.2 and x.step == 0
    targets = batch["input_ids"][:, 1:][x.mask.bool()]
    distributions = x.policy.log_probs_at(x.mask.bool())
    torch.testing.assert_close(distributions[range(len(targets)), targets], x.logps[x.mask.bool()])
    assert x.policy.hidden.requires_grad and x.logps.requires_grad and not x.ref_logps.requires_grad


def test_precomputed_reference(tmp_path):
    def seen(**kwargs):
        trainer = shaken(make(tmp_path, methods="anchor", ld_alpha=0.3, **kwargs))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch_of(trainer))
        return Anchor.seen

    once, always = seen(precompute_ref_log_probs=True), seen()
    assert once.ref_logps is None and once.policy is None
    torch.testing.assert_close(once.ref_chosen, always.ref_chosen)
    torch.testing.assert_close(once.ref_rejected, always.ref_rejected)


# What a method adds


@pytest.mark.parametrize(
    "extra",
    [{}, {"lora": True}, {"ld_alpha": 0.3}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "mine, theirs",
    [
        ({"loss_type": "logistic"}, {"loss_type": "sigmoid"}),
        (
            {"loss_type": ["sft", "logistic"], "loss_weights": [0.3, 0.7]},
            {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.3, 0.7]},
        ),
        ({"loss_type": ["logistic", "logistic"], "loss_weights": [0.5, 2]}, {"loss_weights": [2.5]}),
    ],
)
def test_own_loss_equals_the_same_loss_of_trl(tmp_path, extra, mine, theirs):
    ours = loss_and_gradient(make(tmp_path, methods="logistic", **extra, **mine))
    assert_same_gradient(ours, loss_and_gradient(make(tmp_path, trl.DPOTrainer, trl.DPOConfig, **extra, **theirs)))


def test_auxiliary_is_added_once(tmp_path):
    """loss(weight 0.5) - loss(weight 0) = -0.5 * mean of the chosen sums; the gradients likewise."""
    with_it = loss_and_gradient(make(tmp_path, methods={"anchor": {"weight": 0.5}}))
    chosen = Anchor.seen.chosen.detach()
    without = loss_and_gradient(make(tmp_path, methods={"anchor": {"weight": 0}}))
    torch.testing.assert_close(with_it[0] - without[0], -0.5 * chosen.mean())
    trainer = shaken(make(tmp_path))
    batch = batch_of(trainer)
    (-0.5 * by_hand(trainer.model, batch, None)[1][:4].mean()).backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(with_it[1][name] - without[1][name], p.grad, atol=1e-4, rtol=1e-4)


def test_accumulation_does_not_scale(tmp_path):
    """4 pairs at once and 2 x 2 pairs make the same step: own losses and auxiliaries are batch means, as TRL's."""
    methods = {"logistic": {}, "anchor": {}}

    def run(**kwargs):
        trainer = make(
            tmp_path,
            methods=methods,
            loss_type=["sigmoid", "logistic"],
            max_steps=2,
            optim="sgd",
            learning_rate=1e-3,
            **kwargs,
        )
        trainer.train()
        return weights(trainer)

    small = run(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for name, value in run(per_device_train_batch_size=4).items():
        torch.testing.assert_close(value, small[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hook", ["pair_loss", "observe_pairs"])
def test_trl_has_its_own_losses_back_after_an_error(tmp_path, monkeypatch, hook):
    def fails(self, x):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(Logistic, hook, fails)
    trainer = make(tmp_path, methods="logistic", loss_type=["logistic", "sft"])
    before = (trainer.loss_types, trainer.loss_weights, trainer.ref_model)
    trainer.model.train()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.compute_loss(trainer.model, batch_of(trainer))
    assert before == (["logistic", "sft"], [1.0, 1.0], trainer.ref_model)
    assert before == (trainer.loss_types, trainer.loss_weights, trainer.ref_model)


def test_loss_of_a_wrong_shape_is_refused(tmp_path):
    trainer = make(tmp_path, methods="scalar", loss_type="scalar")
    with pytest.raises(ValueError, match=r"scalar: pair_loss must return one loss per pair, \(4,\), got \(\)"):
        trainer.compute_loss(trainer.model, batch_of(trainer))


# State, metrics, evaluation


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("lora", [False, True])
def test_resume_is_exact(tmp_path, lora):
    settings = {
        "methods": {"logistic": {"use_state": True}, "anchor": {}},
        "loss_type": ["logistic", "sft"],
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lora": lora,
    }
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    make(tmp_path / "part", callbacks=[StopAt(2)], **settings).train()
    again = make(tmp_path / "part", **settings)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(again))
    first, second = whole.plan.methods[0].state, again.plan.methods[0].state
    assert first["batches"] == second["batches"] == 4 and torch.equal(first["margin"], second["margin"])
    with pytest.raises(CheckpointError, match=r"trained with methods \['logistic', 'anchor'\]"):
        make(tmp_path / "part", **settings | {"methods": "anchor", "loss_type": "sigmoid"}).train(True)
    card = (tmp_path / "whole/README.md").read_text()
    assert "- trl-ext" in card and "- `logistic`: A paper, [arXiv 2305.18290]" in card and "`use_state=True`" in card


def test_metrics_and_evaluation(tmp_path):
    trainer = make(
        tmp_path,
        methods="logistic",
        loss_type="logistic",
        evaluation=pairs(5),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    logs = trainer.state.log_history
    steps = [entry for entry in logs if "loss" in entry]
    evaluations = [entry for entry in logs if "eval_loss" in entry]
    assert len(steps) == len(evaluations) == 3
    for entry in steps:  # TRL's margin is ours times beta: an evaluation in between leaves no trace
        assert entry["logistic/margin"] == pytest.approx(entry["rewards/margins"] / 0.2, rel=1e-5, abs=1e-6)
    assert trainer.plan.methods[0].state["batches"] == 3
    stock = make(tmp_path, trl.DPOTrainer, trl.DPOConfig, evaluation=pairs(5), eval_strategy="steps", eval_steps=1)
    stock.train()
    expected = [entry["eval_loss"] for entry in stock.state.log_history if "eval_loss" in entry]
    assert [entry["eval_loss"] for entry in evaluations] == pytest.approx(expected, abs=1e-5)
    assert not any(key.startswith("eval_logistic") for entry in evaluations for key in entry)


def test_auxiliaries_stay_out_of_evaluation(tmp_path):
    trainer = make(tmp_path, methods="anchor")
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    assert Anchor.seen is None and loss.item() == pytest.approx(0.693147, abs=1e-5)  # log 2 at the reference


def test_loss_that_is_not_finite_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Anchor, "pair_aux_loss", lambda self, x: x.chosen.mean() * float("nan"))
    with caplog.at_level("WARNING"):
        make(tmp_path, methods="anchor", max_steps=1).train()
    assert "The loss was NaN or infinite in 1 micro-batches" in caplog.text


# Errors for people


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"loss_type": "sigmiod"}, "loss_type: 'sigmiod' is neither .* did you mean 'sigmoid'"),
        ({"loss_type": "logistic"}, "loss_type: 'logistic' is neither a loss of TRL nor a method under `methods`"),
        ({"loss_type": "logistik", "methods": "logistic"}, "did you mean 'logistic'"),
        ({"methods": "anchor", "loss_type": "anchor"}, "'anchor' is neither"),
        ({"methods": "logistic"}, r"logistic: .*name it: `loss_type: \[logistic\]` or \[sigmoid, logistic\]"),
        ({"methods": "logistic", "loss_type": "logistic", "use_weighting": True}, "set `use_weighting: false`"),
        ({"methods": "logistic", "loss_type": "logistic", "f_divergence_type": "forward_kl"}, "set it to reverse_kl"),
        (
            {"methods": "logistic", "loss_type": "logistic", "f_alpha_divergence_coef": 0.3},
            r"logistic: f_alpha_divergence_coef is read by .* leave it at 0\.5",
        ),
        ({"f_divergence_type": "forward_lk"}, "'forward_lk' is not one of .* did you mean 'forward_kl'"),
        ({"methods": "curious", "precompute_ref_log_probs": True}, "curious: needs the reference per token"),
        ({"methods": "greedy"}, "greedy: the dpo trainer does not provide entropy_at_rollout, teacher"),
        ({"methods": "high_entropy"}, "high_entropy: runs in the grpo trainer, this is dpo"),
        ({"methods": "ancor"}, "unknown method 'ancor', did you mean 'anchor'"),
        ({"methods": '{"anchor": {"weight": -1}}'}, "anchor: weight: -1.0 must be >= 0.0"),
    ],
)
def test_configurations_that_cannot_run(tmp_path, kwargs, message):
    with pytest.raises(PlanError, match=message):
        DPOConfig(**dpo_args(str(tmp_path), **kwargs))


@pytest.mark.parametrize("methods", ["{logistic: {use_state: true}}", '\'{"logistic": {"use_state": true}}\''])
def test_a_recipe_of_trl_takes_methods(tmp_path, methods):
    lines = [f"output_dir: {tmp_path}", "bf16: false", "loss_type: [sft, logistic]", f"methods: {methods}"]
    (tmp_path / "dpo.yaml").write_text("\n".join(lines))
    (args,) = trl.TrlParser((DPOConfig,)).parse_args_and_config(["--config", str(tmp_path / "dpo.yaml")])
    assert args.methods == {"logistic": {"use_state": True}} and args.loss_type == ["sft", "logistic"]


def test_all_problems_at_once(tmp_path):
    with pytest.raises(PlanError) as error:
        DPOConfig(**dpo_args(str(tmp_path), loss_type=["a", "b"], methods="logistic", use_weighting=True))
    assert len(error.value.problems) == 4


def test_a_configuration_changed_later_is_checked_again(tmp_path):
    args = DPOConfig(**dpo_args(str(tmp_path)))
    args.methods = "logistic"
    with pytest.raises(PlanError, match=r"logistic: .*name it"):
        DPOTrainer("no such model: it must not be loaded", args=args, train_dataset=pairs())
