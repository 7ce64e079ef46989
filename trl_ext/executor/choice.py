"""Which executor works here: each is tried out on a text that looks for holes before it is used for anything else."""

from __future__ import annotations

import functools
import platform
import shutil
import socket
import tempfile
from pathlib import Path

from trl_ext.executor.base import Executor, Job, Limits, NoIsolation
from trl_ext.executor.inside import MACHINES
from trl_ext.executor.isolation import Bubblewrap, Container, Unshare
from trl_ext.executor.runner import Sandboxes
from trl_ext.plan import did_you_mean

AUTO = "auto"
EXECUTORS: dict[str, type[Bubblewrap] | type[Unshare] | type[Container]] = {
    Bubblewrap.name: Bubblewrap,
    Unshare.name: Unshare,
    Container.name: Container,
}
"""In the order in which `auto` tries them."""

_PROBE = """
import os, socket
holes = []

def hole(name, act):
    try:
        act()
        holes.append(name)
    except OSError:
        pass

def fork():
    if os.fork() == 0:
        os._exit(0)

hole("it reads a file of the host", lambda: open({file!r}).read())
hole("it writes outside its folder", lambda: open({folder!r} + "/new", "w"))
hole("it writes to its root", lambda: open("/new", "w"))
hole("it reaches a port of the host", lambda: socket.create_connection(("127.0.0.1", {port}), 1).close())
hole("it makes processes", fork)
hole("it changes its user", lambda: os.setuid(0) if os.getuid() else os.setgid(12345))
if len(os.environ) > 10:
    holes.append("it sees the host's environment")
for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
    hole("it has a way into a network", lambda: socket.socket(family, socket.SOCK_DGRAM).connect((address, 9)))
for index in range(2, 1000):  # 1 is the loopback
    hole(f"it has the network interface {{index}}", lambda: socket.if_indextoname(index))
for family, kind in ((socket.AF_VSOCK, 1), (socket.AF_NETLINK, 3), (socket.AF_ALG, 5)):
    hole(f"it opens a socket of {{family.name}}", lambda: socket.socket(family, kind).close())
assert not holes, "; ".join(holes)
"""


def make_executor(name: str) -> Executor:
    """The executor of that name, tried out; `auto`: the first that works. NoIsolation says why none does.

    ValueError for an unknown name.
    """
    if name != AUTO and name not in EXECUTORS:
        known = (AUTO, *EXECUTORS)
        raise ValueError(f"unknown executor '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    refused = []
    for kind in EXECUTORS if name == AUTO else (name,):
        try:
            return _tried(kind)
        except NoIsolation as error:
            refused.append(f"  - {kind}: {error}. It takes: {EXECUTORS[kind].install}")
    raise NoIsolation(
        "This machine cannot run model-written code safely, so none was run. What was tried:\n" + "\n".join(refused)
    )


@functools.cache
def _tried(kind: str) -> Executor:
    refused = []
    for program in EXECUTORS[kind].programs:
        if not shutil.which(program):
            refused.append(f"there is no program {program}")
            continue
        executor = Sandboxes(EXECUTORS[kind](program=program))
        try:
            probe(executor)
        except NoIsolation as error:
            refused.append(str(error))
        else:
            return executor
    raise NoIsolation("; ".join(refused))


def probe(executor: Executor) -> None:
    """Runs a harmless job that looks for holes. NoIsolation names those that it finds, or why it did not run."""
    if platform.machine() not in MACHINES:
        raise NoIsolation(f"the filter of system calls is written for {' and '.join(MACHINES)}")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        file = Path(folder) / "of_the_host"
        file.write_text("secret")
        Path(folder).chmod(0o777)
        text = _PROBE.format(file=str(file), folder=folder, port=server.getsockname()[1])
        found = executor.run(Job(text), Limits(wall_s=30.0))
    if not found.passed:
        raise NoIsolation(found.reason + (f" ({found.output.strip()[:200]})" if found.output.strip() else ""))
