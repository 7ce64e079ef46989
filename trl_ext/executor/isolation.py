"""Three ways to set up a sandbox, each as a command line. What runs in it gives up the rest by itself (`inside.py`).

All three leave no network, no processes of others, an own host name and shared memory, a read-only root that holds the
interpreter alone, one small folder in memory that can be written (in a container also 64 kB of /dev/shm), and an empty
environment.
"""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from trl_ext.executor.base import Limits
from trl_ext.executor.interpreter import Interpreter, find_interpreter

FOLDER = "/tmp"
"""Where the untrusted text may write."""
ENVIRONMENT = {"HOME": FOLDER, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
"""All that the untrusted text finds in its environment; with the hash seed the order of a set is the same each time."""
SET_UP_S = 60.0
"""Bound of setting up the sandboxes of a job, which is not part of the job's own time."""
_PYTHON = ("-s", "-S", "-B", "-X", "utf8", "-c")
_HIGHEST_USER = 2_000_000_000


@dataclass(frozen=True)
class Launch:
    """How to start a sandbox: `argv`, its environment (None: ours), the user to become, and how to `stop` it if a kill
    of the started process does not do it. `old_root`: a mount that the sandbox must let go of. `remount`: options that it
    must give its folder in memory, before it gives up its privileges."""

    argv: tuple[str, ...]
    environment: dict[str, str] | None
    uid: int | None
    stop: tuple[str, ...] = ()
    old_root: str | None = None
    remount: str | None = None


class Isolation(Protocol):
    """One way to set up a sandbox."""

    name: ClassVar[str]
    install: ClassVar[str]
    programs: ClassVar[tuple[str, ...]]

    @property
    def program(self) -> str:
        """What must be on the path."""

    def launch(self, source: str, limits: Limits, mark: str) -> Launch:
        """For Python text `source`; `mark` tells this sandbox from others in a list of processes."""


def own_user() -> int | None:
    """A user of its own for a sandbox that root starts; None if we are not root and stay who we are."""
    return free_user(Path("/proc/self/uid_map").read_text()) if os.geteuid() == 0 else None


def free_user(uid_map: str) -> int:
    """A random number near the top of what `uid_map` (/proc/self/uid_map) allows: nobody's, and no other sandbox's.

    The kernel counts processes by user, so a shared one would share its bound.
    """
    first, _, count = map(int, uid_map.splitlines()[-1].split())
    top = min(first + count, _HIGHEST_USER)
    return top - 2 - secrets.randbelow(max(1, min(count // 3, 90_000_000)))


@dataclass(frozen=True)
class Bubblewrap:
    """`bwrap`: as root with real users, else in a user namespace."""

    name: ClassVar[str] = "bubblewrap"
    install: ClassVar[str] = "apt-get install bubblewrap (or dnf, pacman), on a kernel that lets users make namespaces"
    programs: ClassVar[tuple[str, ...]] = ("bwrap",)
    program: str = "bwrap"
    python: Interpreter | None = None

    def launch(self, source: str, limits: Limits, mark: str) -> Launch:
        """The command line, in the order in which bwrap carries it out.

        bwrap's --size bounds what files hold, not how many there are: the sandbox adds that bound itself, for which it
        has CAP_SYS_ADMIN, over its own namespaces alone, until it gives up its privileges.
        """
        python, uid = self.python or find_interpreter(), own_user()
        argv = [self.program, "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"]
        argv += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
        argv += ["--unshare-user", "--uid", "65534", "--gid", "65534"] if uid is None else []
        argv += ["--cap-drop", "ALL"]
        for name in ("CAP_SYS_ADMIN", *(() if uid is None else ("CAP_SETUID", "CAP_SETGID"))):
            argv += ["--cap-add", name]
        for name, value in ENVIRONMENT.items():
            argv += ["--setenv", name, value]
        for folder in _above([*python.files, "/dev/null"]):
            argv += ["--perms", "0755", "--dir", folder]  # those that bwrap makes by itself are for its own user alone
        for path in python.files:
            argv += ["--ro-bind", path, path]
        for path in python.hidden:
            argv += ["--tmpfs", path, "--remount-ro", path]
        argv += ["--dev-bind", "/dev/null", "/dev/null"]
        argv += ["--perms", "0777", "--size", str(limits.disk_mb * 2**20), "--tmpfs", FOLDER]
        argv += ["--remount-ro", "/", "--chdir", FOLDER, "--", python.executable, *_PYTHON, source, mark]
        return Launch(tuple(argv), {"PATH": os.defpath}, uid, remount=f"nr_inodes={limits.files}")


def _above(paths: Sequence[str]) -> list[str]:
    """The folders that hold these, from the root on, without the root."""
    return sorted({str(folder) for path in paths for folder in Path(path).parents} - {"/"})


_ROOT = "/mnt"
"""A place to mount on, in a mount namespace of its own: nothing is seen of it outside."""


def mount_script(python: Interpreter, limits: Limits) -> str:
    """Shell text that makes a root of `python`'s files alone the root directory, then runs its arguments.

    One table for one call of `mount`: forty calls take a second.
    """
    kept = [*python.files, "/dev/null"]
    folders = {str(Path(path) if Path(path).is_dir() else Path(path).parent) for path in kept} | {"/tmp", "/old"}
    table = [f"{_escaped(path)} {_ROOT}{_escaped(path)} none bind,ro,nosuid,nodev 0 0" for path in python.files]
    table += [f"tmpfs {_ROOT}{_escaped(path)} tmpfs ro,size=4k,nosuid,nodev,noexec 0 0" for path in python.hidden]
    table += [f"/dev/null {_ROOT}/dev/null none bind,nosuid,noexec 0 0"]
    table += [
        f"tmpfs {_ROOT}{FOLDER} tmpfs size={limits.disk_mb}m,nr_inodes={limits.files},mode=1777,nosuid,nodev,noexec 0 0",
    ]
    lines = [f"mount -t tmpfs -o size=1m,mode=755,nosuid,nodev tmpfs {_ROOT}", f"cd {_ROOT}"]
    lines += ["mkdir -p " + " ".join(shlex.quote(f".{folder}") for folder in sorted(folders))]
    lines += [f": > {shlex.quote('.' + path)}" for path in kept if not Path(path).is_dir()]
    lines += ["printf '%s\\n' " + " ".join(map(shlex.quote, table)) + " > table", "mount --all --fstab table"]
    lines += [f"mount -o remount,bind,ro,nosuid,nodev {_ROOT}", "pivot_root . old", "cd /", '"$@"', "exit"]
    return "\n".join(lines)


def _escaped(path: str) -> str:
    """As fstab(5) wants it."""
    return path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")


@dataclass(frozen=True)
class Unshare:
    """`unshare`, `setpriv`, `mount`, `pivot_root` of util-linux: as root with real users, else in a user namespace."""

    name: ClassVar[str] = "unshare"
    install: ClassVar[str] = "apt-get install util-linux mount, and root or a kernel that lets users make namespaces"
    programs: ClassVar[tuple[str, ...]] = ("unshare",)
    program: str = "unshare"
    python: Interpreter | None = None

    def launch(self, source: str, limits: Limits, mark: str) -> Launch:
        """Ends with this process: the kernel kills `unshare` with it, and the shell, first in its namespace, with that.

        So the shell stays: the untrusted text, in its place, could clear that signal. The sandbox lets go of the old
        root by itself.
        """
        python, uid = self.python or find_interpreter(), own_user()
        namespaces = ["--mount", "--ipc", "--pid", "--net", "--uts", "--cgroup", "--propagation", "private"]
        argv = ["setpriv", "--pdeathsig", "KILL", self.program, *namespaces, "--fork", "--kill-child"]
        argv += ["--user", "--map-root-user"] if uid is None else []
        argv += ["sh", "-euc", mount_script(python, limits), "sh"]
        argv += [python.executable, *_PYTHON, source, mark]
        return Launch(tuple(argv), {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **ENVIRONMENT}, uid, old_root="/old")


@dataclass(frozen=True)
class Container:
    """A fresh container for each job, with an image that is already on this machine."""

    name: ClassVar[str] = "container"
    install: ClassVar[str] = "docker or podman, running, and its image: docker pull python:3.12-slim"
    programs: ClassVar[tuple[str, ...]] = ("docker", "podman")
    program: str = "docker"
    image: str = "python:3.12-slim"

    def launch(self, source: str, limits: Limits, mark: str) -> Launch:
        """The user is the container's, not this process's to give; a kill of the client would leave the container.

        `timeout`, first in the container, ends it if this process was killed.

        docker's daemon passes nr_inodes on to the kernel; podman knows no such option and refuses it. There the number
        of files is bounded by the container's memory, which counts the kernel's part too. Both untested by us.
        """
        user, memory = free_user("0 0 65536"), f"{limits.memory_mb + limits.disk_mb}m"
        argv = [
            self.program,
            "run",
            "--rm",
            "--interactive",
            "--pull",
            "never",
            "--name",
            mark,
            "--hostname",
            "sandbox",
        ]
        argv += ["--network", "none", "--ipc", "private", "--read-only", "--user", f"{user}:{user}"]
        argv += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        argv += ["--memory", memory, "--memory-swap", memory, "--pids-limit", str(limits.processes + 2), "--cpus", "1"]
        folder = f"{FOLDER}:rw,nosuid,nodev,noexec,mode=1777,size={limits.disk_mb}m"
        folder += "" if Path(self.program).name == "podman" else f",nr_inodes={limits.files}"
        argv += ["--tmpfs", folder, "--workdir", FOLDER]
        argv += ["--shm-size", "64k", "--log-driver", "none"]
        for name, value in ENVIRONMENT.items():
            argv += ["--env", f"{name}={value}"]
        argv += ["--entrypoint", "timeout", self.image, "-s", "KILL", f"{SET_UP_S + limits.wall_s:g}"]
        argv += ["python3", *_PYTHON, source, mark]
        return Launch(tuple(argv), None, None, stop=(self.program, "rm", "--force", mark))
