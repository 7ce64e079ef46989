"""Vision-language models: stock TRL bit for bit, second forwards with images, and a prompt that is partly hidden."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import trl_ext
from tests.tiny import assert_equal, grpo_args, letters_reward, prompts, tiny_path, weights
from tests.tiny_vlm import NO_VISION, image_prompts, tiny_processor, tiny_vlm_path
from trl_ext import hidden_prompt
from trl_ext.batch import model_images
from trl_ext.method import HIDDEN, HIDE_PROMPT, POLICY, REFERENCE, TEACHER, Method
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError

SEEN: list = []
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"])


@dataclass(frozen=True)
class Probe(Method):
    """Base of the test methods: known by the name "probe"."""

    name = "probe"
    title = paper = "none"


def train(folder, cls=trl_ext.GRPOTrainer, config=trl_ext.GRPOConfig, data=None, peft=None, **kwargs):
    args = config(**grpo_args(str(folder), **{"max_steps": 2, "generation_kwargs": NO_VISION} | kwargs))
    trainer = cls(
        tiny_vlm_path(),
        letters_reward,
        args,
        image_prompts() if data is None else data,
        processing_class=tiny_processor(),
        peft_config=peft,
    )
    trainer.train()
    return trainer


def probed(monkeypatch, folder, cls, **kwargs):
    SEEN.clear()
    monkeypatch.setitem(METHODS, "probe", cls)
    return train(folder, methods="probe", **kwargs)


@pytest.mark.parametrize(
    "methods",
    [
        None,
        {"pgpo": {"threshold": 0, "boost": 0}},
        {"high_entropy": {"quantile": 0}},
        {"trace": {"annotator": "tests.tiny.annotate_nothing"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_neutral_settings_are_trl(tmp_path, methods, peft):
    settings = {"beta": 0.1, "num_iterations": 2, "peft": peft}
    stock = train(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, **settings)
    ours = train(tmp_path, methods=methods, **settings)
    assert any("visual" in name for name in weights(ours)), "the vision tower is trained too"
    assert_equal(weights(stock), weights(ours))


@dataclass(frozen=True)
class Others(Probe):
    """Runs policy, teacher and reference on rows 6 and 1 (in this order), with their own prompt and with a longer one."""

    owns = ("teacher",)

    def needs(self):
        return frozenset({TEACHER, REFERENCE, HIDDEN})

    def sync_teacher(self, step, run):
        return step == 0

    def streams(self, rollout):
        noted = [[*p[:-1], {"role": "user", "content": [*p[-1]["content"], NOTE]}] for p in rollout.prompts]
        ids = rollout.encode_prompts(noted)
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        return {"ids": padded, "mask": (padded != 0).long()}

    def aux_loss(self, x):
        rows = torch.tensor([6, 1])
        every = torch.ones_like(x.mask[rows]).bool()
        noted = x.streams["ids"][rows], x.streams["mask"][rows]
        found = {which: x.other(which, rows).log_probs_at(every) for which in (POLICY, TEACHER, REFERENCE)}
        found |= {f"{which} noted": x.other(which, rows, *noted).log_probs_at(every) for which in (POLICY, REFERENCE)}
        SEEN.append(
            (found, noted, x.policy.log_probs_at(torch.isin(torch.arange(8), rows).unsqueeze(1) & x.mask.bool()))
        )
        return None


NOTE = {"type": "text", "text": " (think)"}


def plain(model, inputs, rows, prompt_ids=None, prompt_mask=None, attended=None):
    """The slow way: one row at a time through a stock model, positions from the whole mask given by hand."""
    found = []
    for row in rows:
        pixels = inputs["image_grid_thw"].prod(1)
        start = int(pixels[:row].sum())
        one = lambda name, own=None, i=row: inputs[name][i : i + 1] if own is None else own  # noqa: E731
        k = list(rows).index(row)
        ids = torch.cat(
            [one("prompt_ids", None if prompt_ids is None else prompt_ids[k : k + 1]), one("completion_ids")], 1
        )
        mask = torch.cat(
            [one("prompt_mask", None if prompt_mask is None else prompt_mask[k : k + 1]), one("completion_mask")], 1
        )
        grid = inputs["image_grid_thw"][row : row + 1]
        types = (ids == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                attention_mask=mask if attended is None else attended[k : k + 1],
                position_ids=positions,
                pixel_values=inputs["pixel_values"][start : start + int(pixels[row])],
                image_grid_thw=grid,
                mm_token_type_ids=types,
            ).logits
        length = inputs["completion_ids"].size(1)
        found.append(logits[0, -length - 1 : -1].log_softmax(-1))
    return torch.cat(found)


@pytest.fixture
def batches(monkeypatch):
    """Micro-batches as the loss gets them."""
    seen = []
    original = trl_ext.GRPOTrainer._compute_loss
    monkeypatch.setattr(
        trl_ext.GRPOTrainer,
        "_compute_loss",
        lambda self, model, inputs: seen.append(inputs) or original(self, model, inputs),
    )
    return seen


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_second_forwards_see_the_rows_images(monkeypatch, tmp_path, batches, peft):
    trainer = probed(monkeypatch, tmp_path, Others, peft=peft, learning_rate=0.1)
    start = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path())
    for inputs, (found, noted, _) in zip(batches, SEEN, strict=True):
        expected, with_note = plain(start, inputs, [6, 1]), plain(start, inputs, [6, 1], *noted)
        torch.testing.assert_close(found[REFERENCE], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[TEACHER], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[f"{REFERENCE} noted"], with_note, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(with_note, expected, atol=1e-2), "the note is read"
    assert not torch.allclose(SEEN[-1][0][POLICY], SEEN[-1][0][REFERENCE], atol=1e-3), "the policy has moved"
    assert trainer.state.global_step == 2


@dataclass(frozen=True)
class Blind(Probe):
    """Hides the images, and the second token of every prompt."""

    def needs(self):
        return frozenset({HIDE_PROMPT})

    def streams(self, rollout):
        hide = rollout.images.clone()
        first = rollout.prompt_mask.argmax(1)
        hide[torch.arange(8), first + 1] = True
        rows = torch.tensor([6, 1])
        every = torch.ones_like(rollout.mask[rows]).bool()
        some = rollout.other(POLICY, rows, hide=hide[rows]).log_probs_at(every)
        SEEN.append((hide, rollout.blind_logps(hide), some, rollout.completion_ids))
        return {"hide": hide}


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_hidden_images_keep_all_positions(monkeypatch, tmp_path, batches, peft, micro_batch):
    """Equal to the stock model with the changed mask and the positions of the whole one; else they would shift."""
    steps = 8 // micro_batch
    probed(
        monkeypatch,
        tmp_path,
        Blind,
        peft=peft,
        max_steps=1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=steps,
    )
    start = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path())
    (hide, logps, some, ids) = SEEN[0]
    seen = {}
    for inputs in batches:
        for row in range(micro_batch):
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[row : row + 1]
            attended = hidden_prompt.without(mask, inputs["probe/hide"][row : row + 1])
            full = plain(start, inputs, [row], attended=attended)
            own = inputs["completion_ids"][row]
            seen[tuple(own.tolist()), int(inputs["probe/hide"][row].sum())] = full
    for row in range(8):
        full = seen[tuple(ids[row].tolist()), int(hide[row].sum())]
        valid = ids[row] != 0
        sampled = full.gather(1, ids[row].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logps[row][valid], sampled[valid], rtol=1e-4, atol=1e-4)
        if row in (6, 1):
            part = some.view(2, *full.shape)[[6, 1].index(row)]
            torch.testing.assert_close(part[valid], full[valid], rtol=1e-4, atol=1e-4)


def test_without_kept_positions_it_would_differ():
    """What the service is for: the stock model counts positions in the mask."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    image = torch.tensor([[5, model.config.image_token_id, 7, 8, 9, 10]])
    types, grid = (image == model.config.image_token_id).int(), torch.tensor([[1, 2, 2]])
    whole, part = torch.ones_like(ids), torch.tensor([[1, 1, 0, 0, 1, 1]])
    kept, _ = model.model.get_rope_index(image, types, image_grid_thw=grid, attention_mask=whole)
    moved, _ = model.model.get_rope_index(image, types, image_grid_thw=grid, attention_mask=part)
    assert not torch.equal(kept[..., 4:], moved[..., 4:])


def test_hidden_text_keeps_all_positions(monkeypatch, tmp_path):
    """A text model: the same service, against the stock model with positions given by hand."""

    @dataclass(frozen=True)
    class BlindText(Blind):
        def streams(self, rollout):
            hide = torch.zeros_like(rollout.prompt_mask, dtype=torch.bool)
            hide[:, -16:-12] = True
            SEEN.append(
                (hide, rollout.blind_logps(hide), rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids)
            )
            assert not rollout.images.any()
            return {}

    monkeypatch.setitem(METHODS, "probe", BlindText)
    SEEN.clear()
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path), max_steps=1), methods="probe")
    trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts()).train()
    hide, logps, prompt, mask, completion = SEEN[0]
    ids = torch.cat([prompt, completion], 1)
    attended = torch.cat([mask * ~hide, (completion != 0).long()], 1)
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    with torch.no_grad():
        logits = model(ids, attention_mask=attended, position_ids=torch.arange(ids.size(1)).unsqueeze(0)).logits
    expected = logits[:, prompt.size(1) - 1 : -1].log_softmax(-1).gather(2, completion.unsqueeze(2)).squeeze(2)
    valid = completion != 0
    torch.testing.assert_close(logps[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_rows_without_an_image_in_a_mixed_batch():
    """Their part of the pixels is empty, and the model is not handed an empty image."""
    types = torch.tensor([[0, 1], [0, 0], [1, 1]])
    inputs = {
        "pixel_values": torch.arange(12.0).view(12, 1),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2], [1, 2, 2]]),
        "num_images": [1, 0, 2],
        "mm_token_type_ids": types,
    }
    found = model_images(inputs, torch.tensor([2, 1]))
    assert found["pixel_values"].flatten().tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert found["image_grid_thw"].shape == (2, 3) and torch.equal(found["mm_token_type_ids"], types[[2, 1]])
    assert set(model_images(inputs, torch.tensor([1]))) == {"mm_token_type_ids"}
    assert model_images({"prompt_ids": types}, torch.tensor([1])) == {}


def test_image_and_video_tokens_are_told_apart():
    config = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path()).config
    ids = torch.tensor([[3, config.image_token_id, config.video_token_id]])
    assert hidden_prompt.image_tokens(ids, config).tolist() == [[0, 1, 2]]


def test_a_model_that_cannot_hide_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "probe", Blind)
    monkeypatch.setitem(hidden_prompt.CANNOT_HIDE, "qwen3", "its positions are painted")
    args = trl_ext.GRPOConfig(**grpo_args(str(tmp_path)), methods="probe")
    with pytest.raises(PlanError, match=r"probe: no part of the prompt can be hidden .* painted"):
        trl_ext.GRPOTrainer(tiny_path(), letters_reward, args, prompts())


def test_a_mask_in_another_form_is_refused():
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(TypeError, match="takes no attention mask of shape"), hidden_prompt.attending(model, [ids]):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4))
    model(ids)  # the hook is gone after the error


def test_trace_learns_from_a_note_beside_an_image(tmp_path):
    """Its teacher reads the image and the note: the second forward that used to be refused."""
    settings = {"annotator": "tests.tiny.annotate_first", "action": "both", "coverage": 1.0}
    trainer = train(tmp_path, methods={"trace": settings})
    entry = trainer.state.log_history[0]
    assert entry["trace/rows_with_span"] > 0
    assert max(entry.get("trace/rkl_on_spans", 0), entry.get("trace/fkl_on_spans", 0)) > 0
