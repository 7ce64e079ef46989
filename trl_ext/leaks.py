"""What must not leave the machine: tokens, secrets of this process, local paths, names of user and host.

Every text in a file is looked at: lines of text, strings and keys of JSON, the header of safetensors, the text parts of
PNG. A find is told by file and place; the message never repeats what was found.
"""

from __future__ import annotations

import getpass
import io
import ipaddress
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

from evals.report.clean import PATHS, TOKENS

Content = bytes | Path
PASSWORD = re.compile(r"://[^/\s:@]+:[^/\s@]+@")
_HOST = r"(?:localhost|\d{1,3}(?:\.\d{1,3}){3})"
ADDRESS = re.compile(rf"(?i)(?<![\w.-]){_HOST}(?=:\d{{2,5}}(?!\d))|(?<=://){_HOST}(?![\w.-])")
"""Hosts with a port or a scheme: without either, four numbers are a version."""
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
    kinds += ["a password in an address"] if PASSWORD.search(text) else []
    return kinds + [what for value, what in machine.secrets.items() if value in text]


def _local_in(text: str, machine: Machine, allowed: Iterable[str]) -> list[str]:
    for passed in allowed:
        text = text.replace(passed, "")
    inside = any(re.search(rf"(?<![\w./-]){re.escape(f)}(?![\w.-])", text) for f in machine.folders)
    path = inside or any(not found["url"] for found in PATHS.finditer(text))
    kinds = ["a path of this machine"] if path else []
    kinds += (
        ["an address of this network"] if any(not public_host(found[0]) for found in ADDRESS.finditer(text)) else []
    )
    for name, what in machine.names.items():
        if re.search(rf"(?i)(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", text):
            kinds.append(what)
    return kinds


def public_host(host: str) -> bool:
    """Whether a host means the same to everybody."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".local", ".internal", ".lan", ".corp"))


def texts(name: str, content: Content) -> Iterator[Text]:
    """All texts in a file, by its ending. Raises ValueError, which names it, for one that cannot be read."""
    if name.endswith(".safetensors"):
        yield from _safetensors(name, content)
        return
    data = content.read_bytes() if isinstance(content, Path) else content
    if name.endswith(".png"):
        yield from _png(name, data)
    elif name.endswith(".model"):
        yield Text("bytes", data.decode("latin-1"), True)
    elif name.endswith(".json"):
        yield from _json(_loaded(name, data), "", VOCABULARY.get(name, ()))
    else:
        lines = _decoded(name, data).splitlines()
        yield from (Text(f"line {i}", line, name == "merges.txt") for i, line in enumerate(lines, 1))


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: byte {error.start} fits nothing") from None


def _loaded(name: str, data: bytes) -> Any:
    text = _decoded(name, data)
    try:
        return json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error.msg}, line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{name} cannot be searched: its JSON is nested too deeply") from None


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


def safetensors_header(content: Content) -> tuple[tuple[str, Any], ...]:
    """(tensor name, its dtype, shape and place), and (`__metadata__`, texts): all pairs, also of a key that stands twice.

    Raises ValueError for another kind of file, and for one with bytes that belong to no tensor.
    """
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size), object_pairs_hook=tuple)
        total = file.seek(0, io.SEEK_END)
    ends = [dict(tensor)["data_offsets"][1] for name, tensor in header if name != "__metadata__"]
    if 8 + size + max(ends, default=0) != total:
        raise ValueError("bytes beside the tensors")
    return header


def _safetensors(name: str, content: Content) -> Iterator[Text]:
    try:
        header = safetensors_header(content)
    except (struct.error, ValueError, OverflowError, MemoryError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{name} is no safetensors file") from None
    for key, value in (pair for name, texts in header if name == "__metadata__" for pair in texts or ()):
        yield Text("a key of the metadata", key)
        yield Text(f"metadata {key}" if _plain(key) else "metadata", str(value))
    yield from (Text(f"the name of tensor {i}", key) for i, (key, _) in enumerate(header) if key != "__metadata__")
    tensors = [tensor for key, tensor in header if key != "__metadata__"]
    yield from (text._replace(place="what a tensor is") for tensor in tensors for text in _json(tensor, "tensor", ()))


def _png(name: str, data: bytes) -> Iterator[Text]:
    """Every part but the pixels, and what follows the end."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{name} is no PNG file")
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind not in PIXELS:
            yield Text(f"PNG part {kind.decode('latin-1')}", _png_text(name, kind, body))
        at += size + 12
        if kind == b"IEND":
            break
    if at < len(data):
        yield Text("bytes after the PNG", data[at:].decode("latin-1"))


def _png_text(name: str, kind: bytes, body: bytes) -> str:
    """Keyword and text; compressed text is unpacked."""
    keyword, _, rest = body.partition(b"\0")
    packed = (kind == b"zTXt" and rest[1:]) or (kind == b"iTXt" and rest[:1] == b"\1" and rest.split(b"\0", 3)[-1])
    if packed:
        try:
            body = keyword + b" " + zlib.decompress(packed)
        except zlib.error:
            raise ValueError(f"{name} has a part that cannot be unpacked") from None
    return body.decode("utf-8", "replace") if kind == b"iTXt" else body.decode("latin-1")
