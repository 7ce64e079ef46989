from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from trl_ext.sandbox import cache, ensure_model


def stand_in(folder: Path, seed: int) -> None:
    """A quick builder that leaves a trace of each build beside the cache."""
    time.sleep(0.3)
    (folder / "weights").write_text(f"weights of seed {seed}")
    with (folder.parents[1] / "builds").open("a") as log:
        log.write(f"{os.getpid()}\n")


def ask(root: str, queue: multiprocessing.Queue) -> None:
    queue.put(ensure_model(root, builder=stand_in))


def builds(root: Path) -> int:
    return len((root / "builds").read_text().splitlines())


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=ask, args=(str(tmp_path), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(folders) == 1
    assert builds(tmp_path) == 1
    assert (Path(folders.pop()) / "weights").read_text() == "weights of seed 0"
    assert not list(tmp_path.glob("building-*"))


def test_a_second_call_reuses_and_another_seed_does_not(tmp_path: Path) -> None:
    first = ensure_model(str(tmp_path), builder=stand_in)
    assert ensure_model(str(tmp_path), builder=stand_in) == first
    assert ensure_model(str(tmp_path), seed=1, builder=stand_in) != first
    assert builds(tmp_path) == 2


@pytest.mark.parametrize("damage", ["changed", "lost", "added", "unfinished", "mark"])
def test_a_damaged_entry_is_built_anew(tmp_path: Path, damage: str) -> None:
    entry = Path(ensure_model(str(tmp_path), builder=stand_in))
    if damage == "changed":
        (entry / "weights").write_text("weights of seed 1")
    elif damage == "lost":
        (entry / "weights").unlink()
    elif damage == "added":
        (entry / "adapter").write_text("?")
    elif damage == "unfinished":
        (entry / cache.MARK).unlink()
    else:
        (entry / cache.MARK).write_text("{")
    assert Path(ensure_model(str(tmp_path), builder=stand_in)) == entry
    assert builds(tmp_path) == 2
    assert [path.name for path in sorted(entry.iterdir())] == [cache.MARK, "weights"]


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path, seed: int) -> None:
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ensure_model(str(tmp_path), builder=broken)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "a"))
    assert cache.cache_root() == tmp_path / "a"
    assert cache.cache_root(str(tmp_path / "b")) == tmp_path / "b"
    monkeypatch.delenv("TRL_EXT_CACHE")
    assert cache.cache_root() == Path.home() / ".cache" / "trl_ext"


def test_key_follows_seed_settings_and_the_wording_of_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cache.fingerprint(0), cache.fingerprint(1)}
    monkeypatch.setattr("trl_ext.annotate.prompts._WRONG_NOTE", "[note] {types}")
    keys.add(cache.fingerprint(0))
    monkeypatch.undo()
    assert len(keys) == 3
    assert cache.fingerprint(0) in keys
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "0")
    assert cache.fingerprint(0) not in keys


def test_mark_lists_every_file(tmp_path: Path) -> None:
    entry = Path(ensure_model(str(tmp_path), builder=stand_in))
    assert set(json.loads((entry / cache.MARK).read_text())) == {"weights"}
