"""Merged adapters against W + s B A by hand, extrapolated weights against the card's numbers, and what is refused."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from tests.test_cli import recipe
from tests.tiny import dpo_args, pairs, tiny_path, tiny_tokenizer
from trl_ext import merging, saved
from trl_ext.cli import main
from trl_ext.dpo import DPOConfig, DPOTrainer
from trl_ext.merging import MergeError, anchor_distance, extrapolated, merge_adapter
from trl_ext.saved import SavedModelError


def wide():
    """Folder of a model whose matrices are large enough for bitsandbytes' blocks."""
    return tiny_path(hidden_size=64, intermediate_size=64, head_dim=32, num_key_value_heads=2)


def adapter(folder, base=None, seed=0, **kwargs):
    """A folder with an adapter on the tiny model that does something, and with no tokenizer."""
    base = base or tiny_path()
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **kwargs}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def by_hand(base, *adapters):
    """The base's weights with s B A of every adapter added in float64, rounded to float32; all else as it is."""
    state = {name: value.double() for name, value in load_file(Path(base) / "model.safetensors").items()}
    for folder in adapters:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        factors = load_file(Path(folder) / "adapter_model.safetensors")
        for name in (name for name in factors if "lora_A" in name):
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            state[target] += scale * factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
    return {name: value.float() for name, value in state.items()}


def assert_close(folder, expected, tolerance=1e-6):
    found = load_file(Path(folder) / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.float(), expected[name], atol=tolerance, rtol=tolerance)


# Extrapolation


def test_the_card_s_numbers():
    new, previous = {"w": torch.tensor([0.5, -0.2])}, {"w": torch.tensor([0.4, 0.1])}
    assert extrapolated(new, previous, 0.3)["w"].tolist() == pytest.approx([0.53, -0.29], abs=1e-6)
    assert anchor_distance(new, previous, 0.3) == pytest.approx(0.3 * math.sqrt(0.1**2 + 0.3**2), abs=1e-6)


def test_what_is_not_a_parameter_comes_from_the_new_weights():
    new = {"count": torch.tensor([7]), "mask": torch.tensor([0.0, -math.inf]), "seen": torch.tensor([True])}
    previous = {"count": torch.tensor([3]), "mask": torch.tensor([0.0, -math.inf]), "seen": torch.tensor([False])}
    found = extrapolated(new, previous, 0.5)
    assert all(torch.equal(found[name], new[name]) for name in new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_alpha_0_is_a_copy_bit_for_bit(dtype):
    new = {"w": torch.tensor([-0.0, 1.1, math.inf, 3e-5]).to(dtype)}
    found = extrapolated(new, {"w": torch.tensor([1.0, math.inf, 0.0, 1.0]).to(dtype)}, 0)
    assert found["w"].dtype == dtype and found["w"].data_ptr() != new["w"].data_ptr()
    assert found["w"].view(torch.uint8).tolist() == new["w"].view(torch.uint8).tolist()


def test_short_numbers_are_computed_in_float32():
    """Rounded once, at the end: steps in bfloat16 would be rounded on the way, and some sums with them."""
    new, previous = (torch.linspace(start, 4, 999).bfloat16() for start in (0.1, 0.3))
    found = extrapolated({"w": new}, {"w": previous}, 0.3)["w"]
    expected = (new.double() + 0.3 * (new.double() - previous.double())).bfloat16()
    short = new + 0.3 * (new - previous)
    assert torch.equal(found, expected) and not torch.equal(short, expected)


def test_tied_tensors_are_computed_once_and_stay_tied():
    shared, before = torch.randn(3, 2), torch.randn(3, 2)
    new, previous = {"embed": shared, "head": shared, "norm": torch.ones(3)}, {"embed": before, "head": before}
    previous["norm"] = torch.zeros(3)
    found = extrapolated(new, previous, 0.5)
    assert found["embed"].data_ptr() == found["head"].data_ptr() != found["norm"].data_ptr()
    torch.testing.assert_close(found["head"], 1.5 * shared - 0.5 * before)
    expected = 0.5 * math.sqrt(float((shared - before).square().sum()) + 3)
    assert anchor_distance(new, previous, 0.5) == pytest.approx(expected, rel=1e-6)


def test_a_tied_model():
    tied = tiny_path(tie_word_embeddings=True)
    model, before = (AutoModelForCausalLM.from_pretrained(tied) for _ in range(2))
    for parameter in before.parameters():
        parameter.data.add_(0.1)
    model.load_state_dict(extrapolated(model.state_dict(), before.state_dict(), 0.5))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    start = AutoModelForCausalLM.from_pretrained(tied).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, start[name] - 0.05)


@pytest.mark.parametrize(
    ("new", "previous", "alpha", "message"),
    [
        ({"w": [1.0]}, {"w": [1.0]}, 1.0, r"alpha 1.0 is outside \[0, 1\)"),
        ({"w": [1.0]}, {"w": [1.0]}, -0.1, "alpha -0.1 is outside"),
        ({"w": [1.0]}, {"w": [1.0]}, math.nan, "alpha nan is outside"),
        ({"w": [1.0], "a": [1.0]}, {"w": [1.0], "b": [1.0]}, 0, r"a \(new only\), b \(previous only\), 2 in all"),
        ({"w": [1.0]}, {"w": [1.0, 2.0]}, 0.3, r"different shapes: w \(1,\) and \(2,\)"),
        ({"q.lora_A.weight": [1.0]}, {"q.lora_A.weight": [1.0]}, 0.3, "A and B one by one is not combining B A"),
    ],
)
def test_no_extrapolation(new, previous, alpha, message):
    new, previous = ({name: torch.tensor(value) for name, value in each.items()} for each in (new, previous))
    with pytest.raises(MergeError, match=message):
        extrapolated(new, previous, alpha)


def test_four_bit_weights_have_no_sum():
    init = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    state = AutoModelForCausalLM.from_pretrained(wide(), **init).state_dict()
    with pytest.raises(MergeError, match="holds quantized weights"):
        extrapolated(state, state, 0.3)


def test_the_first_model_is_gone_when_the_file_is_loaded_again(tmp_path, monkeypatch):
    """Two models at once would take twice the memory that is promised."""
    seen, load = [], merging.create_model_from_path

    def watched(path, **kwargs):
        gc.collect()
        seen.append([alive() is not None for alive in alives])
        model = load(path, **kwargs)
        alives.append(weakref.ref(model))
        return model

    alives: list = []
    monkeypatch.setattr(merging, "create_model_from_path", watched)
    merge(tmp_path, adapter(tmp_path / "adapter"))
    assert seen == [[], [False]]


def test_factors_cannot_be_averaged(tmp_path):
    """What `extrapolated` makes of merged weights is not the product of extrapolated factors."""
    first = adapter(tmp_path / "first")
    second = adapter(tmp_path / "second", seed=1)
    one, two = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (first, second))
    name = next(name for name in one if "lora_A" in name)
    pair = name.replace("lora_A", "lora_B")

    merged = [load_file(Path(merge(tmp_path, folder)) / "model.safetensors") for folder in (first, second)]
    pushed = extrapolated(*merged, 0.3)
    target = name.removeprefix("base_model.model.").replace(".lora_A", "")
    base, scale = load_file(Path(tiny_path()) / "model.safetensors")[target], 8 / 2
    right = base + scale * (1.3 * one[pair] @ one[name] - 0.3 * two[pair] @ two[name])
    wrong = base + scale * (1.3 * one[pair] - 0.3 * two[pair]) @ (1.3 * one[name] - 0.3 * two[name])
    torch.testing.assert_close(pushed[target], right, atol=1e-5, rtol=1e-5)
    assert (pushed[target] - wrong).abs().max() > 0.1


def merge(folder, adapter_, **kwargs):
    return merge_adapter(adapter_, str(folder / f"merged-{Path(adapter_).name}"), **kwargs).folder


# Adapters


@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True, "r": 4}, {"target_modules": "all-linear"}], ids=str)
def test_merged_weights_by_hand(tmp_path, kwargs):
    folder = adapter(tmp_path / "adapter", **kwargs)
    done = merge_adapter(folder, str(tmp_path / "out"))
    assert_close(done.folder, by_hand(tiny_path(), folder))
    assert done.moved > 0.1 and done.merging < 1e-4 and done.rounding == done.stored == 0


def logps(model):
    return saved.log_probs(model, torch.tensor([[40, 50, 60, 70, 80]]))


@pytest.mark.parametrize(
    "kwargs", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
def test_other_kinds_compute_what_base_and_adapter_compute(tmp_path, kwargs):
    folder = adapter(tmp_path / "adapter", **kwargs)
    done = merge_adapter(folder, str(tmp_path / "out"))
    whole = AutoModelForCausalLM.from_pretrained(done.folder)
    expected = logps(saved.reload(folder, tiny_path(), torch.device("cpu"), dtype=torch.float32))
    torch.testing.assert_close(logps(whole), expected, atol=1e-4, rtol=0)
    plain = merge_adapter(adapter(tmp_path / "plain"), str(tmp_path / "plain-out"))
    other = logps(AutoModelForCausalLM.from_pretrained(plain.folder))
    assert (other - expected).abs().max() > 1e-2, "the kind makes a difference"


def test_a_tied_model_that_trains_its_head(tmp_path):
    """The merged model needs its own head: the file says that nothing is tied any more."""
    tied = tiny_path(tie_word_embeddings=True)
    folder = adapter(tmp_path / "adapter", tied, modules_to_save=["lm_head"])
    whole = AutoModelForCausalLM.from_pretrained(merge_adapter(folder, str(tmp_path / "out")).folder)
    expected = logps(saved.reload(folder, tied, torch.device("cpu"), dtype=torch.float32))
    torch.testing.assert_close(logps(whole), expected, atol=1e-4, rtol=0)
    assert not torch.equal(whole.lm_head.weight, whole.model.embed_tokens.weight)


def test_several_adapters_are_added(tmp_path):
    folders = [adapter(tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    done = merge_adapter(folders, str(tmp_path / "out"))
    assert_close(done.folder, by_hand(tiny_path(), *folders))
    assert done.adapters == tuple(folders)


def test_precision_and_what_lies_beside_the_weights(tmp_path):
    """A base in bfloat16 stays one; the sum is made in float32 and rounded once."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.bfloat16)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    folder = adapter(tmp_path / "adapter", str(base))
    done = merge_adapter(folder, str(tmp_path / "out"))
    found = load_file(Path(done.folder) / "model.safetensors")
    expected = by_hand(base, folder)
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in found.items())
    assert done.precision == "bfloat16" and 1e-3 < done.rounding < 0.3 and done.stored < 1e-5
    again = AutoModelForCausalLM.from_pretrained(done.folder)
    assert again.dtype == torch.bfloat16 and again.generation_config.max_new_tokens == 17
    assert AutoTokenizer.from_pretrained(done.folder).chat_template == tiny_tokenizer().chat_template
    text = done.text()
    assert f"{done.rounding:.3g} (allowed: 0.3)" in text and "Warning" not in text
    wider = merge_adapter(folder, str(tmp_path / "wide"), precision="float32")
    assert_close(wider.folder, expected)


def test_a_loaded_base(tmp_path):
    folder = adapter(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    assert_close(merge_adapter(folder, str(tmp_path / "out"), base=model).folder, by_hand(tiny_path(), folder))


def test_an_adapter_that_does_nothing_is_mentioned(tmp_path):
    folder = adapter(tmp_path / "adapter", init_lora_weights=True)
    done = merge_adapter(folder, str(tmp_path / "out"))
    assert done.moved == 0 and "Warning: the adapter changes nothing" in done.text()


def test_changes_below_the_last_bit_of_the_weights_are_mentioned(tmp_path):
    """bfloat16 keeps 8 bits, so a sum with a change of less than 2^-9 is rounded back to the weight."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.bfloat16).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    folder = adapter(tmp_path / "adapter", str(base), lora_alpha=2**-8)
    found = merge_adapter(folder, str(tmp_path / "out"))
    assert found.moved > 0 and "undoes a good part" in found.text()
    assert "undoes" not in merge_adapter(folder, str(tmp_path / "wide"), precision="float32").text()


# Checks that fail


def _unmerged(self, **kwargs):
    return self.unload()


def _other_weights(self, *args, own=PreTrainedModel.save_pretrained, **kwargs):
    next(self.parameters()).data.mul_(1.5)
    own(self, *args, **kwargs)


@pytest.mark.parametrize(
    ("target", "name", "fake", "message"),
    [
        (LoraModel, "merge_and_unload", _unmerged, "merging changed what base plus adapter computes"),
        (PreTrainedModel, "save_pretrained", _other_weights, "the saved weights are not those that were merged"),
    ],
)
def test_nothing_is_left_of_a_wrong_merge(tmp_path, monkeypatch, target, name, fake, message):
    folder = adapter(tmp_path / "adapter")
    monkeypatch.setattr(target, name, fake)
    with pytest.raises(SavedModelError, match=message):
        merge_adapter(folder, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_precision_that_cannot_hold_the_weights(tmp_path):
    """A factor of 1e6 in an adapter: float16 ends at 65504."""
    folder = adapter(tmp_path / "adapter", lora_alpha=10**6)
    with pytest.raises(SavedModelError, match=r"rounding to float16 .*take float32"):
        merge_adapter(folder, str(tmp_path / "out"), precision="float16")
    assert not (tmp_path / "out").exists()


# Refused


def test_a_quantized_base_is_refused(tmp_path):
    folder = adapter(tmp_path / "adapter", wide())
    init = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(wide(), **init)
    for base in (model, str(tmp_path / "stored")):
        if isinstance(base, str):
            model.save_pretrained(base)
        with pytest.raises(MergeError, match=r"quantized: merging would add the adapter to rounded weights.*--base"):
            merge_adapter(folder, str(tmp_path / "out"), base=base)


def test_other_refusals(tmp_path, monkeypatch):
    def refused(message, folder, **kwargs):
        with pytest.raises(MergeError, match=message):
            merge_adapter(folder, str(tmp_path / "out"), **kwargs)
        assert not (tmp_path / "out").exists()

    folder = adapter(tmp_path / "run" / "solver")
    refused(f"holds no adapter itself; name one of {folder}", str(tmp_path / "run"))
    refused("a whole model, not an adapter: there is nothing to merge", tiny_path())
    (tmp_path / "empty").mkdir()
    refused("holds no adapter", str(tmp_path / "empty"))
    refused("cannot read an adapter from 'a/b/c'", "a/b/c")
    refused("cannot read the base model 'nowhere/x/y' .name another with --base", folder, base="nowhere/x/y")
    refused("does not fit", folder, base=wide())
    refused("the adapters name different bases", [folder, adapter(tmp_path / "other", wide())])
    refused("precision 'int8' is not one of float32", folder, precision="int8")
    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path()), prompt).save_pretrained(tmp_path / "prompt")
    refused("PEFT cannot merge an adapter of type PROMPT_TUNING", str(tmp_path / "prompt"))
    with pytest.raises(MergeError, match="is already there"):
        merge_adapter(folder, str(tmp_path / "run"))


# From end to end


def test_command_after_a_run(tmp_path, capsys):
    """`train`, then `merge` of its folder: whole weights that the run's own tokenizer goes with."""
    assert main(["train", recipe(tmp_path)]) == 0
    run, out = str(tmp_path / "run"), str(tmp_path / "whole")
    capsys.readouterr()
    assert main(["merge", run, "--out", out]) == 0
    said = capsys.readouterr().out
    assert f"Merged {run} into {tiny_path()}: {out} (float32)" in said and "loaded again from the folder" in said
    assert_close(out, by_hand(tiny_path(), run))
    assert main(["merge", run, "--out", out]) == 2
    assert f"Error: {out} is already there" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "Error: cannot read an adapter from" in capsys.readouterr().err


def test_an_adapter_trained_on_4_bits_goes_into_the_full_weights(tmp_path, capsys):
    trainer = DPOTrainer(
        wide(),
        args=DPOConfig(**dpo_args(str(tmp_path / "run"))),
        train_dataset=pairs(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    trainer.train()
    trainer.save_model()
    run, out = str(tmp_path / "run"), str(tmp_path / "whole")
    assert main(["merge", run, "--base", wide(), "--dtype", "bfloat16", "--out", out]) == 0
    assert "(bfloat16)" in capsys.readouterr().out
    expected = by_hand(wide(), run)
    found = load_file(Path(out) / "model.safetensors")
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in found.items())
    start = load_file(Path(wide()) / "model.safetensors")
    assert any((expected[name] - start[name]).abs().max() > 1e-4 for name in start), "training moved the adapter"
