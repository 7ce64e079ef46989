"""What methods see and add in KTO: values against a slow reference, prompt embeddings, errors for people."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM

from tests.test_dpo_methods import shaken
from tests.tiny import dpo_args, labelled, tiny_path, tiny_tokenizer
from trl_ext.kto import KTOConfig, KTOTrainer
from trl_ext.method import HIDDEN, REFERENCE, Method
from trl_ext.methods import METHODS
from trl_ext.plan import PlanError


@dataclass(frozen=True)
class Labels(Method):
    """Keeps what it saw; `zeroing` returns a loss of 0."""

    name = "labels"
    title = "A paper"
    paper = "2402.01306"
    trainer = "kto"
    seen = data = None

    def needs(self):
        return frozenset({REFERENCE})

    def sentence_encoders(self):
        return (tiny_path(),)

    def start_labels(self, data):
        type(self).data = data

    def observe_labels(self, x):
        type(self).seen = x


@dataclass(frozen=True)
class Zeroing(Method):
    """A loss of 0 for every completion."""

    name = "zeroing"
    title = "A paper"
    paper = "2402.01306"
    trainer = "kto"

    def label_loss(self, x):
        return torch.zeros_like(x.logps)


@dataclass(frozen=True)
class Scalar(Zeroing):
    """Returns a mean where a loss per completion is due."""

    name = "scalar"

    def label_loss(self, x):
        return x.logps.mean()


@dataclass(frozen=True)
class Greedy(Zeroing):
    """Needs what only GRPO has."""

    name = "greedy"

    def needs(self):
        return frozenset({HIDDEN})


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    for cls in (Labels, Zeroing, Scalar, Greedy):
        monkeypatch.setitem(METHODS, cls.name, cls)


def make(folder, lora=False, data=None, **kwargs):
    return KTOTrainer(
        tiny_path(),
        args=KTOConfig(**dpo_args(str(folder), **kwargs)),
        train_dataset=data or labelled(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def batch_of(trainer, n=4):
    rows = [trainer.train_dataset[i] for i in range(n)]
    keys = trainer._signature_columns or trainer._set_signature_columns_if_needed() or trainer._signature_columns
    return trainer._prepare_inputs(trainer.data_collator([{k: r[k] for k in keys if k in r} for r in rows]))


def seen(trainer, n=4):
    shaken(trainer).model.train()
    batch = batch_of(trainer, n)
    trainer.compute_loss(trainer.model, batch)
    return Labels.seen, batch


def sums(model, batch):
    """Completion log-probs (B,) from full logits, token by token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float().log_softmax(-1)
    found = []
    for row, ids in enumerate(batch["input_ids"]):
        places = [t for t in range(1, len(ids)) if batch["completion_mask"][row, t]]
        found.append(sum(logits[row, t - 1, ids[t]] for t in places))
    return torch.stack([torch.as_tensor(f) for f in found])


def by_hand_embedding(texts):
    """Mean over the tokens of the untrained model's last hidden states, one prompt at a time."""
    model, tokenizer = AutoModel.from_pretrained(tiny_path()), tiny_tokenizer()
    with torch.no_grad():
        return torch.stack(
            [model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0) for text in texts]
        )


@pytest.mark.parametrize(
    "extra", [{}, {"precompute_ref_log_probs": True}, {"loss_type": "apo_zero_unpaired"}], ids=str
)
@pytest.mark.parametrize("lora", [False, True])
def test_values_of_both_forwards(tmp_path, lora, extra):
    trainer = make(tmp_path, lora, methods="labels", **extra)
    x, batch = seen(trainer)
    torch.testing.assert_close(x.logps, sums(trainer.model, batch), atol=1e-4, rtol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(tiny_path())
    torch.testing.assert_close(x.ref_logps, sums(stock, batch), atol=1e-4, rtol=1e-5)
    assert (x.logps - x.ref_logps).abs().max() > 0.1
    assert x.label.tolist() == [False, True, True, False] and x.beta == 0.2 and x.step == 0 and x.training


@pytest.mark.parametrize("lora", [False, True])
def test_prompts_are_embedded_by_the_frozen_model(tmp_path, lora):
    """In the batch, whose rows are padded, and from the training set: the mean over each prompt's own tokens."""
    data = labelled().map(lambda row, i: {"prompt": "why " * (1 + i % 3) + row["prompt"]}, with_indices=True)
    trainer = make(tmp_path, lora, data, methods="labels", max_length=64)
    x, _ = seen(trainer)
    expected = by_hand_embedding(data["prompt"][:])
    rows = torch.tensor([3, 0])
    torch.testing.assert_close(x.embed_prompts(rows, None), expected[rows], atol=1e-5, rtol=1e-5)
    rows = torch.tensor([7, 2, 11, 4, 0])
    torch.testing.assert_close(Labels.data.embed_prompts(rows, None), expected[rows], atol=1e-5, rtol=1e-5)
    assert Labels.data.label.tolist() == data["label"][:] and Labels.data.has_prompt.all() and x.has_prompt.all()
    torch.testing.assert_close(x.embed_prompts(torch.tensor([1]), tiny_path()), expected[1:2], atol=1e-5, rtol=1e-5)


class Ranked:
    """An accelerator as one of three processes sees it."""

    num_processes = 3

    def __init__(self, real, rank):
        self.real, self.process_index = real, rank

    def __getattr__(self, name):
        return getattr(self.real, name)


def test_a_process_without_a_row_takes_part(tmp_path, monkeypatch):
    """Two rows over three processes, and seven: each process gets all of them, in order."""
    trainer = make(tmp_path, methods="labels", max_length=64)
    real = trainer.accelerator

    def embed_as(rank, indices, gather):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "accelerator", Ranked(real, rank))
            patch.setattr(trainer, "_gather_values", gather)
            return trainer._embed_rows(indices, None)

    for indices in (torch.tensor([5, 1]), torch.tensor([7, 2, 11, 4, 0, 3, 9])):
        expected, sent = trainer._embed_rows(indices, None), []

        def send(values, sent=sent):
            sent.append(values)
            raise InterruptedError  # the others have not sent theirs yet

        for rank in range(3):
            with pytest.raises(InterruptedError):
                embed_as(rank, indices, send)
        for rank in range(3):
            found = embed_as(rank, indices, lambda values, sent=sent: (torch.cat(sent), slice(None)))
            torch.testing.assert_close(found, expected)


def test_a_loss_of_zero_trains_nothing(tmp_path):
    trainer = make(tmp_path, methods="zeroing", loss_type="zeroing")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not any("kl" in entry for entry in entries), "nothing measured it"
    assert [entry["loss"] for entry in entries] == [0.0] * 3 and {entry["grad_norm"] for entry in entries} == {0.0}


def test_trl_has_its_own_weights_back_after_an_error(tmp_path):
    trainer = make(tmp_path, methods="scalar", loss_type="scalar", desirable_weight=0.5)
    with pytest.raises(ValueError, match=r"scalar: label_loss must return one loss per completion, \(4,\), got \(\)"):
        trainer.compute_loss(trainer.model, batch_of(trainer))
    assert (trainer.desirable_weight, trainer.undesirable_weight) == (0.5, 1.0)


def test_a_stream_has_no_prompts_to_draw(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(labelled()))
    trainer = make(tmp_path, data=stream, methods="labels")
    with pytest.raises(PlanError, match="labels: draws prompts from the whole training set"):
        trainer.train()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_type": "kot"}, "loss_type: 'kot' is neither .* did you mean 'kto'"),
        ({"loss_type": "zeroing"}, "loss_type: 'zeroing' is neither a loss of TRL nor a method under `methods`"),
        ({"methods": "zeroing"}, "zeroing: replaces TRL's loss, so name it: `loss_type: zeroing`"),
        ({"methods": ["zeroing", "scalar"], "loss_type": "scalar"}, "zeroing and scalar each replace the loss"),
        ({"methods": "greedy", "loss_type": "greedy"}, "greedy: the kto trainer does not provide hidden"),
        ({"methods": "high_entropy"}, "high_entropy: runs in the grpo trainer, this is kto"),
    ],
)
def test_configurations_that_cannot_run(tmp_path, kwargs, message):
    with pytest.raises(PlanError, match=message):
        KTOConfig(**dpo_args(str(tmp_path), **kwargs))


def test_a_configuration_changed_later_is_checked_again(tmp_path):
    args = KTOConfig(**dpo_args(str(tmp_path)))
    args.methods = "zeroing"
    with pytest.raises(PlanError, match=r"zeroing: .*name it"):
        KTOTrainer("no such model: it must not be loaded", args=args, train_dataset=labelled())


def test_numbers_as_labels(tmp_path):
    data = labelled()
    numbers = Dataset.from_dict({**data.to_dict(), "label": [int(x) for x in data["label"]]})
    x, _ = seen(make(tmp_path, data=numbers, methods="labels"))
    assert x.label.tolist() == [False, True, True, False]
