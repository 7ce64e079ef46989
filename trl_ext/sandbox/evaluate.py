"""Sample replies from a model and grade them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.annotate.prompts import teacher_messages
from trl_ext.forward import generated, undisturbed
from trl_ext.sandbox.rewards import answer_correct, json_valid

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One graded reply: its row's index, its text, its length in tokens, and the two verdicts."""

    row: int
    text: str
    length: int
    valid: bool
    correct: bool


def _messages(row: Row, suffix: str | Callable[[Row], str] | None) -> list[dict[str, Any]]:
    if suffix is None:
        return row["prompt"]
    messages: list[dict[str, Any]] = row["prompt"]
    return teacher_messages(messages, suffix if isinstance(suffix, str) else suffix(row))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    max_new_tokens: int = 64,
    prompt_suffix: str | Callable[[Row], str] | None = None,
) -> list[Record]:
    """Graded replies, `samples` for each row, in the order of `rows`.

    `temperature` 0 decodes greedily. `prompt_suffix` (a text, or a function of the row) is put after the user's text
    and a blank line, where a private note goes. The global random state and the model's mode are left as they were.
    """
    texts = [
        str(tokenizer.apply_chat_template(_messages(row, prompt_suffix), add_generation_prompt=True, tokenize=False))
        for row in rows
    ]
    jobs = [index for index in range(len(rows)) for _ in range(samples)]
    records: list[Record] = []
    with undisturbed(model, seed):
        for at in range(0, len(jobs), batch_size):
            part = jobs[at : at + batch_size]
            ids = _generate(model, tokenizer, [texts[i] for i in part], temperature, max_new_tokens)
            records += _grade(tokenizer, rows, part, ids)
    return records


def _generate(model: Any, tokenizer: Any, texts: list[str], temperature: float, limit: int) -> list[list[int]]:
    """Completion ids of each text, up to and including its end token."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    sampling = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    output = generated(
        model,
        **batch,
        **sampling,
        top_k=0 if temperature else None,
        top_p=1.0 if temperature else None,
        max_new_tokens=limit,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    completions = output[:, batch["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions]


def _grade(tokenizer: Any, rows: Sequence[Row], part: list[int], ids: list[list[int]]) -> list[Record]:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    valid = json_valid(texts)
    correct = answer_correct(texts, answer=[rows[i]["answer"] for i in part])
    return [
        Record(i, text, len(tokens), bool(v), bool(c))
        for i, text, tokens, v, c in zip(part, texts, ids, valid, correct, strict=True)
    ]
