"""What must not leave the machine: tokens, secrets of this process, local paths, names of user and host.

Every text in a file is looked at: lines of text, strings and keys of JSON, the header of safetensors, the text parts of
PNG. A find is told by file and place; the message never repeats what was found.
"""

from __future__ import annotations

import getpass
import io
import json
import math
import os
import re
import socket
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import get_token

from evals.report.clean import PATHS

Content = bytes | Path
TOKENS = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{12,}|hf_[A-Za-z0-9]{30,}"),
    "an API key": re.compile(
        r"(?<![A-Za-z0-9])(?:sk-(?=[A-Za-z0-9_-]*\d)[A-Za-z0-9_-]{12,}|AIza[\w-]{30,}|glpat-[\w-]{16,}"
        r"|xox[abeprs]-[\w-]{10,})"
    ),
    "an AWS key": re.compile(r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "a GitHub token": re.compile(
        r"(?<![A-Za-z0-9])gh[opusr]_[A-Za-z0-9]{16,}|gh[opusr]_[A-Za-z0-9]{30,}|github_pat_\w{16,}"
    ),
    "a bearer token": re.compile(r"(?i)\bbearer\s+(?=\S*\d)[A-Za-z0-9._~+/=-]{12,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a password in an address": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
}
SECRET_NAME = re.compile(r"(?i)(^|_)(\w*token|\w*secret|\w*password|passwd|pass|\w*key|credentials?|auth|pat)(_|$)")
"""Names of environment variables that hold secrets."""
MIN_SECRET, MIN_BITS = 8, 2.5
"""Characters, and bits of entropy of a character: "true", "disabled" and the like are no secrets."""
COMMON = {
    "root",
    "user",
    "admin",
    "ubuntu",
    "runner",
    "docker",
    "jovyan",
    "vscode",
    "nobody",
    "localhost",
    "node",
    "vm",
}
"""Names of users and machines that tell nothing."""
MIN_NAME = 3
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
VOCABULARY = {"tokenizer.json": (".model.vocab", ".model.merges"), "vocab.json": ("",)}
"""Parts of JSON files whose pieces of words may look like paths or names: only tokens and secrets count there."""


class Text(NamedTuple):
    """A text within a file. `word_pieces`: a tokenizer's vocabulary."""

    place: str
    text: str
    word_pieces: bool = False


@dataclass(frozen=True)
class Machine:
    """What only this machine knows: secrets and names with a word for each, and folders."""

    secrets: Mapping[str, str]
    folders: tuple[str, ...]
    names: Mapping[str, str]


def this_machine(folders: Iterable[str | Path] = (), public: Iterable[str] = ()) -> Machine:
    """Of this process and user; `folders` count as local too, `public` are names that may be published."""
    token = get_token()
    secrets = {v: f"the value of ${k}" for k, v in os.environ.items() if SECRET_NAME.search(k) and _secret(v)}
    secrets |= {token: "the Hugging Face token of this machine"} if token else {}
    local = {str(Path(f)) for f in (Path.home(), Path.cwd(), tempfile.gettempdir(), *folders)}
    host = socket.gethostname()
    names = {getpass.getuser(): "the name of this user", host: "the name of this machine"}
    names |= {host.partition(".")[0]: "the name of this machine"}
    known = {name.lower() for name in public} | COMMON
    names = {name: what for name, what in names.items() if len(name) >= MIN_NAME and name.lower() not in known}
    return Machine(secrets, tuple(sorted(local - {"/", "."}, key=len, reverse=True)), names)


def _secret(value: str) -> bool:
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return len(value) >= MIN_SECRET and bits >= MIN_BITS


def leaks(name: str, content: Content, machine: Machine, allowed: Iterable[str] = ()) -> list[str]:
    """What was found in the file `name`, as "name, place: what"; [] for nothing. `allowed`: texts to pass over, which
    cannot be tokens or secrets. Raises ValueError for a file that is not what its ending says.
    """
    found = []
    for text in texts(name, content):
        kinds = _secrets_in(text.text, machine) or ([] if text.word_pieces else _local_in(text.text, machine, allowed))
        found += [f"{name}, {text.place}: {kind}" for kind in kinds]
    return list(dict.fromkeys(found))


def _secrets_in(text: str, machine: Machine) -> list[str]:
    kinds = [kind for kind, pattern in TOKENS.items() if pattern.search(text)]
    return kinds + [what for value, what in machine.secrets.items() if value in text]


def _local_in(text: str, machine: Machine, allowed: Iterable[str]) -> list[str]:
    for passed in allowed:
        text = text.replace(passed, "")
    inside = any(re.search(rf"(?<![\w./-]){re.escape(f)}(?![\w.-])", text) for f in machine.folders)
    path = inside or any(not found["url"] for found in PATHS.finditer(text))
    kinds = ["a path of this machine"] if path else []
    for name, what in machine.names.items():
        if re.search(rf"(?i)(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", text):
            kinds.append(what)
    return kinds


def texts(name: str, content: Content) -> Iterator[Text]:
    """All texts in a file, by its ending."""
    if name.endswith(".safetensors"):
        yield from _safetensors(name, content)
        return
    data = content.read_bytes() if isinstance(content, Path) else content
    if name.endswith(".png"):
        yield from _png(name, data)
    elif name.endswith(".model"):
        yield Text("bytes", data.decode("latin-1"), True)
    elif name.endswith(".json"):
        yield from _json(json.loads(data, object_pairs_hook=tuple), "", VOCABULARY.get(name, ()))
    else:
        yield from (
            Text(f"line {i}", line, name == "merges.txt") for i, line in enumerate(data.decode().splitlines(), 1)
        )


def _json(value: Any, place: str, vocabulary: tuple[str, ...]) -> Iterator[Text]:
    """Objects come as tuples of pairs, so that a key that stands twice is seen twice."""
    pieces = place.startswith(vocabulary)
    if isinstance(value, tuple):
        for key, item in value:
            yield Text(f"a key of {place or 'the file'}", key, pieces)
            yield from _json(item, f"{place}.{key if _plain(key) else '(a key)'}", vocabulary)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _json(item, f"{place}[{i}]", vocabulary)
    elif isinstance(value, str):
        yield Text(place, value, pieces)


def _plain(key: str) -> bool:
    """Whether a key may stand in a message."""
    return re.fullmatch(r"[A-Za-z_]{1,40}", key) is not None


def safetensors_header(content: Content) -> dict[str, Any]:
    """Tensor name -> dtype, shape, place, and `__metadata__`. Raises ValueError for another kind of file, and for one
    with bytes that belong to no tensor.
    """
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = dict(json.loads(file.read(size)))
        total = file.seek(0, io.SEEK_END)
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if 8 + size + max(ends, default=0) != total:
        raise ValueError("bytes beside the tensors")
    return header


def _safetensors(name: str, content: Content) -> Iterator[Text]:
    try:
        header = safetensors_header(content)
    except (struct.error, ValueError, OverflowError, MemoryError, KeyError, TypeError):
        raise ValueError(f"{name} is no safetensors file") from None
    for key, value in (header.pop("__metadata__", None) or {}).items():
        yield Text("a key of the metadata", key)
        yield Text(f"metadata {key}" if _plain(key) else "metadata", str(value))
    yield from (Text(f"the name of tensor {i}", key) for i, key in enumerate(header))


def _png(name: str, data: bytes) -> Iterator[Text]:
    """Every part but the pixels, and what follows the end."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{name} is no PNG file")
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind not in PIXELS:
            yield Text(f"PNG part {kind.decode('latin-1')}", _png_text(kind, body))
        at += size + 12
        if kind == b"IEND":
            break
    if at < len(data):
        yield Text("bytes after the PNG", data[at:].decode("latin-1"))


def _png_text(kind: bytes, body: bytes) -> str:
    """Keyword and text; compressed text is unpacked."""
    keyword, _, rest = body.partition(b"\0")
    packed = (kind == b"zTXt" and rest[1:]) or (kind == b"iTXt" and rest[:1] == b"\1" and rest.split(b"\0", 3)[-1])
    if packed:
        try:
            body = keyword + b" " + zlib.decompress(packed)
        except zlib.error:
            raise ValueError("a PNG file has a part that cannot be unpacked") from None
    return body.decode("utf-8", "replace") if kind == b"iTXt" else body.decode("latin-1")
