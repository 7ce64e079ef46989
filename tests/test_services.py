"""What the trainer computes for methods: hidden states, full distributions, teacher and reference, streams, metrics."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import trl_ext
from tests.tiny import grpo_args, letters_reward, prompts, tiny_path, weights
from trl_ext import ops
from trl_ext.forward import Snapshot
from trl_ext.method import HIDDEN, POLICY, REFERENCE, TEACHER, Method, Metrics
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError

SEEN: list = []


@dataclass(frozen=True)
class Probe(Method):
    """Base of the test methods: known by the name "probe"."""

    name = "probe"
    title = paper = "none"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(method class, model settings, trainer arguments) -> the trainer after training; SEEN is emptied."""

    def run(cls, model=(), peft=None, nf4=False, **kwargs):
        SEEN.clear()
        monkeypatch.setitem(METHODS, "probe", cls)
        args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), **kwargs), methods="probe")
        path = tiny_path(**dict(model))
        trainer = trl_ext.GRPOTrainer(
            path, letters_reward, args, prompts(), peft_config=LORA[peft], quantization_config=NF4 if nf4 else None
        )
        trainer.train()
        return trainer

    return run


LORA = {
    None: None,
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "lora_and_head": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@dataclass(frozen=True)
class FullDistribution(Probe):
    """Log-probs of the sampled tokens from the hidden states, beside the ones that TRL computed."""

    def needs(self):
        return frozenset({HIDDEN})

    def aux_loss(self, x):
        valid = x.mask.bool()
        log_probs = x.policy.log_probs_at(valid)
        sampled = log_probs.gather(1, x.completion_ids[valid].unsqueeze(1)).squeeze(1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        SEEN.append((sampled, x.logps[valid], entropy, x.entropy[valid], x.policy.hidden))
        return None


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"temperature": 0.7},
        {"model": (("final_logit_softcapping", 3.0),)},
        {"model": (("logit_scale", 0.3),)},
        {"model": (("logits_scaling", 4.0),)},
        {"model": (("lm_head_multiplier", 0.5),)},
        {"model": (("tie_word_embeddings", True),)},
        {"cast_lm_head_to_fp32": True},
        {"peft": "lora"},
        {"peft": "lora_and_head"},
        {"peft": "lora", "nf4": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "peft": "lora"},
    ],
    ids=str,
)
def test_full_distribution_agrees_with_trl(train, case):
    """Same log-prob and entropy as TRL's fused head, same forward, gradient intact."""
    train(FullDistribution, max_steps=1, **case)
    sampled, logps, entropy, trl_entropy, hidden = SEEN[0]
    torch.testing.assert_close(sampled, logps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, trl_entropy, rtol=1e-4, atol=1e-5)
    assert sampled.requires_grad and hidden.shape[:2] == (8, 6)


@dataclass(frozen=True)
class OneForward(FullDistribution):
    """Counts forwards of the backbone."""


def test_hidden_states_cost_no_second_forward(train, monkeypatch):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    calls = []
    forward = Qwen3Model.forward
    monkeypatch.setattr(
        Qwen3Model, "forward", lambda self, *a, **k: calls.append(torch.is_grad_enabled()) or forward(self, *a, **k)
    )
    train(OneForward, max_steps=1)
    assert sum(calls) == 1, "one forward with gradient; generation has none"


@dataclass(frozen=True)
class Others(Probe):
    """Runs reference, teacher and policy on rows 1 and 3 with another prompt."""

    owns = ("teacher",)

    def needs(self):
        return frozenset({TEACHER, REFERENCE})

    def sync_teacher(self, step, run):
        return step in (0, 2)

    def aux_loss(self, x):
        rows = torch.tensor([1, 3])
        ids, mask = torch.tensor([[0, 0, 9, 8], [7, 6, 5, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        everywhere = torch.ones_like(x.mask[rows]).bool()
        SEEN.append(
            {which: x.other(which, rows, ids, mask).log_probs_at(everywhere) for which in (POLICY, TEACHER, REFERENCE)}
            | {"ids": torch.cat([ids, x.completion_ids[rows]], 1), "attention": mask, "own": x.other(POLICY).hidden}
        )
        return None


def plain_log_probs(model, seen):
    """The slow way: all logits of a stock model, then the completion's positions."""
    attention = torch.cat([seen["attention"], torch.ones(2, 6, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(seen["ids"], attention_mask=attention).logits
    return logits[:, 3:-1].log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("case", [{}, {"beta": 0.1}, {"peft": "lora"}, {"peft": "lora_and_head"}], ids=str)
def test_reference_teacher_and_policy(train, case):
    train(Others, max_steps=4, **case)
    start = AutoModelForCausalLM.from_pretrained(tiny_path())
    for step, seen in enumerate(SEEN):
        torch.testing.assert_close(seen[REFERENCE], plain_log_probs(start, seen), rtol=1e-4, atol=1e-5)
        same = torch.allclose(seen[TEACHER], seen[POLICY], atol=1e-6)
        assert same == (step in (0, 2)), f"step {step}: the teacher follows at 0 and 2 only"
        assert seen["own"].shape[0] == 8 and not seen[TEACHER].requires_grad
    assert not torch.allclose(SEEN[3][REFERENCE], plain_log_probs(start, SEEN[3]) + 1e-3)
    assert not torch.allclose(SEEN[3][POLICY], SEEN[3][REFERENCE], atol=1e-4), "the policy has moved"


def test_snapshot_leaves_the_weights_alone_after_an_error():
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    snapshot = Snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    now = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), snapshot.in_place():
        assert not torch.equal(model.lm_head.weight, now["lm_head.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(p, now[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="other weights"):
        snapshot.load({"lm_head.weight": torch.zeros(1)})


@dataclass(frozen=True)
class Streamed(Probe):
    """A row's value at rollout time must be the row's value in the loss, after TRL's shuffle and split."""

    def streams(self, rollout):
        assert len(rollout.completions) == len(rollout.rows) == 8
        assert {row["answer"] for row in rollout.rows} <= set(prompts()["answer"])
        return {"total": (rollout.completion_ids * rollout.mask).sum(1), "tokens": rollout.completion_ids.clone()}

    def observe_loss(self, x):
        SEEN.append((x.streams["total"], (x.completion_ids * x.mask).sum(1), x.streams["tokens"], x.completion_ids))


def test_streams_survive_shuffle_and_split(train):
    train(Streamed, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_iterations=2)
    assert len(SEEN) == 12
    for carried, now, tokens, ids in SEEN:
        assert torch.equal(carried, now) and torch.equal(tokens, ids)


@dataclass(frozen=True)
class ShortStream(Probe):
    def streams(self, rollout):
        return {"x": torch.zeros(3)}


def test_a_stream_of_the_wrong_length_is_refused(train):
    with pytest.raises(ValueError, match="stream 'x' has 3 rows, not 8"):
        train(ShortStream)


@dataclass(frozen=True)
class Sampled(Probe):
    """Log-probs of the sampled tokens, from TRL's forward for the old ones and from a forward of our own."""

    def needs(self):
        return frozenset({REFERENCE})

    def sampled(self, policy, completion_ids, mask):
        SEEN.append(("block", completion_ids.size(0)))
        own = policy.log_probs_at(torch.ones_like(mask).bool()).view(*mask.shape, -1)
        return {"logps": own.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)}

    def streams(self, rollout):
        rows = torch.arange(8).split(rollout.micro_batch)[-1]
        everywhere = torch.ones_like(rollout.mask[rows]).bool()
        both = [rollout.other(which, rows).log_probs_at(everywhere) for which in (POLICY, REFERENCE)]
        chosen = rollout.completion_ids[rows].flatten().unsqueeze(1)
        SEEN.append(("other", *(log_p.gather(1, chosen).view(rows.numel(), -1) for log_p in both)))
        return {}

    def observe_loss(self, x):
        SEEN.append(("loss", x))


@pytest.mark.parametrize("peft", [None, "lora"])
def test_values_of_the_sampling_weights(train, peft):
    """Two passes over a rollout: block by block, row by row TRL's old log-probs; with beta also its reference."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    train(Sampled, peft=peft, num_iterations=2, max_steps=4, beta=0.1, **split)
    kinds = [entry[0] for entry in SEEN]
    assert kinds == (["block"] * 2 + ["other"] + ["loss"] * 4) * 2
    assert {entry[1] for entry in SEEN if entry[0] == "block"} == {4}
    for entry in (x for kind, x in (e for e in SEEN if e[0] == "loss")):
        valid = entry.mask.bool()
        carried = entry.streams["logps"]
        torch.testing.assert_close(carried[valid], entry.old_logps[valid], rtol=1e-4, atol=1e-5)
    (_, policy, reference) = [entry for entry in SEEN if entry[0] == "other"][1]
    assert policy.shape == (4, 6) and not torch.allclose(policy, reference, atol=1e-4), "the policy has moved"


def test_on_policy_nothing_is_sampled_twice(train):
    """TRL makes no forward for old log-probs then, and none is added; the loss's own forward has those weights."""
    train(Sampled, max_steps=2)
    assert [entry[0] for entry in SEEN] == ["other", "loss"] * 2
    assert all("logps" not in entry[1].streams for entry in SEEN if entry[0] == "loss")


@dataclass(frozen=True)
class Hooks(Probe):
    """Rewards doubled, advantages 1..8, prompts changed: each must arrive."""

    def edit_prompts(self, rows):
        return [{**row, "prompt": [{"role": "user", "content": "zzz"}]} for row in rows]

    def shape_rewards(self, rewards, group):
        assert torch.equal(group.rewards, rewards)
        SEEN.append(("rewards", rewards, group.lengths, group.truncated))
        return rewards * 2

    def group_advantages(self, advantages, group):
        SEEN.append(("group", group.rewards))
        assert abs(float(advantages.sum())) < 1e-4  # TRL's, centred
        return torch.arange(1.0, 9.0).view(2, 4)

    def observe(self, group):
        assert torch.equal(group.rewards, SEEN[1][1])
        self.state["steps"] = self.state.get("steps", 0) + 1

    def token_advantages(self, advantages, x):
        SEEN.append(("advantages", sorted(advantages.tolist()), x.streams))
        return advantages

    def streams(self, rollout):
        SEEN.append(("prompt", rollout.prompts[0][0]["content"], rollout.advantages.tolist()))
        return {}


def test_rollout_hooks_arrive(train, tmp_path):
    trainer = train(Hooks, max_steps=1)
    name, rewards, lengths, truncated = SEEN[0]
    assert (name, tuple(rewards.shape)) == ("rewards", (2, 4, 1)) and lengths.max() == 6
    assert torch.equal(SEEN.pop(1)[1], rewards * 2), "after the shaping groups hold the shaped rewards"
    assert bool((lengths[truncated] == 6).all()) and bool(truncated[lengths < 6].any()) is False
    assert SEEN[1] == ("prompt", "zzz", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert SEEN[2][1] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert list(trainer._logs["advantages"]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    entry = trainer.state.log_history[0]
    assert entry["rewards/letters_reward/mean"] == pytest.approx(2 * entry["rewards/letters_reward/unshaped"])
    assert trainer.plan.methods[0].state == {"steps": 1}


@dataclass(frozen=True)
class OwnGrpo(Probe):
    """GRPO's own surrogate through the surrogate slot."""

    owns = ("surrogate",)

    def surrogate(self, x):
        old = x.logps.detach() if x.old_logps is None else x.old_logps
        ratio = torch.exp(x.logps - old)
        gain = x.advantages.unsqueeze(1)
        return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_grpo_through_the_surrogate_slot_is_trl(train, loss_type):
    """Bit for bit, accumulation and a second pass over the same rollouts included."""
    settings = {"loss_type": loss_type, "num_iterations": 2, "gradient_accumulation_steps": 2}
    ours = weights(train(OwnGrpo, per_device_train_batch_size=4, **settings))
    theirs = weights(train(Probe, per_device_train_batch_size=4, **settings))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@dataclass(frozen=True)
class OnlyAux(Probe):
    """A loss of its own, the same in every micro-batch: accumulation must not multiply it."""

    def token_weights(self, weights, x):
        return weights * 0

    def aux_loss(self, x):
        return x.aggregate(-x.logps)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo"])
def test_aux_loss_is_scaled_for_accumulation(train, loss_type):
    one = weights(train(OnlyAux, max_steps=2, loss_type=loss_type))
    many = weights(
        train(OnlyAux, max_steps=2, loss_type=loss_type, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    )
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-3, atol=1e-5)


@dataclass(frozen=True)
class DropHalf(Probe):
    """Drops every second token from loss and denominators; attention stays."""

    def loss_mask(self, mask, x):
        return mask * (torch.arange(mask.size(1)) % 2 == 0)

    def observe_loss(self, x):
        SEEN.append((x.logps, float(x.metrics is not None)))


def test_loss_mask_changes_the_denominator_but_not_the_forward(train):
    """Halving the tokens by mask keeps the mean's size; by weight it halves it (TRL.md section 4: ratio about 1.9)."""

    @dataclass(frozen=True)
    class WeightHalf(Probe):
        def token_weights(self, weights, x):
            return weights * (torch.arange(weights.size(1)) % 2 == 0)

    masked = train(DropHalf, max_steps=1, loss_type="grpo").state.log_history[0]
    weighted = train(WeightHalf, max_steps=1, loss_type="grpo").state.log_history[0]
    assert masked["grad_norm"] == pytest.approx(2 * weighted["grad_norm"], rel=1e-4)
    assert masked["loss"] == pytest.approx(2 * weighted["loss"], rel=1e-4)


@dataclass(frozen=True)
class AllStages(Probe):
    """Changes each stage, and notes advantages and mask as each hook sees them."""

    owns = ("surrogate",)

    def _see(self, hook, x):
        SEEN.append((hook, x.advantages, x.mask))

    def token_advantages(self, advantages, x):
        self._see("token_advantages", x)
        return advantages.unsqueeze(1) * torch.arange(1.0, 1 + x.mask.size(1))

    def loss_mask(self, mask, x):
        self._see("loss_mask", x)
        return mask * (torch.arange(mask.size(1)) % 2 == 0)

    def token_weights(self, weights, x):
        self._see("token_weights", x)
        return weights * 3

    def surrogate(self, x):
        self._see("surrogate", x)
        return x.advantages * x.logps

    def aux_loss(self, x):
        self._see("aux_loss", x)

    def observe_loss(self, x):
        self._see("observe_loss", x)


def test_each_stage_sees_those_before_it_and_the_end_sees_the_original(train):
    train(AllStages, max_steps=1, loss_type="grpo")
    seen = {hook: (advantages, mask) for hook, advantages, mask in SEEN}
    own, mask = seen["token_advantages"]
    ramp = own.unsqueeze(1) * torch.arange(1.0, 1 + mask.size(1))
    half = mask * (torch.arange(mask.size(1)) % 2 == 0)
    expected = {
        "loss_mask": (ramp, mask),
        "token_weights": (ramp, half),
        "surrogate": (3 * ramp, half),
        "aux_loss": (own, mask),
        "observe_loss": (own, mask),
    }
    for hook, values in expected.items():
        assert all(torch.equal(found, value) for found, value in zip(seen[hook], values, strict=True)), hook


@dataclass(frozen=True)
class FirstOfFour(Probe):
    """Keeps one row of every group of four."""

    def keep_rows(self, rollout):
        return torch.arange(rollout.advantages.numel()) % 4 == 1

    def streams(self, rollout):
        return {"row": torch.arange(rollout.advantages.numel())}

    def observe_loss(self, x):
        SEEN.append((x.streams["row"], x.mask, x.row_scale, x.first_pass, x.run, x.aggregate(x.mask.float())))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_dropped_rows_leave_forward_and_denominators(train, loss_type):
    """2 of 8 rows: the same weights however the rows are split, a second pass with a reference KL included."""
    runs, settings = {}, {"loss_type": loss_type, "beta": 0.1, "num_iterations": 2, "max_steps": 2, "optim": "sgd"}
    for size, forwarded in ((8, 2), (4, 1), (1, 1)):
        trainer = train(
            FirstOfFour, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        runs[size] = weights(trainer)
        assert {len(row) for row, *_ in SEEN} == {forwarded}
        assert sorted(torch.cat([row[mask.sum(1) > 0] for row, mask, *_ in SEEN]).tolist()) == [1, 1, 5, 5]
        assert [first for *_, first, _, _ in SEEN] == [True] * (8 // size) + [False] * (8 // size)
        assert SEEN[0][2] == len(SEEN) * forwarded / 2 / 2 and SEEN[0][4].steps_per_rollout == 2
        if loss_type in ("grpo", "dapo"):  # the mean of ones over what is kept
            assert sum(float(one) for *_, one in SEEN) / len(SEEN) == pytest.approx(1)
    for size in (4, 1):
        for name, value in runs[8].items():
            torch.testing.assert_close(runs[size][name], value, rtol=1e-3, atol=1e-6)


@dataclass(frozen=True)
class KlSchedule(Probe):
    def kl_coef(self, beta, step):
        SEEN.append((beta, step))
        return beta * 100


def test_kl_coefficient_is_changed_for_the_call_only(train):
    strong = train(KlSchedule, beta=0.1)
    assert SEEN == [(0.1, 0), (0.1, 1), (0.1, 2)] and strong.beta == 0.1
    weak = train(Probe, beta=0.1)
    assert not torch.equal(weights(strong)["lm_head.weight"], weights(weak)["lm_head.weight"])


@dataclass(frozen=True)
class WatchOptimizer(Probe):
    def observe_loss(self, x):
        SEEN.append(x.optimizer)


def test_the_coming_optimizer_step_is_known(train):
    """The learning rate that the optimizer will use: warm-up 0, 1/2, 1; betas and eps as set, or None for SGD."""
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    train(WatchOptimizer, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, **warmup)
    assert [seen.learning_rate for seen in SEEN] == pytest.approx([0.0, 0.005, 0.01], abs=1e-12)
    assert {(seen.betas, seen.eps) for seen in SEEN} == {((0.8, 0.95), 1e-6)}
    train(WatchOptimizer, max_steps=1, optim="sgd")
    assert [(seen.betas, seen.eps) for seen in SEEN] == [(None, None)]


@dataclass(frozen=True)
class Failing(Probe):
    def token_weights(self, weights, x):
        return weights * float("nan")


def test_a_loss_that_is_not_finite_is_reported(train, caplog):
    import logging

    logging.getLogger("trl_ext.base").propagate = True
    with caplog.at_level("WARNING"):
        train(Failing, max_steps=1)
    assert "NaN or infinite in 1 micro-batches" in caplog.text


def test_metrics_are_weighted_means():
    metrics = Metrics()
    mine = metrics.under("m")
    mine.mean("a", torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
    mine.mean("a", 4.0)
    assert (metrics.totals["m/a"][0] / metrics.totals["m/a"][1]).item() == pytest.approx((1 + 9 + 4) / 5)


def test_engines_that_shard_weights_are_refused():
    from trl_ext.method import Setup
    from trl_ext.plan import Plan

    with pytest.raises(PlanError, match="not tested under fsdp"):
        Plan((Others(),)).check(Setup(None, engine="fsdp"))
    Plan((Probe(),)).check(Setup(None, engine="zero3"))


def test_aggregate_rejects_unknown_types():
    with pytest.raises(ValueError, match="not one of"):
        ops.aggregate(
            torch.ones(1, 1), torch.ones(1, 1), "x", num_items=1, steps_per_generation=1, max_completion_length=1
        )
