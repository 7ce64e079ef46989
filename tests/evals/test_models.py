"""One base with its adapters: the base stays the base, adapters are told apart by their weights, a dead one is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals import models
from evals.generation.hf import Job
from evals.models import Adapter, BaseSpec, ModelError
from evals.task import Sampling
from tests.tiny import tiny_path

CPU = torch.device("cpu")
PROMPTS = ["one?", "two and three?", "four"]
SAMPLING = Sampling(1, 1.0, max_new_tokens=10)


def adapter(folder: Path, scale: float = 0.3, seed: int = 0, **config: object) -> Adapter:
    """A saved LoRA adapter with random values of B; `scale` 0 is one that was never trained."""
    base = AutoModelForCausalLM.from_pretrained(tiny_path())
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale) if scale else parameter.zero_()
    model.save_pretrained(folder)
    return Adapter(folder.name, folder)


def load(*adapters: Adapter, **spec: object) -> models.Loaded:
    base = BaseSpec(tiny_path(), **spec)
    return models.load(base, models.load_tokenizer(base.model, base), adapters, CPU)


def replies(loaded: models.Loaded, which: Adapter | None) -> list[str]:
    with loaded.answering(which, 64) as generator:
        batches = generator.generate([Job("t", p, 0, p) for p in PROMPTS], SAMPLING)
        return [r.text for batch in batches for r in sorted(batch, key=lambda r: r.item)]


def test_base_and_adapters_answer_as_if_each_were_loaded_alone(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "run_1.7b"), adapter(tmp_path / "b", seed=1)
    loaded = load(first, second)
    alone = {None: replies(load(), None), **{a: replies(load(a), a) for a in (first, second)}}
    assert len({tuple(texts) for texts in alone.values()}) == 3
    for which in (second, None, first, None, second):
        assert replies(loaded, which) == alone[which]


def test_an_adapter_that_was_never_trained_is_found_and_answers_as_the_base(tmp_path: Path) -> None:
    idle, trained = adapter(tmp_path / "idle", scale=0), adapter(tmp_path / "trained")
    loaded = load(idle, trained)
    assert loaded.activity(idle, PROMPTS) == models.Activity(0.0, 0.0)
    found = loaded.activity(trained, PROMPTS)
    assert found.largest > 0.01 and found.kl > 0
    assert replies(loaded, idle) == replies(loaded, None)


def test_activity_is_the_change_of_the_last_position(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a")
    loaded = load(one)

    def last(text: str) -> torch.Tensor:
        return loaded.model(torch.tensor([loaded.tokenizer(text)["input_ids"]])).logits[0, -1].double()

    with torch.no_grad():
        new = torch.stack([last(text) for text in PROMPTS])
        with loaded.model.disable_adapter():
            old = torch.stack([last(text) for text in PROMPTS])
    divergence = torch.nn.functional.kl_div(
        old.log_softmax(-1), new.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    found = loaded.activity(one, PROMPTS)
    assert found.largest == pytest.approx(float((new - old).abs().max()), rel=1e-4)
    assert found.kl == pytest.approx(float(divergence.mean()), rel=1e-4)


def test_one_changed_weight_changes_the_identity_and_a_moved_folder_does_not(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a")
    moved = Adapter("m", Path(shutil.copytree(one.folder, tmp_path / "moved")))
    assert models.adapter_digest(one) == models.adapter_digest(moved)
    path = moved.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 1e-6
    save_file(tensors, path)
    assert models.adapter_digest(one) != models.adapter_digest(moved)
    again = Adapter("c", Path(shutil.copytree(one.folder, tmp_path / "again")))
    config = json.loads((again.folder / "adapter_config.json").read_text())
    (again.folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert models.adapter_digest(one) != models.adapter_digest(again), "alpha scales the same weights otherwise"


def test_the_bases_weights_are_its_identity(tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_path(), tmp_path / "copy")
    first, second = (models.base_identity(BaseSpec(str(p)), None) for p in (tiny_path(), copy))
    assert first == second
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1e-6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert models.base_identity(BaseSpec(str(copy)), None) != first


def test_adapters_keep_the_precision_of_their_file(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a")
    path = one.folder / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    loaded = load(one, dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.dtype == "bfloat16"


def test_a_4_bit_base_with_an_adapter_answers_and_the_base_is_unchanged_by_it(tmp_path: Path) -> None:
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    one = adapter(tmp_path / "a")
    loaded = load(one, quantization=quantization)
    assert loaded.activity(one, PROMPTS).largest > 0.01
    base = replies(loaded, None)
    assert replies(loaded, one) != base
    assert replies(load(quantization=quantization), None) == base


def test_a_padded_vocabulary_is_left_alone(tmp_path: Path) -> None:
    """lm-eval's own `peft=` shrinks the embedding to the tokenizer, so that base and adapter are two networks."""
    wide = tiny_path(vocab_size=300)
    base = AutoModelForCausalLM.from_pretrained(wide)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    model.save_pretrained(tmp_path / "wide")
    spec = BaseSpec(wide)
    loaded = models.load(spec, models.load_tokenizer(wide, spec), [Adapter("w", tmp_path / "wide")], CPU)
    assert loaded.model.get_input_embeddings().weight.shape[0] == 300


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load the base model '.*nowhere'"):
        models.load(BaseSpec(str(tmp_path / "nowhere")), None, (), CPU)
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        models.adapter_folder(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="no chat template: name one that has it with --tokenizer"):
        models.load_tokenizer(str(tmp_path / "plain"), BaseSpec(tiny_path()))
    one = adapter(tmp_path / "a")
    wider = tiny_path(hidden_size=32)
    with pytest.raises(ModelError, match="cannot attach the adapter"):
        models.load(BaseSpec(wider), tokenizer, [one], CPU)
    assert models.base_of(one.folder) == tiny_path()
