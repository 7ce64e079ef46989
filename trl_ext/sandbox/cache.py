"""A folder on disk for the warm-started model, built once and shared by every process."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trl_ext.sandbox.demos import CURRICULUM, conversations, vocabulary_texts
from trl_ext.sandbox.model import WarmStart

SOURCES = ("calculator", "demos", "model", "problems", "slips", "tasks", "tokenizer")
LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "datasets", "accelerate")
MARK = "complete.json"  # written last: SHA-256 of every file of the entry
logger = logging.getLogger(__name__)
Builder = Callable[[Path, int], None]


def build(folder: Path, seed: int) -> None:
    """Warm-start a model from `seed` in a process of its own and save it with its tokenizer in `folder`.

    Raises RuntimeError with the end of that process's messages if it fails.
    """
    logger.warning("warm-starting the sandbox model, once: about a minute")
    # The caller may be one of several launched processes, hold a GPU, or have seeded its generators: the build must
    # neither join in nor disturb.
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {
        k: v for k, v in os.environ.items() if k not in launch and not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys; from trl_ext.sandbox.model import save_warm_start as s; s(sys.argv[1], int(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(folder), str(seed)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the sandbox model's warm start failed:\n{result.stderr[-2000:]}")


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


def model_folder(name: str) -> str:
    """Where a model is loaded from: `sandbox` is the warm-started one, built on first use; any other name is itself."""
    return ensure_model() if name == "sandbox" else name
