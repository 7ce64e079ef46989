"""Pass rates before training: K rollouts per prompt with the model as it is, and a verifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import apply_chat_template, is_conversational

from trl_ext.forward import evaluating, generated
from trl_ext.methods.grpo.paced import pass_rate
from trl_ext.rewards.checked import Reward

COLUMN = "pass_rate"


def pass_rates(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    reward: Reward,
    *,
    samples: int = 8,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    batch_size: int = 8,
    threshold: float = 0.5,
    smoothing: float = 0.0,
    seed: int = 0,
) -> list[float]:
    """p = (s + c) / (K + 2c) of each row, s of its K `samples` rollouts with a reward of at least `threshold`.

    `rows` have a `prompt` (text or messages) and the columns that `reward` reads; `reward` is called as TRL calls its
    reward functions. `batch_size` prompts, so batch_size * samples completions, are generated at once, with plain
    transformers on the model's device; the global random state is left alone. ValueError if a prompt gets no verdict.
    """
    found: list[float] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = [dict(rows[i]) for i in range(start, min(start + batch_size, len(rows)))]
            ids = _sampled(model, tokenizer, batch, samples, max_new_tokens, temperature)
            found += _scored(tokenizer, batch, ids, reward, samples, threshold, smoothing)
    wrong = [i for i, p in enumerate(found) if math.isnan(p)]
    if wrong:
        raise ValueError(f"the reward gives no verdict on any rollout of row {wrong[0]} ({len(wrong)} rows in all)")
    return found


def with_pass_rates(dataset: Dataset, model: Any, tokenizer: Any, reward: Reward, **settings: Any) -> Dataset:
    """`dataset` with the column `pass_rate`; `settings` go to `pass_rates`."""
    return dataset.add_column(COLUMN, pass_rates(model, tokenizer, dataset, reward, **settings))


def _sampled(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], samples: int, length: int, temperature: float
) -> list[list[int]]:
    """Token ids of `samples` completions per row, one row after the other, up to and without the padding."""
    texts = [apply_chat_template({"prompt": row["prompt"]}, tokenizer)["prompt"] for row in rows]
    templated = is_conversational(rows[0])
    inputs = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not templated
    ).to(model.device)
    made = generated(
        model,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[:, inputs["input_ids"].size(1) :]
    return [_until(row, tokenizer.eos_token_id) for row in made.tolist()]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _scored(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    ids: list[list[int]],
    reward: Reward,
    samples: int,
    threshold: float,
    smoothing: float,
) -> list[float]:
    """The pass rate of each row from its `samples` completions."""
    repeated = [row for row in rows for _ in range(samples)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    talk = is_conversational(rows[0])
    columns = {name: [row[name] for row in repeated] for name in rows[0] if name not in ("prompt", "completion")}
    given = reward(
        prompts=[row["prompt"] for row in repeated],
        completions=[[{"role": "assistant", "content": text}] for text in texts] if talk else texts,
        completion_ids=ids,
        **columns,
    )
    verdicts = [math.nan if value is None or math.isnan(value) else float(value >= threshold) for value in given]
    return pass_rate(torch.tensor(verdicts).view(len(rows), samples), smoothing).tolist()
