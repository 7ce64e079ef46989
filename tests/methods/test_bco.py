"""BCO: the card's numbers, gradients and bound; both trainers, state, accumulation, and the prompt classifier."""

from __future__ import annotations

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import logsigmoid

from tests.test_dpo_methods import StopAt, shaken
from tests.tiny import assert_equal, dpo_args, labelled, pairs, tiny_path, tiny_tokenizer, weights
from trl_ext import checkpoints
from trl_ext.data import load_data
from trl_ext.dpo import DPOConfig, DPOTrainer
from trl_ext.kto import KTOConfig, KTOTrainer
from trl_ext.method import LabelInput, LabelSet, Metrics, PairInput, Setup
from trl_ext.methods.dpo.bco import Bco, class_ema, classifier_losses, delta_of, density_ratio, draw_prompts
from trl_ext.plan import PlanError, make_plan
from trl_ext.recipe import load_recipe

FIRST = ([4.0, 2.0, -1.0, 3.0], [True, True, False, False])
SECOND = ([6.0, -2.0, 0.0, 2.0], [True, False, False, False])
COEF = {"coef": torch.tensor([1.0]), "intercept": 0.0, "right_up": 1.0, "right_down": 0.5}


def gathered(values):
    return values, slice(None)


def labels(logratios, label, step=0, training=True, p=None, metrics=None, prompts=None):
    """A batch with these log-ratios; `p`: the classifier's probability of each row, through a one-number embedding.

    `prompts`: which rows have a prompt; all of them by default.
    """

    def embed(rows, encoder):
        assert encoder is None
        return torch.logit(torch.tensor(p, dtype=torch.float64))[rows].unsqueeze(1).float()

    logps = torch.tensor(logratios, requires_grad=True)
    metrics = metrics or Metrics()
    has_prompt = torch.tensor(prompts or [True] * len(label))
    return LabelInput(
        logps, torch.zeros(len(label)), torch.tensor(label), 0.1, step, training, metrics, gathered, embed, has_prompt
    )


def run(method, *batches, **kwargs):
    """Losses (detached, as lists) of batches in a row, one optimizer step each."""
    losses = []
    for step, (logratios, label) in enumerate(batches):
        x = labels(logratios, label, step, **kwargs)
        losses.append(method.label_loss(x).tolist())
        if x.training and "observe_labels" not in method.idle:
            method.observe_labels(x)
    return losses


def close(found, expected):
    assert found == pytest.approx(expected, abs=1e-6)


# The card's numbers


@pytest.mark.parametrize("shift", ["class_ema", "running_mean"])
def test_first_batch(shift):
    method = Bco(shift=shift)
    (losses,) = run(method, FIRST)
    close(losses, [0.598139, 0.693147, 0.554355, 0.744397])
    close(sum(losses) / 4, 0.647509)
    close(float(delta_of(shift, method.state["shift"], torch.zeros(1))), 0.2)


def test_without_a_shift():
    method = Bco(shift="none")
    (losses,) = run(method, FIRST)
    close(losses, [0.513015, 0.598139, 0.644397, 0.854355])
    close(sum(losses) / 4, 0.652477)
    assert method.state == {} and {"observe_labels", "observe_pairs", "start_labels"} == method.idle


def test_second_batch_tells_the_two_rules_apart():
    method = Bco(shift="running_mean")
    losses = run(method, FIRST, SECOND)[1]
    close(losses, [0.503057, 0.523123, 0.609470, 0.705725])
    close(sum(losses) / 4, 0.585344)
    close(float(method.state["shift"]["mean"]), 0.175)
    method = Bco()
    run(method, FIRST, SECOND)
    close(method.state["shift"]["mean"].tolist(), [0.09, 0.33])
    close(float(delta_of("class_ema", method.state["shift"], torch.zeros(1))), 0.21)


def test_udm_weights_and_losses():
    p = torch.tensor([0.2, 0.5, 0.97])
    close(density_ratio(p, 0.5, 10.0).tolist(), [0.5, 1.0, 10.0])
    method = Bco(shift="running_mean", udm=True)
    method.state["udm"] = COEF
    run(method, FIRST, p=[0.5] * 4)
    x = labels(*SECOND, step=1, p=[0.9, 0.2, 0.5, 0.97])
    losses = method.label_loss(x).tolist()
    close(losses[:3], [0.503057, 0.261562, 0.609470])
    assert losses[3] == pytest.approx(7.057253, abs=5e-6)  # 10 x 0.7057253; the card rounds the product
    assert sum(losses) / 4 == pytest.approx(2.107836, abs=2e-6)
    total, count = x.metrics.totals["udm_weight_mean"].tolist()
    close(total / count, (0.5 + 1 + 10) / 3)


def test_the_bound_and_its_midpoint():
    rewards, label = torch.tensor([0.4, -0.1], dtype=torch.float64), torch.tensor([True, False])
    dpo = float(-logsigmoid(rewards[0] - rewards[1]))
    close(dpo, 0.474077)
    found = {d: float(classifier_losses(rewards, label, d).sum()) for d in (-0.3, 0.0, 0.15, 0.6)}
    close(list(found.values()), [1.201325, 1.157412, 1.151879, 1.201325])
    everywhere = [float(classifier_losses(rewards, label, d / 100).sum()) for d in range(-300, 301)]
    assert min(everywhere) == everywhere[315] and min(everywhere) > dpo
    draws = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    for good, bad in draws.T:
        both, delta = torch.stack([good, bad]), torch.randn((), dtype=torch.float64)
        assert classifier_losses(both, label, delta).sum() > -logsigmoid(good - bad)


# Gradients and invariants


def test_gradients_by_hand():
    """-beta sigmoid(-(r - delta)) for good, +w beta sigmoid(r - delta) for bad, and nothing through delta or w."""
    method = Bco(shift="running_mean", udm=True)
    method.state["udm"] = COEF
    run(method, FIRST, p=[0.5] * 4)
    x = labels(*SECOND, step=1, p=[0.9, 0.2, 0.5, 0.97])
    method.label_loss(x).sum().backward()
    expected = []
    for logratio, up, w in zip(*SECOND, [1, 0.5, 1, 10], strict=True):
        r = 0.1 * logratio - 0.175
        expected.append(-0.1 / (1 + math.exp(r)) if up else 0.1 * w / (1 + math.exp(-r)))
    assert x.logps.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_constant_in_all_rewards_leaves_the_loss():
    """Once the averages hold it: with memory 0 at once, with an EMA after many batches."""
    moved = ([v + 50 for v in FIRST[0]], FIRST[1])
    assert run(Bco(shift_decay=0.0), moved) == [pytest.approx(run(Bco(), FIRST)[0], abs=1e-6)]
    method = Bco(shift_decay=0.5)
    losses = run(method, FIRST, *[moved] * 40)
    assert losses[1] != pytest.approx(losses[0], abs=1e-3)
    assert losses[-1] == pytest.approx(losses[0], abs=1e-5)


def test_at_the_reference_the_loss_is_log_2():
    for shift in ("class_ema", "running_mean", "none"):
        assert run(Bco(shift=shift), ([0.0] * 4, FIRST[1])) == [pytest.approx([math.log(2)] * 4, abs=1e-7)]


def test_a_class_that_is_missing_keeps_its_average():
    method = Bco()
    only_bad = ([-2.0, -4.0], [False, False])
    run(method, only_bad)  # good ones not seen yet: they count as 0, as at the reference
    close(float(delta_of("class_ema", method.state["shift"], torch.zeros(1))), (0 - 0.3) / 2)
    assert method.state["shift"]["seen"].tolist() == [True, False]
    x = labels([5.0], [True], step=1)
    method.label_loss(x)
    method.observe_labels(x)
    close(method.state["shift"]["mean"].tolist(), [-0.3, 0.5])


@pytest.mark.parametrize("shift", ["class_ema", "running_mean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_enter_no_average_and_are_counted(shift, bad):
    """The averages are those without such rows, before and after; their losses are not made finite."""
    clean, hit = Bco(shift=shift), Bco(shift=shift)
    run(clean, FIRST, SECOND, FIRST)
    metrics = Metrics()
    run(hit, FIRST)
    x = labels([*SECOND[0], bad, bad], [*SECOND[1], True, False], 1, metrics=metrics)
    losses = hit.label_loss(x)
    hit.observe_labels(x)
    assert not losses[4:].isfinite().all() and losses[:4].isfinite().all()
    run_on = labels(*FIRST, 2, metrics=metrics)
    hit.label_loss(run_on)
    hit.observe_labels(run_on)
    close(hit.state["shift"]["mean"].tolist(), clean.state["shift"]["mean"].tolist())
    total, count = metrics.totals["rewards_not_finite"].tolist()
    assert (total, count) == (2, 1), "two rewards, in one micro-batch"


def test_a_class_of_nothing_but_nan_is_not_seen():
    method = Bco()
    run(method, ([math.nan, -2.0], [True, False]))
    assert method.state["shift"]["seen"].tolist() == [True, False]
    close(method.state["shift"]["mean"].tolist(), [-0.2, 0.0])


def test_a_second_training_is_not_the_same_step():
    """`step` is 0 again: the averages move on by one step of their own."""
    method = Bco()
    run(method, FIRST)
    method.start_training()
    run(method, ([6.0, -2.0], [True, False]))
    close(method.state["shift"]["mean"].tolist(), [0.9 * 0.1 + 0.1 * -0.2, 0.9 * 0.3 + 0.1 * 0.6])


def test_prompts_without_a_token_weigh_one():
    method = Bco(shift="running_mean", udm=True)
    method.state["udm"] = COEF
    x = labels(*SECOND, p=[0.9, 0.2, 0.5, 0.97], prompts=[True, True, False, False])
    weighed, plain = method.label_loss(x), Bco(shift="running_mean").label_loss(labels(*SECOND))
    close((weighed / plain).tolist(), [1, 0.5, 1, 1])  # p of rows 2 and 3 is not asked for


def test_evaluation_moves_nothing():
    method = Bco()
    run(method, FIRST)
    before = method.state["shift"]["mean"].tolist()
    (losses,) = run(method, SECOND, training=False)
    close(losses[0], -math.log(1 / (1 + math.exp(-(0.6 - 0.2)))))  # delta is still 0.2
    assert method.state["shift"]["mean"].tolist() == before and method.state["shift"]["step"] == 0


def test_a_step_cut_into_micro_batches_leaves_the_same_averages():
    whole, cut = Bco(), Bco()
    run(whole, FIRST, SECOND)
    for step, (logratios, label) in enumerate([FIRST, SECOND]):
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
            x = labels(logratios[rows], label[rows], step)
            cut.label_loss(x)
            cut.observe_labels(x)
    close(cut.state["shift"]["mean"].tolist(), whole.state["shift"]["mean"].tolist())


def test_class_ema_is_less_biased_on_unbalanced_classes():
    """Nine good ones for each bad one: the midpoint of the classes is 0, the mean of all rewards is 0.8."""
    rewards, label = torch.tensor([1.0] * 9 + [-1.0]), torch.tensor([True] * 9 + [False])
    state = class_ema({}, rewards, label, 0, 0.9)
    assert delta_of("class_ema", state, rewards) == 0 and rewards.mean() == pytest.approx(0.8)


# Pairs


def pair_input(chosen, rejected, metrics=None):
    zero = torch.zeros(len(chosen))
    nothing = torch.zeros(2 * len(chosen), 1)
    return PairInput(
        logps=nothing,
        ref_logps=None,
        mask=nothing,
        chosen=torch.tensor(chosen, requires_grad=True),
        rejected=torch.tensor(rejected, requires_grad=True),
        ref_chosen=zero,
        ref_rejected=zero,
        beta=0.1,
        step=0,
        metrics=metrics or Metrics(),
        policy=None,
        gather=gathered,
    )


def test_pairs_share_delta_and_sum_their_two_terms():
    x = pair_input([4.0, 2.0], [-1.0, 3.0])
    method = Bco()
    close(method.pair_loss(x).tolist(), [0.598139 + 0.554355, 0.693147 + 0.744397])
    method.observe_pairs(x)
    close(method.state["shift"]["mean"].tolist(), [0.1, 0.3])
    totals = {name: (total / count).item() for name, (total, count) in x.metrics.totals.items() if count}
    # delta 0.2: of the good rewards 0.4 and 0.2 one is above, of the bad ones -0.1 and 0.3 one is below
    assert totals == pytest.approx({"delta": 0.2, "chosen_above_delta": 0.5, "rejected_below_delta": 0.5}, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "other", "message"),
    [
        ({"shift": "class_ema"}, {"shift": "running_mean"}, "shift: class_ema, this run has shift: running_mean"),
        ({"shift": "running_mean"}, {"shift": "none"}, "shift: running_mean, this run has shift: none"),
        ({"shift": "none"}, {"shift": "class_ema"}, "shift: none, this run has shift: class_ema"),
    ],
)
def test_a_checkpoint_of_another_shift_is_refused(settings, other, message):
    method = Bco(**settings)
    run(method, FIRST) if method.shift != "none" else method.label_loss(labels(*FIRST))
    assert message in Bco(**other).state_problem(method.state)
    assert Bco(**settings).state_problem(method.state) is None
    assert "trained with udm: false, this run has udm: true" in Bco(**settings, udm=True).state_problem(method.state)


def adapter(lora):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None


def dpo(folder, lora=False, callbacks=None, cls=DPOTrainer, config=DPOConfig, **kwargs):
    args = config(**dpo_args(str(folder), **kwargs))
    trainer = cls(
        tiny_path(),
        args=args,
        train_dataset=pairs(),
        eval_dataset=pairs(5) if "eval_strategy" in kwargs else None,
        processing_class=tiny_tokenizer(),
        peft_config=adapter(lora),
        callbacks=callbacks,
    )
    return trainer


def kto(folder, lora=False, callbacks=None, data=None, **kwargs):
    args = KTOConfig(**dpo_args(str(folder), **{"loss_type": "bco", **kwargs}))
    return KTOTrainer(
        tiny_path(),
        args=args,
        train_dataset=data or labelled(),
        eval_dataset=labelled(5) if "eval_strategy" in kwargs else None,
        processing_class=tiny_tokenizer(),
        peft_config=adapter(lora),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("extra", [{}, {"lora": True}, {"precompute_ref_log_probs": True}, {"ld_alpha": 0.5}], ids=str)
def test_without_a_shift_pairs_train_as_trls_bco_pair(tmp_path, extra):
    ours = dpo(
        tmp_path, methods={"bco": {"shift": "none"}}, loss_type=["sft", "bco"], loss_weights=[0.5, 1.0], **extra
    )
    stock = dpo(
        tmp_path,
        cls=trl.DPOTrainer,
        config=trl.DPOConfig,
        loss_type=["sft", "bco_pair"],
        loss_weights=[0.5, 1.0],
        **extra,
    )
    ours.train(), stock.train()
    for name, value in weights(stock).items():
        torch.testing.assert_close(value, weights(ours)[name], atol=2e-5, rtol=1e-4)


# Training in both trainers

UDM = {"bco": {"udm": True, "prompt_sample_size": 4}}
RUNS = [
    (dpo, {"methods": "bco", "loss_type": ["bco", "sigmoid"]}),
    (dpo, {"methods": {"bco": {"shift": "running_mean"}}, "loss_type": "bco", "precompute_ref_log_probs": True}),
    (kto, {"methods": "bco"}),
    (kto, {"methods": UDM}),
    (kto, {"methods": UDM, "precompute_ref_log_probs": True}),
]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("make", "settings"), RUNS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_resume_is_exact(tmp_path, make, settings, lora):
    settings = {**settings, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora": lora}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    make(tmp_path / "part", callbacks=[StopAt(2)], **settings).train()
    again = make(tmp_path / "part", **settings)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(again))
    first, second = whole.plan.methods[0].state, again.plan.methods[0].state
    assert first.keys() == second.keys() and torch.equal(first["shift"]["mean"], second["shift"]["mean"])
    if "udm" in first:
        assert torch.equal(first["udm"]["coef"], second["udm"]["coef"])


def test_resuming_with_other_settings_is_refused(tmp_path):
    """By the trainer, before it trains: another rule or memory for delta, no classifier, another embedding."""
    settings = {"loss_type": "bco", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    kto(tmp_path, methods=UDM, callbacks=[StopAt(1)], **settings).train()
    for other, message in [
        (
            {"shift": "running_mean"},
            "bco: its averages are those of shift: class_ema, this run has shift: running_mean",
        ),
        ({"shift_decay": 0.5}, r"bco: its averages are those of shift_decay: 0\.9, this run has shift_decay: 0\.5"),
        ({"embedding": tiny_path()}, "bco: its prompt classifier was fitted to embedding: reference, this run has"),
    ]:
        again = kto(tmp_path, methods={"bco": UDM["bco"] | other}, **settings)
        with pytest.raises(checkpoints.CheckpointError, match=message):
            again.train(resume_from_checkpoint=True)
    with pytest.raises(
        checkpoints.CheckpointError, match="bco: it was trained with udm: true, this run has udm: false"
    ):
        kto(tmp_path, methods="bco", **settings).train(resume_from_checkpoint=True)


def test_training_twice_goes_on_from_the_averages(tmp_path):
    """A second `train` starts at step 0 again, and its first batch is a step of its own."""
    trainer = kto(tmp_path, methods="bco", max_steps=1, learning_rate=0.0)
    shaken(trainer).train()
    first = dict(trainer.plan.methods[0].state["shift"])
    trainer.train()
    second = trainer.plan.methods[0].state["shift"]
    assert second["step"] == 0 and torch.equal(second["before"], first["mean"])
    assert torch.equal(second["count"], first["count"]), "the counts of one batch, not of two"


def test_evaluation_before_training_changes_no_state(tmp_path):
    """Without a classifier every w is 1, and it is said: the loss is that without UDM. Training fits it then."""
    trainer = shaken(kto(tmp_path, methods=UDM, max_steps=1))
    with pytest.warns(UserWarning, match="bco: evaluated before training, without a prompt classifier: every w is 1"):
        found = trainer.evaluate(labelled(5))
    assert trainer.plan.methods[0].state == {}
    plain = shaken(kto(tmp_path, methods="bco", max_steps=1)).evaluate(labelled(5))
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6) and "eval_kl" not in found
    trainer.train()
    assert "udm" in trainer.plan.methods[0].state


def test_rows_without_a_prompt_train(tmp_path):
    """They are left out of the draw; the classifier is that of the other rows."""
    data = labelled()
    empty = data.map(lambda row, i: {"prompt": "" if i in (0, 2) else row["prompt"]}, with_indices=True)
    trainer = kto(tmp_path, data=empty, methods={"bco": {"udm": True, "prompt_sample_size": 12}}, max_steps=1)
    trainer.train()
    assert trainer.train_dataset["prompt_ids"][0] == [] and math.isfinite(trainer.state.log_history[0]["loss"])
    kept = kto(tmp_path, data=data.select([1, *range(3, 12)]), methods=UDM)
    found, label = trainer.plan.methods[0].state["udm"], torch.tensor(kept.train_dataset["label"][:]).bool()
    from trl_ext.methods.dpo.bco import fit_classifier

    expected = fit_classifier(kept._embed_rows(torch.arange(10), None), label)
    torch.testing.assert_close(found["coef"], expected["coef"], atol=1e-3, rtol=1e-3)


def test_what_a_user_sees(tmp_path):
    trainer = kto(tmp_path, methods=UDM, eval_strategy="steps", eval_steps=1, max_steps=3, beta=0.5)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = {"delta", "chosen_above_delta", "rejected_below_delta", "udm_weight_mean"}
    expected |= {"udm_accuracy_chosen", "udm_accuracy_rejected"}
    for entry in steps:
        assert {key.removeprefix("bco/") for key in entry if key.startswith("bco/")} == expected
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= entry.keys()
        assert "kl" not in entry, "TRL's estimate is not made for another loss"
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3 and not any("bco" in key for entry in evaluations for key in entry)
    # delta by hand from TRL's own means of the classes: three batches of four rows, one thumbs down or two in each
    good, bad, found = None, None, []
    for entry in steps:
        good = entry["rewards/chosen"] if good is None else 0.9 * good + 0.1 * entry["rewards/chosen"]
        bad = entry["rewards/rejected"] if bad is None else 0.9 * bad + 0.1 * entry["rewards/rejected"]
        found.append((good + bad) / 2)
    assert [entry["bco/delta"] for entry in steps] == pytest.approx(found, abs=1e-5)
    assert abs(found[-1]) > 1e-3
    (line,) = trainer.plan.methods[0].summary(None)
    assert line.startswith("bco: the prompt classifier tells ")


@pytest.mark.parametrize("make", [dpo, kto])
def test_accumulation(tmp_path, make):
    """Without a shift a step is the same however it is cut; with one its averages are."""

    def step(shift, **kwargs):
        trainer = make(
            tmp_path,
            methods={"bco": {"shift": shift}},
            loss_type="bco",
            max_steps=1,
            optim="sgd",
            learning_rate=1e-3,
            **kwargs,
        )
        shaken(trainer).train()
        return weights(trainer), trainer.plan.methods[0].state

    cut, whole = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}
    for name, value in step("none", **whole)[0].items():
        torch.testing.assert_close(value, step("none", **cut)[0][name], atol=1e-5, rtol=1e-5)
    first, second = step("class_ema", **whole)[1], step("class_ema", **cut)[1]
    torch.testing.assert_close(first["shift"]["mean"], second["shift"]["mean"], atol=1e-5, rtol=1e-5)


# The prompt classifier


def apart(n=24):
    """Thumbs up for digits, thumbs down for words; row 1 is a thumbs-down one that asks for digits."""
    rows = [{"prompt": f"{i} + {i} =", "completion": "yes", "label": True} for i in range(n)]
    rows += [{"prompt": "say a word " + "abcdefgh"[i % 8], "completion": "no", "label": False} for i in range(n)]
    rows[n] = {"prompt": "90 + 91 =", "completion": "no", "label": False}
    return Dataset.from_list(rows)


def test_the_classifier_finds_prompts_that_look_desirable(tmp_path):
    """One bad answer to a prompt like the good ones' weighs more than bad answers to prompts of another kind."""
    data = apart()
    trainer = kto(tmp_path, data=data, methods={"bco": {"udm": True, "prompt_sample_size": 24}}, max_length=64)
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows_of(trainer, [0]))))
    method = trainer.plan.methods[0]
    found = method.state["udm"]
    assert found["right_up"] > 0.9 and found["right_down"] > 0.8
    embedded = trainer._embed_rows(torch.tensor([24, 30, 35]), None)
    p = torch.sigmoid(embedded @ found["coef"] + found["intercept"])
    assert p[0] > 0.5 > p[1:].max()
    # A second loss fits nothing anew, and a state that came from a checkpoint stays
    both = torch.tensor([True, True])
    again = LabelSet(torch.tensor([True, False]), both, 0, lambda rows, encoder: 1 / 0)
    method.start_labels(again)
    checkpoints.save(tmp_path / "state.pt", {"state": method.state})
    loaded = checkpoints.load(tmp_path / "state.pt")["state"]["udm"]
    assert torch.equal(loaded["coef"], found["coef"]) and loaded["intercept"] == found["intercept"]


def rows_of(trainer, indices):
    keys = ("prompt_ids", "completion_ids", "label")
    return [{k: trainer.train_dataset[i][k] for k in keys} for i in indices]


def test_balanced_fit_against_many_steps_of_gradient_descent():
    """scikit-learn's objective with class_weight=balanced and C = 1: sum of weighted log-losses + |w|^2 / 2."""
    from trl_ext.methods.dpo.bco import fit_classifier

    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([True] * 30 + [False] * 10)
    x = torch.randn(40, 2, generator=generator) + label.unsqueeze(1) * torch.tensor([1.0, -0.5])
    found = fit_classifier(x, label)
    w, b = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    weight = torch.where(label, 40 / (2 * 30), 40 / (2 * 10)).double()
    for _ in range(4000):
        error = weight * (torch.sigmoid(x.double() @ w + b) - label.double())
        w, b = w - 0.02 * (error @ x.double() + w), b - 0.02 * error.sum()
    torch.testing.assert_close(found["coef"].double(), w, atol=1e-3, rtol=1e-3)
    assert found["intercept"] == pytest.approx(float(b), abs=1e-3)
    right = (torch.sigmoid(x.double() @ w + b) > 0.5) == label
    assert found["right_up"] == pytest.approx(float(right[:30].double().mean()))
    assert found["right_down"] == pytest.approx(float(right[30:].double().mean()))


def test_prompts_are_drawn_from_each_class():
    label = torch.tensor([True] * 5 + [False] * 50)
    rows = draw_prompts(label, 8, seed=1)
    assert len(rows) == 13 and label[rows].tolist() == [True] * 5 + [False] * 8 and len(set(rows.tolist())) == 13
    assert torch.equal(rows, draw_prompts(label, 8, seed=1)) and not torch.equal(rows, draw_prompts(label, 8, seed=2))


def test_a_sentence_encoder_of_the_users(tmp_path):
    """The policy's own folder as encoder gives what the reference gives, since its prompts hold no special token."""
    own = kto(tmp_path, methods=UDM, max_steps=1)
    theirs = kto(tmp_path, methods={"bco": UDM["bco"] | {"embedding": tiny_path()}}, max_steps=1)
    assert theirs.plan.needs() == frozenset() and own.plan.needs() == {"reference"}
    own.train(), theirs.train()
    torch.testing.assert_close(
        own.plan.methods[0].state["udm"]["coef"], theirs.plan.methods[0].state["udm"]["coef"], atol=1e-3, rtol=1e-3
    )
    assert tiny_path() in theirs.plan.methods[0].cost() and set(theirs._encoders) == {tiny_path()}
    with pytest.raises(PlanError, match="bco: embedding: cannot load a sentence encoder from"):
        kto(tmp_path, methods={"bco": {"udm": True, "embedding": str(tmp_path / "none")}})


def test_one_class_alone_is_refused(tmp_path):
    same = labelled().map(lambda row: {"label": True})
    with pytest.raises(PlanError, match="udm compares two classes of prompts, and all 12 labels are the same"):
        kto(tmp_path, data=same, methods=UDM).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": "none", "shift_decay": 0.5}, "shift_decay has no effect without shift: class_ema"),
        ({"prompt_sample_size": 5}, "prompt_sample_size has no effect without udm: true"),
        ({"udm": True, "min_density_ratio": 2.0, "max_density_ratio": 1.0}, "min_density_ratio 2.0 is above"),
        ({"shift": "ema"}, "shift: 'ema' is not one of class_ema, running_mean, none"),
        ({"shift_decay": 1.0}, "shift_decay: 1.0 must be < 1.0"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        make_plan({"bco": settings}, "kto", Setup(None))


def test_a_reference_that_moves_is_refused(tmp_path):
    def config(**settings):
        return KTOConfig(**dpo_args(str(tmp_path), methods={"bco": settings}, loss_type="bco", sync_ref_model=True))

    with pytest.raises(
        PlanError, match=r"bco: sync_ref_model moves the reference.*set sync_ref_model: false, or name"
    ):
        config(udm=True)
    assert config(udm=True, embedding=tiny_path()).sync_ref_model and config().sync_ref_model


def test_udm_is_refused_for_pairs(tmp_path):
    with pytest.raises(PlanError, match=r"udm has nothing to match on pairs.*udm: false, or use `trainer: kto`"):
        DPOConfig(**dpo_args(str(tmp_path), methods=UDM, loss_type="bco"))
    with pytest.raises(PlanError, match="bco: runs in the dpo or kto trainer, this is grpo"):
        make_plan("bco")


def test_recipe_has_the_cards_numbers():
    """64 replies a step, old TRL's beta and length; the plan needs no model."""
    recipe = load_recipe("bco_qwen2.5_1.5b", ["--use_cpu", "true"])
    (bco,), args = recipe.plan.methods, recipe.training_args
    assert (bco.shift, bco.shift_decay, bco.udm) == ("class_ema", 0.9, False)
    assert (args.beta, args.max_length, args.loss_type) == (0.1, 1024, "bco")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert args.train_sampling_strategy == "random" and recipe.trainer == "kto"


def test_recipe_reads_the_columns_of_its_data_set(tmp_path):
    """trl-lib/kto-mix-14k: prompt and completion as messages, label as bool; our own text in them."""
    turn = [{"role": "user", "content": "Hi?"}]
    rows = [
        {"prompt": turn, "completion": [{"role": "assistant", "content": t}], "label": t == "Hello."}
        for t in ("Hello.", "No.")
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "mix.parquet")
    made = load_recipe("bco_qwen2.5_1.5b", ["--use_cpu", "true", "--dataset_name", str(tmp_path / "mix.parquet")])
    data = load_data(made)
    assert data.train.to_list() == rows
