"""Which evaluation prompts occur in the adapter's own training data: shared word n-grams.

13-grams anywhere in a prompt, and 8-grams in the question itself. Only hashes of the evaluation's n-grams are kept in
memory; training texts stream past, so that the size of the training set does not matter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

LONG = 13
SHORT = 8
SHOWN = 3
"""Items named in the words."""


@dataclass(frozen=True)
class Overlap:
    """How much of one item occurs in the training texts: shares of its distinct 13-grams and of its question's 8-grams.

    An item shorter than n words counts as one n-gram, its whole text. `rows`: training texts that hold any of them.
    """

    long: float
    short: float
    rows: int

    @property
    def hit(self) -> bool:
        """Whether any n-gram is shared."""
        return self.long > 0 or self.short > 0


@dataclass(frozen=True)
class Contamination:
    """`items`: item id -> overlap, for all items; `share`: of items with a hit; `rows`: training texts read."""

    items: Mapping[str, Overlap]
    share: float
    rows: int

    @property
    def words(self) -> str:
        """The finding in a sentence or two."""
        hits = sorted(
            (name for name, found in self.items.items() if found.hit),
            key=lambda name: -max(self.items[name].long, self.items[name].short),
        )
        if not hits:
            return f"No prompt shares 13 words in a row, and no question 8, with the {self.rows:,} training texts."
        named = ", ".join(
            f"{name} ({max(self.items[name].long, self.items[name].short):.0%})" for name in hits[:SHOWN]
        )
        return (
            f"{len(hits)} of {len(self.items)} prompts ({self.share:.0%}) share 13 words in a row, or 8 of the question, "
            f"with the {self.rows:,} training texts; most: {named}."
        )


def normalised_words(text: str) -> list[str]:
    """Words after NFKC and case folding; whatever is neither letter nor digit separates, marks and accents stay."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in folded)
    return "".join(kept).split()


def gram_hashes(words: Sequence[str], n: int) -> list[int]:
    """64-bit BLAKE2b hashes of all runs of n words: the same on every machine."""
    runs = (" ".join(words[i : i + n]).encode("utf-8", "surrogatepass") for i in range(len(words) - n + 1))
    return [int.from_bytes(blake2b(run, digest_size=8).digest(), "big") for run in runs]


def contamination(prompts: Mapping[str, str], questions: Mapping[str, str], training: Iterable[str]) -> Contamination:
    """Overlap of every item with the `training` texts, each read once.

    `prompts`: item id -> all that the model is given. `questions`: item id -> the question alone. n-grams that more than
    half of two or more items share are the task's instruction, and do not count. Raises ValueError for different ids or
    no items.
    """
    if not prompts or set(prompts) != set(questions):
        raise ValueError("contamination: prompts and questions must name the same items, at least one")
    index = Index.of(prompts, questions)
    touched = dict.fromkeys(prompts, 0)
    rows = 0
    for rows, text in enumerate(training, 1):  # noqa: B007  # the count is used below
        for item in index.met_by(text):
            touched[item] += 1
    long, short = index.kinds
    items = {name: Overlap(long.share(name), short.share(name), touched[name]) for name in prompts}
    return Contamination(items, sum(found.hit for found in items.values()) / len(items), rows)


@dataclass(frozen=True)
class Index:
    """The n-grams of an evaluation, to hold many training texts against one at a time: `kinds` LONG and SHORT."""

    kinds: Sequence[_Kind]

    @classmethod
    def of(cls, prompts: Mapping[str, str], questions: Mapping[str, str]) -> Index:
        """The arguments of `contamination`."""
        return cls((_Kind.of(prompts, LONG), _Kind.of(questions, SHORT)))

    def met_by(self, text: str) -> set[str]:
        """The items that share words with a training text: 13 in a row of the prompt, or 8 of the question."""
        words = normalised_words(text)
        return set().union(*(kind.read(words) for kind in self.kinds))


@dataclass(frozen=True)
class _Kind:
    """n-grams of one length: `grams` of every item, `owners` of every n-gram, `seen` in training, `sizes` in words."""

    grams: Mapping[str, frozenset[int]]
    owners: Mapping[int, Sequence[str]]
    seen: set[int]
    sizes: Sequence[int]

    @classmethod
    def of(cls, texts: Mapping[str, str], n: int) -> _Kind:
        words = {item: normalised_words(text) for item, text in texts.items()}
        grams = {
            item: frozenset(gram_hashes(row, min(n, len(row)))) if row else frozenset() for item, row in words.items()
        }
        owners: dict[int, list[str]] = {}
        for item, found in grams.items():
            for gram in found:
                owners.setdefault(gram, []).append(item)
        kept = {gram: names for gram, names in owners.items() if len(names) == 1 or 2 * len(names) <= len(texts)}
        own = {item: frozenset(gram for gram in found if gram in kept) for item, found in grams.items()}
        return cls(own, kept, set(), sorted({min(n, len(row)) for row in words.values() if row}))

    def read(self, words: Sequence[str]) -> set[str]:
        """The items that share an n-gram with this training text."""
        shared = {gram for n in self.sizes for gram in gram_hashes(words, n) if gram in self.owners}
        self.seen.update(shared)
        return {item for gram in shared for item in self.owners[gram]}

    def share(self, item: str) -> float:
        """Of an item's distinct n-grams, those seen in training; 0 if it has none of its own."""
        own = self.grams[item]
        return len(own & self.seen) / len(own) if own else 0.0
