"""The sandbox's knowledge texts (`dataset_name: sandbox/topic`): whom and what a question is to be about."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from trl_ext.sandbox.problems import ITEMS, NAMES
from trl_ext.sandbox.tasks import user

TOPICS = "topic"


def topic(name: str, item: str) -> str:
    """The text itself, in words of the sandbox's vocabulary."""
    return f"{name} has {item}."


def topics(n: int = 1000, seed: int = 0, split: str = "train", difficulty: Any = None) -> Dataset:
    """`n` rows with the Proposer's prompt: one text for each name and item, in random order, over and over.

    The same for every split: they hold no question. ValueError for `difficulty`, which the Proposer decides.
    """
    if difficulty is not None:
        raise ValueError("difficulty: the Proposer decides how hard its questions are; remove it")
    rng = random.Random(f"topics/{seed}")
    texts: list[str] = []
    while len(texts) < n:
        fresh = [topic(name, item) for name in NAMES for item in ITEMS]
        rng.shuffle(fresh)
        texts += fresh
    return Dataset.from_list([{"prompt": user(text)} for text in texts[:n]])
