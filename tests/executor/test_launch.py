"""Command lines of the three isolations, and what is refused: no test here needs a sandbox that works."""

import dataclasses
import os
import signal
import subprocess
import sys
from typing import ClassVar

import pytest

from trl_ext.executor import EXECUTORS, Executor, Job, Limits, NoIsolation, choice, make_executor, probe, runner
from trl_ext.executor.base import Outcome
from trl_ext.executor.interpreter import Interpreter, find_interpreter
from trl_ext.executor.isolation import Bubblewrap, Container, Launch, Unshare, free_user, mount_script
from trl_ext.executor.runner import Sandboxes, rlimits, roles

PYTHON = Interpreter("/opt/py/bin/python3", ("/opt/py/bin/python3", "/usr", "/li b/x"), ("/usr/site-packages",))
LIMITS = Limits(wall_s=4, cpu_s=3, memory_mb=100, processes=2, disk_mb=7, files=900, file_mb=5, open_files=20)


def as_user(monkeypatch, number):
    monkeypatch.setattr(os, "geteuid", lambda: number)


def test_bubblewrap_for_a_user(monkeypatch):
    as_user(monkeypatch, 1000)
    launch = Bubblewrap(python=PYTHON).launch("SOURCE", LIMITS, "MARK")
    argv = list(launch.argv)
    assert launch.uid is None
    assert launch.environment == {"PATH": os.defpath}
    for flag in ("user", "ipc", "pid", "net", "uts", "cgroup-try"):
        assert f"--unshare-{flag}" in argv
    for flag in ("--die-with-parent", "--new-session", "--clearenv"):
        assert flag in argv
    assert argv[argv.index("--cap-drop") + 1] == "ALL"
    assert [argv[i + 1] for i, a in enumerate(argv) if a == "--cap-add"] == ["CAP_SYS_ADMIN"]
    assert launch.remount == "nr_inodes=900"  # what the capability is for, until the sandbox gives it up
    bound = [tuple(argv[i + 1 : i + 3]) for i, a in enumerate(argv) if a in ("--ro-bind", "--bind", "--dev-bind")]
    assert bound == [(path, path) for path in PYTHON.files] + [("/dev/null", "/dev/null")]
    assert "--proc" not in argv
    assert "--dev" not in argv
    i = argv.index("--size")
    assert argv[i : i + 4] == ["--size", str(7 * 2**20), "--tmpfs", "/tmp"]
    assert argv.index("--remount-ro", i) > i  # the root becomes read-only when all is in place
    assert argv[argv.index("--remount-ro", i) + 1] == "/"
    assert argv[argv.index("--") + 1] == PYTHON.executable
    assert argv[-3:] == ["-c", "SOURCE", "MARK"]


def test_bubblewrap_for_root_gets_a_user_of_its_own(monkeypatch):
    as_user(monkeypatch, 0)
    launches = [Bubblewrap(python=PYTHON).launch("SOURCE", LIMITS, "MARK") for _ in range(5)]
    assert len({launch.uid for launch in launches}) == 5
    assert all(launch.uid is not None and launch.uid > 1000 for launch in launches)
    argv = launches[0].argv
    assert "--unshare-user" not in argv
    assert [argv[i + 1] for i, a in enumerate(argv) if a == "--cap-add"] == [
        "CAP_SYS_ADMIN",
        "CAP_SETUID",
        "CAP_SETGID",
    ]


def test_free_user_is_within_what_is_mapped():
    assert all(40_000 < free_user("         0          0      65536\n") < 65_534 for _ in range(100))
    assert all(1_900_000_000 < free_user("0 0 4294967295") < 2_000_000_000 for _ in range(100))


def test_unshare(monkeypatch):
    as_user(monkeypatch, 1000)
    launch = Unshare(python=PYTHON).launch("SOURCE", LIMITS, "MARK")
    assert launch.argv[:4] == ("setpriv", "--pdeathsig", "KILL", "unshare")
    for flag in (
        "--mount",
        "--ipc",
        "--pid",
        "--net",
        "--uts",
        "--cgroup",
        "--user",
        "--map-root-user",
        "--kill-child",
    ):
        assert flag in launch.argv
    assert launch.old_root == "/old"
    assert set(launch.environment) == {"PATH", "HOME", "LANG", "PYTHONHASHSEED"}
    as_user(monkeypatch, 0)
    assert "--user" not in Unshare(python=PYTHON).launch("SOURCE", LIMITS, "MARK").argv


def test_the_mounts_are_quoted_and_read_only():
    script = mount_script(PYTHON, LIMITS)
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
    assert "'/li\\040b/x /mnt/li\\040b/x none bind,ro,nosuid,nodev 0 0'" in script
    assert "size=7m,nr_inodes=900,mode=1777,nosuid,nodev,noexec" in script
    assert (
        script.index("mount --all")
        < script.index("remount,bind,ro")
        < script.index("pivot_root")
        < script.index('"$@"')
    )
    assert script.endswith('\n"$@"\nexit')  # not `exec`: the shell must stay the first process of the namespace
    odd = dataclasses.replace(PYTHON, files=("/a'; touch /tmp/owned; '/x",))
    assert (
        "; touch /tmp/owned; "
        in subprocess.run(
            ["sh", "-c", f'set -- {mount_script(odd, LIMITS).splitlines()[3].removeprefix(": > ")}; printf %s "$1"'],
            capture_output=True,
            text=True,
        ).stdout
    )
    assert subprocess.run(["sh", "-n"], input=mount_script(odd, LIMITS), text=True).returncode == 0


def test_container():
    launch = Container(program="podman", image="python:3.11-slim").launch("SOURCE", LIMITS, "MARK")
    argv = list(launch.argv)
    assert argv[:2] == ["podman", "run"]
    pairs = {argv[i]: argv[i + 1] for i in range(len(argv) - 1)}
    wanted = {
        "--network": "none",
        "--cap-drop": "ALL",
        "--security-opt": "no-new-privileges",
        "--memory": "107m",
        "--memory-swap": "107m",
        "--pids-limit": "4",
        "--entrypoint": "timeout",
        "--pull": "never",
        "--name": "MARK",
        "--tmpfs": "/tmp:rw,nosuid,nodev,noexec,mode=1777,size=7m",
    }
    assert {key: pairs[key] for key in wanted} == wanted
    assert "--read-only" in argv
    assert "--rm" in argv
    assert "--volume" not in argv
    assert "--privileged" not in argv
    user, group = pairs["--user"].split(":")
    assert user == group
    assert int(user) > 40_000
    assert argv[-13:-8] == ["python:3.11-slim", "-s", "KILL", "64", "python3"]
    assert argv[-8:] == ["-s", "-S", "-B", "-X", "utf8", "-c", "SOURCE", "MARK"]
    assert launch.stop == ("podman", "rm", "--force", "MARK")
    docker = Container(program="/usr/bin/docker").launch("SOURCE", LIMITS, "MARK").argv
    assert "/tmp:rw,nosuid,nodev,noexec,mode=1777,size=7m,nr_inodes=900" in docker  # podman refuses it


def test_limits_of_the_kernel():
    assert rlimits(LIMITS) == {
        "RLIMIT_AS": 100 * 2**20,
        "RLIMIT_CPU": 3,
        "RLIMIT_FSIZE": 5 * 2**20,
        "RLIMIT_NOFILE": 20,
        "RLIMIT_NPROC": 2,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    with pytest.raises(ValueError, match="memory_mb, disk_mb"):
        Limits(memory_mb=0, disk_mb=-1)


def test_the_code_is_never_sent_the_secret_or_the_test():
    judge, code = roles(Job("CODE", "TEST", "f"), "SECRET")
    assert (judge["secret"], judge["text"]) == ("SECRET", "TEST")
    assert code == {"role": "code", "text": "CODE", "entry_point": "f"}
    with pytest.raises(ValueError, match="a test and an entry point"):
        Job("CODE", "TEST")


def test_the_interpreter_brings_its_libraries_and_no_packages():
    found = find_interpreter(sys.executable)
    assert os.path.isabs(found.executable)
    assert found.executable in found.files
    assert any("libc.so" in path for path in found.files)
    assert any(os.path.exists(f"{path}/json/__init__.py") for path in found.files)
    assert all(path.endswith(("site-packages", "dist-packages")) for path in found.hidden)
    with pytest.raises(NoIsolation, match="/nowhere/python"):
        find_interpreter("/nowhere/python")


# Refusal


@pytest.fixture
def nothing_works(monkeypatch):
    """A machine on which every program that could isolate is missing."""
    monkeypatch.setattr(choice.shutil, "which", lambda name: None)
    choice._tried.cache_clear()
    yield
    choice._tried.cache_clear()


@pytest.mark.parametrize("name", ["auto", *EXECUTORS])
def test_without_isolation_nothing_is_run(nothing_works, name):
    with pytest.raises(NoIsolation) as refusal:
        make_executor(name)
    text = str(refusal.value)
    assert text.startswith("This machine cannot run model-written code safely, so none was run.")
    for kind in EXECUTORS if name == "auto" else [name]:
        assert EXECUTORS[kind].install in text


def test_there_is_no_plain_subprocess():
    assert set(EXECUTORS) == {"bubblewrap", "unshare", "container"}
    with pytest.raises(ValueError, match="unknown executor 'subprocess'"):
        make_executor("subprocess")


def test_a_program_that_sets_up_nothing_is_refused():
    with pytest.raises(NoIsolation, match="/bin/false did not set up a sandbox"):
        Sandboxes(Bubblewrap(program="/bin/false", python=PYTHON)).run(Job("pass"))


def test_a_program_that_is_missing_or_says_nothing_is_refused(monkeypatch):
    with pytest.raises(NoIsolation, match="there is no program /nowhere/bwrap"):
        Sandboxes(Bubblewrap(program="/nowhere/bwrap", python=PYTHON)).run(Job("pass"))
    monkeypatch.setattr(runner, "SET_UP_S", 0.2)
    with pytest.raises(NoIsolation, match="plain did not set up a sandbox within"):
        Sandboxes(Plain("import time; time.sleep(60)")).run(Job("pass"))


@dataclasses.dataclass(frozen=True)
class Plain:
    """No isolation at all: a text of this file in place of a sandbox."""

    text: str
    name: ClassVar[str] = "plain"
    install: ClassVar[str] = ""
    programs: ClassVar[tuple[str, ...]] = ()
    program: str = sys.executable

    def launch(self, source, limits, mark):
        return Launch((self.program, "-c", self.text, mark), None, None)


SLOW = """
import json, sys, time
input()
time.sleep(1)
print("confined", flush=True)
job = json.loads(input())
print("v" + json.dumps({"secret": job["secret"], "reason": "passed"}), flush=True)
"""
"""Speaks as a sandbox does, and takes longer to set up than its job may take."""


def test_setting_up_is_not_of_the_time_of_the_job():
    outcome = Sandboxes(Plain(SLOW)).run(Job("pass"), Limits(wall_s=0.9))
    assert (outcome.passed, outcome.timed_out) == (True, False)


def test_a_process_that_gets_away_is_an_error_and_no_hang(monkeypatch, tmp_path):
    """A child in another session keeps the pipe: the runner says so, within its bound."""
    monkeypatch.setattr(runner, "_END_S", 0.5)
    file = tmp_path / "pid"
    child = f"import os, time; os.setsid(); open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    wait = f"import os, time\nwhile not os.path.exists({str(file)!r}): time.sleep(0.01)\n"
    with pytest.raises(NoIsolation, match="outlives it"):
        Sandboxes(Plain(start + wait + SLOW)).run(Job("pass"))
    os.kill(int(file.read_text()), signal.SIGKILL)


def test_as_many_at_once_as_this_process_has_processors(monkeypatch):
    seen = []

    async def nothing(self, jobs, limits, at_once):
        seen.append(at_once)
        return []

    monkeypatch.setattr(Sandboxes, "_run_all", nothing)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    Sandboxes(Plain("")).run_all([])
    Sandboxes(Plain("")).run_all([], at_once=2)
    assert seen == [3, 2]


def test_a_container_program_that_does_not_work_leads_to_the_next(monkeypatch):
    def refuse_docker(executor):
        if executor.isolation.program == "docker":
            raise NoIsolation("no daemon")

    monkeypatch.setattr(choice.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(choice, "probe", refuse_docker)
    choice._tried.cache_clear()
    assert make_executor("container").isolation.program == "podman"
    choice._tried.cache_clear()


@dataclasses.dataclass(frozen=True)
class Claims:
    """An executor that says what it is told."""

    reason: str
    name: str = "claims"

    def run(self, job, limits=LIMITS):
        return Outcome(self.reason == "passed", False, False, 0, "", self.reason, 0.0)

    def run_all(self, jobs, limits=LIMITS, at_once=None):
        return [self.run(job) for job in jobs]


def test_the_probe_refuses_holes(monkeypatch):
    good: Executor = Claims("passed")
    probe(good)
    with pytest.raises(NoIsolation, match="it has a network"):
        probe(Claims("AssertionError: it has a network"))
    monkeypatch.setattr(choice.platform, "machine", lambda: "riscv64")
    with pytest.raises(NoIsolation, match="x86_64 and aarch64"):
        probe(good)


def test_the_probe_finds_each_hole_of_a_plain_process(tmp_path):
    """The probe's own text, run here without any isolation, names what a sandbox must not allow."""
    (tmp_path / "of_the_host").write_text("secret")
    text = choice._PROBE.format(file=str(tmp_path / "of_the_host"), folder=str(tmp_path), port=1)
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stderr
    for hole in ("reads a file of the host", "writes outside its folder", "makes processes", "environment"):
        assert hole in said
