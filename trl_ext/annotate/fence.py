"""What a judge is shown of others' texts, so that none of them can end its place and speak as the instructions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping


def content_code(texts: Iterable[str]) -> str:
    """16 hexadecimal digits (64 bits) of the SHA-256 of the texts in order."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fenced(parts: Mapping[str, str]) -> str:
    """Each text under its name, between two lines of equals signs with one code of all the texts.

    No text can hold the code of itself, so none can write the line that closes its place.
    """
    bar = f"{'=' * 10} {content_code(parts.values())} {'=' * 10}"
    return "\n".join(f"{name}:\n{bar}\n{text}\n{bar}" for name, text in parts.items())
