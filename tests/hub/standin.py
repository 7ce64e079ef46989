"""A stand-in of the Hub on this machine: the part of its HTTP API that publishing needs, and a record of every byte."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_standInTokenStandInTokenStandIn1"
USER = "alice"


@dataclass
class Repo:
    """Files by name, and the number of commits; `sha` names the newest."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Failure:
    """The next `times` requests whose line ("POST /api/...") matches get this status."""

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class StandIn:
    """The state of the Hub. `requests`: (method, path, body) as they came."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)

    def received(self) -> bytes:
        """All bodies and what is in them as base64, which is how small files are sent."""
        whole = b"\n".join(body for _, _, body in self.requests)
        encoded = re.findall(rb'"(?:content|sample)":\s*"([A-Za-z0-9+/=]+)"', whole)
        return whole + b"\n".join(base64.b64decode(text) for text in encoded)

    def lines(self, pattern: str = "") -> list[str]:
        """ "POST /api/..." of the requests that match."""
        found = [f"{method} {path}" for method, path, _ in self.requests]
        return [line for line in found if re.search(pattern, line)]

    def uploads(self) -> list[str]:
        return self.lines("^(PUT /lfs|POST .*/commit/)")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self) -> None:
        body = self._body()
        self.hub.requests.append((self.command, self.path, body))
        status, content, headers = self._outcome(body)
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _outcome(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        line = f"{self.command} {self.path}"
        for failure in self.hub.failures:
            if failure.times > 0 and re.search(failure.pattern, line):
                failure.times -= 1
                return failure.status, {"error": "as the test wishes"}, failure.headers
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/lfs/"):
            return 401, {"error": "Invalid username or password."}, {}
        for pattern, act in ROUTES.items():
            if found := re.fullmatch(pattern, line):
                return act(self.hub, body, *found.groups())
        return 404, {"error": f"no route {line}"}, {}


def _whoami(hub: StandIn, body: bytes) -> tuple[int, Any, dict[str, str]]:
    return 200, {"type": "user", "name": USER, "orgs": []}, {}


def _create(hub: StandIn, body: bytes) -> tuple[int, Any, dict[str, str]]:
    asked = json.loads(body)
    owner = asked.get("organization") or USER
    name = f"{owner}/{asked['name']}"
    if owner != USER:
        return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}, {}
    if name in hub.repos:
        return 409, {"error": "You already created this model repo"}, {}
    hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return 200, {"url": f"{hub.endpoint}/{name}", "name": name, "id": name}, {}


def _info(hub: StandIn, body: bytes, name: str) -> tuple[int, Any, dict[str, str]]:
    if name not in hub.repos:
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
    repo = hub.repos[name]
    about = {
        "id": name,
        "modelId": name,
        "sha": repo.sha,
        "private": repo.private,
        "tags": [],
        "downloads": 0,
        "likes": 0,
    }
    card = re.match(r"---\n(.*?)\n---", repo.files.get("README.md", b"").decode(), re.DOTALL)
    data = {"cardData": yaml.safe_load(card[1])} if card else {}
    return 200, {**about, **data, "siblings": [{"rfilename": path} for path in repo.files]}, {}


def _yaml_is_fine(hub: StandIn, body: bytes) -> tuple[int, Any, dict[str, str]]:
    return 200, {"errors": [], "warnings": []}, {}


def _preupload(hub: StandIn, body: bytes, name: str) -> tuple[int, Any, dict[str, str]]:
    held, files = hub.repos[name].files, []
    for file in json.loads(body)["files"]:
        path, known = file["path"], {}
        if path in held:
            known = {"oid": hashlib.sha256(held[path]).hexdigest() if _large(path) else _git_oid(held[path])}
        files.append(
            {"path": path, "uploadMode": "lfs" if _large(path) else "regular", "shouldIgnore": False, **known}
        )
    return 200, {"files": files}, {}


def _batch(hub: StandIn, body: bytes, name: str) -> tuple[int, Any, dict[str, str]]:
    def one(asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{hub.endpoint}/lfs/{asked['oid']}", "header": {}}}
        return asked if asked["oid"] in hub.blobs else {**asked, "actions": upload}

    return 200, {"transfer": "basic", "objects": [one(o) for o in json.loads(body)["objects"]]}, {}


def _put(hub: StandIn, body: bytes, oid: str) -> tuple[int, Any, dict[str, str]]:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.blobs[oid] = body
    return 200, None, {}


def _commit(hub: StandIn, body: bytes, name: str) -> tuple[int, Any, dict[str, str]]:
    repo = hub.repos[name]
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            repo.files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            repo.files[value["path"]] = hub.blobs[value["oid"]]
        elif item["key"] == "deletedFile":
            del repo.files[value["path"]]
    repo.commits += 1
    return 200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{repo.sha}", "commitOid": repo.sha, "success": True}, {}


NAME = r"([^/]+/[^/?]+)"
ROUTES = {
    r"GET /api/whoami-v2": _whoami,
    r"POST /api/repos/create": _create,
    r"POST /api/validate-yaml": _yaml_is_fine,
    rf"GET /api/models/{NAME}(?:/revision/main)?(?:\?.*)?": _info,
    rf"POST /api/models/{NAME}/preupload/main": _preupload,
    rf"POST /api/models/{NAME}/commit/main": _commit,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": _batch,
    r"PUT /lfs/(\w+)": _put,
}


@contextmanager
def standing() -> Iterator[StandIn]:
    """A stand-in that answers on a free port of this machine."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
