"""Memory predictions against real tensors: weights, adapters, optimizer states, caches, what autograd keeps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import add_fused_lm_head

from tests.tiny import grpo_args, tiny_path
from trl_ext import GRPOConfig
from trl_ext.critic import new_heads
from trl_ext.forward import Head, per_position
from trl_ext.geometry import PUBLISHED, PUBLISHED_QWEN25, model_config, packed_bytes, shape_of
from trl_ext.memory import (
    BLOCK_COPIES,
    GIB,
    RESERVE,
    Prediction,
    critic_entries,
    estimate,
    optimizer_bytes,
    saved_per_token,
)
from trl_ext.methods.grpo.trace import ERROR, KEY, routed_kl
from trl_ext.plan import make_plan

LORA = {"use_peft": True, "lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}


def config(**changes) -> Qwen3Config:
    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
    }
    return Qwen3Config(**(sizes | changes))


def training(**changes) -> GRPOConfig:
    sizes = {"max_completion_length": 64, "gradient_accumulation_steps": 4, "optim": "adamw_torch", "bf16": True}
    return GRPOConfig(**grpo_args("unused", **(sizes | {"gradient_checkpointing": True} | changes)))


def predicted(methods=None, prompt: int = 32, model: dict | None = None, shape=None, **changes) -> Prediction:
    args = ModelConfig(**({"dtype": "bfloat16"} | LORA if model is None else model))
    return estimate(shape or config(), training(**changes), args, make_plan(methods), prompt)


def line(prediction: Prediction, name: str, phase: str | None = None) -> int:
    found = [x.bytes for x in prediction.lines if x.name == name and phase in (None, x.phase)]
    assert len(found) <= 1, f"{name} is in several phases"
    return found[0] if found else 0


def quant_state_bytes(state) -> int:
    tensors = [
        state.absmax,
        state.code,
        *([] if not state.nested else [state.offset, state.state2.absmax, state.state2.code]),
    ]
    return sum(t.nbytes for t in tensors)


# Weights


@pytest.mark.parametrize("nested", [False, True])
def test_packed_size_is_bitsandbytes(nested: bool) -> None:
    import bitsandbytes as bnb

    stack = [
        bnb.nn.Linear4bit(n, m, bias=False, compress_statistics=nested, quant_type="nf4")
        for n, m in [(512, 1024), (640, 768)]
    ]
    weights = [layer.to("cpu").weight for layer in stack]
    real = sum(w.nbytes + quant_state_bytes(w.quant_state) for w in weights)
    expected = sum(packed_bytes(numel, nested) for numel in (512 * 1024, 640 * 768))
    tables = len(stack) * (16 * 4 + (256 * 4 + 4 if nested else 0))  # code books and offset: constant per matrix
    assert real == expected + tables


def test_base_weights_of_a_loaded_4bit_model() -> None:
    args = ModelConfig(dtype="bfloat16", load_in_4bit=True, use_bnb_nested_quant=True, **LORA)
    path = tiny_path(hidden_size=64, intermediate_size=256, head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=get_quantization_config(args), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    assert len(states) == 14
    real = sum(p.nbytes for p in model.parameters()) + sum(quant_state_bytes(s) for s in states)
    tables = len(states) * (16 * 4 + 256 * 4 + 4)
    assert shape_of(model_config(path)[0], args).base_bytes == real - tables


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_weights_of_a_loaded_model(dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=getattr(torch, dtype))
    shape = shape_of(model.config, ModelConfig(dtype=dtype))
    assert shape.base_bytes == shape.trained_bytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("modules", [["all-linear"], ["q_proj", "down_proj"], None])
def test_adapter_is_pefts(modules: list[str] | None) -> None:
    args = ModelConfig(**({"dtype": "bfloat16"} | LORA | {"lora_target_modules": modules}))
    model = get_peft_model(Qwen3ForCausalLM(config()).to(torch.bfloat16), get_peft_config(args))
    shape = shape_of(config(), args)
    assert sum(n for n, _ in shape.trained) == model.get_nb_trainable_parameters()[0]
    assert shape.trained_bytes == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    packed = shape_of(config(), dataclasses.replace(args, load_in_4bit=True))
    assert packed.trained_bytes == 2 * sum(n for n, _ in shape.trained)  # TRL casts QLoRA's adapter to bfloat16


def test_published_geometry_by_hand() -> None:
    """Parameters = embeddings (once if tied) + layers x (attention + MLP + norms) + last norm."""
    for name, facts in PUBLISHED.items():
        h, i, n = facts["hidden_size"], facts["intermediate_size"], facts["num_hidden_layers"]
        q, k = facts["num_attention_heads"] * 128, 8 * 128
        layer = 2 * h * q + 2 * h * k + 3 * h * i + 2 * h + 2 * 128
        tables = 1 if facts["tie_word_embeddings"] else 2
        shape = shape_of(model_config(name)[0], ModelConfig(dtype="bfloat16"))
        assert shape.base_bytes == 2 * (tables * 151936 * h + n * layer + h), name


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-Math-1.5B", 1.54),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
        ("Qwen/Qwen2.5-3B-Instruct", 3.09),
        ("Qwen/Qwen2.5-7B", 7.61),
        ("Qwen/Qwen2.5-Math-7B", 7.61),
        ("Qwen/Qwen2.5-32B", 32.76),
    ],
)
def test_geometry_of_qwen25_by_hand(name: str, billions: float) -> None:
    """Embeddings (once if tied) + layers x (attention with biases of q, k, v + MLP + norms) + last norm, in billions."""
    facts = PUBLISHED_QWEN25[name]
    h, i, n, v = (facts[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    k = h // facts["num_attention_heads"] * facts["num_key_value_heads"]
    layer = 2 * h * h + 2 * h * k + h + 2 * k + 3 * h * i + 2 * h
    count = (1 if facts["tie_word_embeddings"] else 2) * v * h + n * layer + h
    assert count / 1e9 == pytest.approx(billions, abs=0.01)
    assert shape_of(model_config(name)[0], ModelConfig(dtype="bfloat16")).base_bytes == 2 * count


def test_offline_geometry_says_so() -> None:
    assert "geometry" in (model_config("Qwen/Qwen3-8B")[1] or "")
    with pytest.raises(OSError):
        model_config("nobody/unknown-model")


# Optimizer


@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw_torch", torch.float32), ("adamw_torch", torch.bfloat16), ("adamw_8bit", None)]
)
def test_optimizer_state_of_a_real_step(name: str, dtype: torch.dtype | None) -> None:
    params = [nn.Parameter(torch.randn(shape, dtype=dtype or torch.float32)) for shape in [(128, 96), (40,)]]
    if name == "adamw_8bit":
        import bitsandbytes as bnb

        optimizer = bnb.optim.AdamW8bit(params)
    else:
        optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    tables = ("step", "qmap1", "qmap2")  # a counter, and code books that all tensors share
    state = [
        v for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor) and k not in tables
    ]
    trained = tuple((p.numel(), p.element_size()) for p in params)
    assert optimizer_bytes(name, trained, 0)[0] == sum(t.nbytes for t in state)


def test_paged_state_may_leave_the_gpu() -> None:
    assert optimizer_bytes("paged_adamw_8bit", ((10_000, 4),), 0)[0] == 0


# Loss


def kept_by_autograd(model: nn.Module, backbone: nn.Module, autocast: bool) -> int:
    """Bytes that autograd keeps for 2 x 64 tokens, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    ids = torch.randint(0, 256, (2, 64))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        output = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["full", "bfloat16 adapter", "float32 adapter", "dropout"])
def test_layer_keeps_what_autograd_keeps(kind: str) -> None:
    adapter = {} if kind == "full" else LORA | {"lora_dropout": 0.1 if kind == "dropout" else 0.0}
    args, wide = ModelConfig(**({"dtype": "bfloat16"} | adapter)), kind == "float32 adapter"
    kept = []
    for layers in (1, 2):
        model = Qwen3ForCausalLM(config(num_hidden_layers=layers)).to(torch.bfloat16)
        backbone = model.model
        if adapter:
            model = get_peft_model(model, get_peft_config(args), autocast_adapter_dtype=wide)
            model.enable_input_require_grads()
        kept.append(kept_by_autograd(model, backbone, autocast=wide))
    shape = shape_of(config(), args)
    if not wide and adapter:  # TRL's QLoRA keeps it as narrow as the base
        shape = dataclasses.replace(shape, trained=tuple((n, 2) for n, _ in shape.trained))
    expected = 128 * saved_per_token(shape, 2) + 2 * 64 * 64 * 2  # and the padding mask as SDPA's bias
    expected += sum(n for n, _ in shape.trained) // 2 * 2 if wide else 0  # autocast's copies, a line of their own
    expected += (
        128 * shape.lora_inputs // 2 if kind == "dropout" else 0
    )  # the CPU's dropout mask has two bytes, CUDA's one
    assert kept[1] - kept[0] == expected


def peak(fn) -> int:
    """Largest sum of live CPU bytes that `fn` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        fn()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = best = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        best = max(best, live)
    return best


def test_loss_phase_bounds_a_real_step() -> None:
    """Forward and backward through TRL's fused head with checkpointing: below the prediction, and not far below."""
    sizes = config(num_hidden_layers=6)
    model = Qwen3ForCausalLM(sizes).to(torch.bfloat16)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    args = ModelConfig(**({"dtype": "bfloat16"} | LORA))
    model = get_peft_model(model, get_peft_config(args), autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 256, (4, 512))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    labels = ids  # off CUDA every position is scored, so all of them are completion here

    def step() -> None:
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        output.log_probs.sum().backward()
        model.zero_grad()

    step()
    changes = {"per_device_train_batch_size": 4, "max_completion_length": 511}
    expected = predicted(prompt=1, shape=sizes, **changes).of("loss")
    assert 0.6 * expected < peak(step) <= expected


@pytest.mark.parametrize(("kind", "top_k"), [(ERROR, None), (KEY, None), (ERROR, 100)])
def test_block_copies_of_full_distributions(kind: int, top_k: int | None) -> None:
    vocab, n = 4096, 64
    head = Head(torch.randn(vocab, 8), None, 0.6, None, 1.0, False)
    student, teacher = torch.randn(3 * n, 8, requires_grad=True), torch.randn(3 * n, 8)

    def step() -> None:
        fn = lambda p, q: routed_kl(p, q, kind, top_k, 0.05, "entry")  # noqa: E731
        per_position(fn, (head, student), (head, teacher), budget=n * vocab)[0].sum().backward()

    step()
    copies = peak(step) / (4 * n * vocab)
    assert copies <= BLOCK_COPIES + 0.1
    assert copies > BLOCK_COPIES - 1.1 if top_k is None else copies < 5


# Rollout


def test_cache_is_generates() -> None:
    model = Qwen3ForCausalLM(config()).to(torch.bfloat16)
    output = model.generate(
        torch.randint(3, 256, (4, 32)),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    found = line(predicted(per_device_train_batch_size=1), "KV cache")  # 1 x 4 rows, 32 + 64 tokens, one layer's copy
    assert found * 2 // 3 == real * 96 // 95  # the last token is never read


def test_rows_at_once_follow_steps_per_generation() -> None:
    whole, half = predicted(), predicted(steps_per_generation=2)
    assert line(whole, "KV cache") == 2 * line(half, "KV cache")
    assert half.of("loss") == whole.of("loss")


def test_policy_annotator_reads_the_completions_again() -> None:
    trace = {"trace": {"action": "rkl_error", "annotator": "policy", "max_annotation_tokens": 16}}
    prediction = predicted(trace)
    assert prediction.of("annotation") > prediction.of("rollout")
    assert predicted({"trace": {"annotator": "tests.tiny.annotate_first"}}).of("annotation") == 0


# What methods and options add


def test_a_need_costs_what_it_says() -> None:
    plain, trace = predicted(), predicted("trace")
    assert line(plain, "teacher") == line(plain, "full distributions") == line(plain, "teacher forward") == 0
    assert line(trace, "teacher") == line(plain, "adapter") > 0
    assert line(trace, "full distributions") > 0
    assert predicted({"trace": {"action": "none"}}).total == plain.total


def test_reference_is_free_under_lora() -> None:
    assert line(predicted(beta=0.1), "reference") == 0
    full = predicted(model={"dtype": "bfloat16"}, beta=0.1)
    assert line(full, "reference") == line(full, "base weights")


def test_full_training_counts_every_weight_three_times_more() -> None:
    full = predicted(model={"dtype": "float32"})
    weights = line(full, "base weights")
    assert line(full, "gradients") == weights and line(full, "optimizer") == 2 * weights
    assert line(full, "autocast") == weights // 2
    assert line(full, "head gradient") == 4 * 256 * 128


def test_vllm_takes_its_share_and_no_cache() -> None:
    plain = predicted()
    shared = predicted(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.25)
    assert shared.of("rollout") == 0
    own = plain.of("always") - line(plain, "token tensors") + plain.of("loss") + RESERVE
    assert shared.total == pytest.approx(own / 0.75, abs=1)
    assert "0.25 of the GPU" in shared.table()


def test_pairs_have_no_rollout() -> None:
    plain = training()
    pairs = {"per_device_train_batch_size": 2, "max_length": 96, "gradient_checkpointing": True, "beta": 0.1}
    pairs |= {"bf16": True, "fp16": False, "optim": plain.optim, "gradient_accumulation_steps": 1}
    args = ModelConfig(**({"dtype": "bfloat16"} | LORA))
    prediction = estimate(config(), SimpleNamespace(**pairs), args, make_plan(None, "dpo"), 32)
    assert prediction.of("rollout") == 0
    assert prediction.of("loss") == predicted(per_device_train_batch_size=4, max_completion_length=64).of("loss")


# Shape of the answer


def test_more_of_anything_needs_more() -> None:
    changes = ({"max_completion_length": 128}, {"per_device_train_batch_size": 16}, {"prompt": 64})
    for change in (*changes, {"model": {"dtype": "bfloat16"} | LORA | {"lora_r": 16}}):
        assert predicted("trace", **change).total > predicted("trace").total, change
    assert predicted("trace", gradient_checkpointing=False).of("loss") > predicted("trace").of("loss")


def test_total_is_the_largest_phase() -> None:
    prediction = predicted("trace")
    phases = [prediction.of(p) for p in ("rollout", "annotation", "loss")]
    assert prediction.total == prediction.of("always") + max(phases) + RESERVE
    table = prediction.table()
    assert all(x.name in table and x.how in table for x in prediction.lines if x.bytes)
    assert f"{prediction.total / GIB:.2f}  GiB at the peak" in table


def test_knobs_come_in_order_and_do_what_they_say() -> None:
    sizes = {"per_device_train_batch_size": 64, "max_completion_length": 4096}
    prediction = predicted("trace", **sizes)
    assert prediction.fits(prediction.total / GIB) == []
    advice = prediction.fits(1.5)
    saved = [float(text.rsplit(" saves ")[1].split()[0]) for text in advice]
    assert saved == sorted(saved, reverse=True)
    assert any(text.startswith("max_completion_length: 2048 ") for text in advice)
    best = next(i for i, text in enumerate(advice) if text.startswith("max_completion_length"))
    after = predicted("trace", **(sizes | {"max_completion_length": 2048}))
    assert saved[best] == pytest.approx((prediction.total - after.total) / GIB, abs=0.006)


def test_knobs_together_are_those_one_by_one() -> None:
    """The path to a GPU ends where it fits, and each knob on it changes what the ones before left."""
    prediction = predicted("trace", per_device_train_batch_size=64, max_completion_length=4096)
    turned, end = prediction.until_it_fits(2.5)
    assert len(turned) > 1 and end.total <= 2.5 * GIB and end.fits(2.5) == []
    step = prediction
    for words in turned:
        assert step.total > 2.5 * GIB
        step = dict(step.knobs())[words]
    assert step.total == end.total
    assert prediction.until_it_fits(prediction.total / GIB) == ([], prediction)
    stuck = prediction.advice(0.5)  # less than the reserve alone
    assert "All together leave" in stuck and "Enough" not in stuck


def test_a_reference_for_its_log_probs_alone_is_a_copy_too() -> None:
    full = {"use_peft": False}
    assert line(predicted("group_dpo"), "reference") == 0  # the adapter is switched off
    assert line(predicted("group_dpo", model=full), "reference") == line(predicted(model=full), "base weights")


def test_gradient_noise_keeps_the_gradient_in_float32() -> None:
    prediction = predicted("oblr_po", scale_rewards="none", loss_type="grpo")
    numel = sum(n for n, _ in shape_of(config(), ModelConfig(dtype="bfloat16", **LORA)).trained)
    assert line(prediction, "gradient before") == 4 * numel
    assert line(predicted(), "gradient before") == 0


def test_the_critic_is_counted() -> None:
    heads = sum(value.numel() for value in new_heads(128, 0).values())
    assert critic_entries(128) == heads
    own = {"safe": {"critic": True, "kl_from": "rollout"}}
    assert line(predicted(own), "critic") == 12 * heads
    assert line(predicted("safe"), "critic") == 0


def test_less_for_vllm_leaves_more_for_training() -> None:
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5}
    turned = dict(predicted(**vllm).knobs())["vllm_gpu_memory_utilization: 0.25"]
    assert turned.vllm_share == 0.25
    assert turned.total == pytest.approx(predicted(**vllm).total * 0.5 / 0.75, rel=1e-6)


def test_one_reply_in_a_row_takes_half_of_a_pair() -> None:
    """DPO's B rows are 2 B sequences, KTO's and SFT's are B; and only a loop makes such a trainer sample."""
    sizes = {"bf16": True, "fp16": False, "gradient_checkpointing": True, "optim": "adamw_torch", "max_length": 96}
    sizes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "beta": 0.1}
    args = ModelConfig(dtype="bfloat16", **LORA)

    def of(sampled: tuple[int, int] = (0, 0), **own) -> Prediction:
        return estimate(config(), SimpleNamespace(**sizes, **own), args, make_plan(None, "dpo"), 32, (), sampled)

    pair, labelled = of(), of(desirable_weight=1.0)
    assert line(pair, "checkpoints") == 2 * line(labelled, "checkpoints") == 2 * line(of(packing=False), "checkpoints")
    assert pair.of("rollout") == 0
    # 8 rows of 32 + 10 tokens, keys and values of 64 features in 2 bytes, 2 layers and a growing copy of one
    assert line(of((8, 10)), "KV cache") == 8 * 42 * 2 * 64 * 2 * 3
