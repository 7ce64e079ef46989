"""Answers on disk, keyed by content: one small JSON file per key in two-character subfolders."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ENTRY_BYTES = 8 << 20


def content_key(body: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a request body: model, messages and parameters."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class AnswerCache:
    """Texts under `folder`. An entry that cannot be read counts as absent, and the next `put` replaces it."""

    folder: Path

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> str | None:
        """The stored text, or None if there is none or the file is damaged."""
        try:
            with open(self._path(key), "rb") as file:
                entry = json.loads(file.read(MAX_ENTRY_BYTES))
        except (OSError, ValueError, RecursionError):  # absent, unreadable, cut off, not JSON
            return None
        text = entry.get("text") if isinstance(entry, dict) else None
        return text if isinstance(text, str) else None

    def put(self, key: str, text: str) -> None:
        """Write the text in one step, so that a reader or a killed run never sees half a file. Raises OSError."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"text": text}, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
