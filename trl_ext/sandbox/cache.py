"""A folder on disk for the warm-started model, built once and shared by every process."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trl_ext.sandbox.demos import CURRICULUM, conversations, vocabulary_texts
from trl_ext.sandbox.model import WarmStart, warm_start

SOURCES = ("calculator", "demos", "model", "problems", "slips", "tasks", "tokenizer")
LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "datasets", "accelerate")
MARK = "complete.json"  # written last: SHA-256 of every file of the entry
Builder = Callable[[Path, int], None]


def build(folder: Path, seed: int) -> None:
    """Warm-start a model from `seed` and save it with its tokenizer in `folder`."""
    network, words = warm_start(seed)
    network.save_pretrained(folder)
    words.save_pretrained(folder)


def cache_root(cache_dir: str | None = None) -> Path:
    """`cache_dir`, else `$TRL_EXT_CACHE`, else `~/.cache/trl_ext`."""
    return Path(cache_dir or os.environ.get("TRL_EXT_CACHE") or "~/.cache/trl_ext").expanduser()


def fingerprint(seed: int) -> str:
    """Hash of all that decides the result: generators, settings, the notes' wording, seed, library versions."""
    parts = [Path(__file__).with_name(f"{name}.py").read_text() for name in SOURCES]
    parts += [f"{name}=={importlib.metadata.version(name)}" for name in LIBRARIES]
    # The notes come from another package: their wording counts, not the source around it.
    sample = conversations(dataclasses.replace(CURRICULUM[-1], rows=100), seed)
    parts += [json.dumps([vocabulary_texts(), sample, dataclasses.asdict(WarmStart())]), str(seed)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARK)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _intact(folder: Path) -> bool:
    """Whether `folder` is a finished entry whose files are all as they were written."""
    mark = folder / MARK
    try:
        return json.loads(mark.read_text()) == _digests(folder)
    except (FileNotFoundError, ValueError):  # no entry, an unfinished one, or a damaged mark
        return False


def ensure_model(cache_dir: str | None = None, seed: int = 0, *, builder: Builder = build) -> str:
    """Folder of the warm-started model and tokenizer, built on first use; `from_pretrained` loads it offline.

    Processes that ask at the same time wait for the one that builds. An entry that is not intact is built anew.
    `builder` writes a model into an empty folder; another one than the default gets entries of its own.
    """
    root = cache_root(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    name = "sandbox" if builder is build else builder.__name__
    entry = root / f"{name}-{fingerprint(seed)}"
    with FileLock(f"{entry}.lock"):
        if not _intact(entry):
            shutil.rmtree(entry, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=root, prefix="building-") as building:
                work = Path(building) / "entry"
                work.mkdir()
                builder(work, seed)
                (work / MARK).write_text(json.dumps(_digests(work)))
                work.rename(entry)
    return str(entry)
