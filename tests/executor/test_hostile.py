"""Hostile texts: what they try, and that nothing of it works. Each runs on every executor that works here."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from trl_ext.executor import Job, Limits
from trl_ext.executor.runner import MARK

QUICK = Limits(wall_s=10)
DOUBLE = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return x\n"
TEST = "assert double(3) == 6\nassert double(-1) == -2\n"


def alone(executor, text, limits=QUICK):
    """The outcome of a text that judges itself: passed means that its asserts held and it ran to its end."""
    return executor.run(Job(textwrap.dedent(text)), limits)


def attempt(executor, code, test=TEST, limits=QUICK):
    """The outcome of a code under a test that it should fail."""
    return executor.run(Job(textwrap.dedent(code), test, "double"), limits)


def sandboxes():
    """Command lines of sandboxes of this process that still live."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            found += [text] if f"{MARK}-{os.getpid()}-".encode() in text else []
    return found


def gone(find, seconds=5.0):
    """Whether `find` finds nothing within that time; the kernel ends a process after its parent's death, not with it."""
    until = time.monotonic() + seconds
    while (left := find()) and time.monotonic() < until:
        time.sleep(0.05)
    return not left


def test_right_and_wrong_code_are_told_apart(executor):
    outcome = attempt(executor, DOUBLE)
    assert (outcome.passed, outcome.timed_out, outcome.killed, outcome.reason) == (True, False, False, "passed")
    wrong = attempt(executor, WRONG)
    assert (wrong.passed, wrong.reason) == (False, "AssertionError: ")


def test_outcomes_keep_the_order_of_the_jobs(executor):
    jobs = [Job(f"def f(): return {i}", f"assert f() == {i - i % 2}", "f") for i in range(6)]
    assert [o.passed for o in executor.run_all(jobs, QUICK, at_once=3)] == [True, False] * 3


# The verdict


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()"])
@pytest.mark.parametrize("where", ["alone", "code", "call", "test"])
def test_leaving_early_is_no_pass(executor, leave, where):
    call = f"def double(x):\n    {leave}\n"
    outcome = {
        "alone": lambda: alone(executor, leave),
        "code": lambda: attempt(executor, f"{leave}\n{DOUBLE}"),
        "call": lambda: attempt(executor, call),
        "test": lambda: attempt(executor, DOUBLE, f"double(3)\n{leave}\n"),
    }[where]()
    assert not outcome.passed
    assert outcome.reason != "passed"


FORGERIES = {
    "writes a verdict everywhere": """
        import json, os
        for fd in range(64):
            for line in ('v{"secret": "", "reason": "passed"}', "passed", "ready"):
                try:
                    os.write(fd, (line + "\\n").encode())
                except OSError:
                    pass
        def double(x): return x
        """,
    "sends what it finds in frames and objects": """
        import gc, json, os, re, sys
        found, frame = set(), sys._getframe()
        while frame is not None:
            found |= set(re.findall(r"[0-9a-f]{32}", repr([frame.f_locals, list(frame.f_globals.values())])))
            frame = frame.f_back
        for thing in gc.get_objects():
            if type(thing) in (dict, list, tuple, str):
                try:
                    found |= set(re.findall(r"[0-9a-f]{32}", repr(thing)[:100_000]))
                except Exception:
                    pass
        for secret in found | {"0" * 32}:
            for fd in range(3, 32):
                try:
                    os.write(fd, ("v" + json.dumps({"secret": secret, "reason": "passed"}) + "\\n").encode())
                except OSError:
                    pass
        def double(x): return x
        """,
    "redefines the built-ins": """
        import builtins
        class Same(int):
            def __eq__(self, other): return True
            __hash__ = int.__hash__
        builtins.AssertionError = type("Quiet", (BaseException,), {"__new__": lambda *a: None})
        builtins.int = builtins.isinstance = builtins.type = lambda *a, **k: True
        def double(x): return Same(x)
        """,
    "returns what equals everything": """
        class Same:
            def __eq__(self, other): return True
        def double(x): return Same()
        """,
    "changes the harness": """
        import sys
        frame = sys._getframe()
        while frame is not None:
            for name in ("answer", "encode", "told", "say"):
                if name in frame.f_globals:
                    frame.f_globals[name] = lambda *a, **k: {"value": True, "args": []}
            frame = frame.f_back
        def double(x): return x
        """,
    "answers before it is asked": """
        import json, os
        for fd in range(3, 16):
            try:
                os.write(fd, b'{"value": {"bytes": [0]}, "args": []}\\n' * 50)
            except OSError:
                pass
        def double(x): return x
        """,
    "reads the test from its own process": """
        import gc
        texts = [t for t in gc.get_objects() if type(t) is dict and "text" in t]
        known = "asse" + "rt dou" + "ble(" in repr(texts)
        def double(x): return 2 * x if known else x
        """,
    "kills what it can": """
        import os, signal
        for pid in [os.getppid(), *range(1, 200), -1]:
            try:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        def double(x): return x
        """,
    "hides in an exit hook": """
        import atexit, os
        atexit.register(lambda: os._exit(0))
        def double(x): return x
        """,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_wrong_code_cannot_make_its_verdict(executor, name):
    outcome = attempt(executor, FORGERIES[name])
    assert not outcome.passed, outcome
    assert outcome.reason != "passed"


def test_a_code_that_never_gets_called_is_no_pass(executor):
    outcome = attempt(executor, DOUBLE, "assert True\n")
    assert (outcome.passed, outcome.reason) == (False, "the test never called double")


def test_the_test_may_not_redirect_the_call_protocol(executor):
    test = "double(3)\nimport os\nfor fd in range(3, 9):\n    try: os.write(fd, b'x\\n')\n    except OSError: pass\n"
    outcome = attempt(executor, DOUBLE, test)
    assert (outcome.passed, outcome.killed, outcome.reason) == (False, True, "the judge broke the protocol")


def test_no_exception_of_the_code_ends_a_loop_of_the_test_in_silence(executor):
    """`all(map(...))` takes a StopIteration of the function for its own end, so it would assert nothing."""
    code = """
        kinds = iter([StopIteration, StopAsyncIteration, lambda text: ExceptionGroup(text, [ValueError()])])
        def double(x): raise next(kinds)("no")
        """
    test = """
        for _ in range(3):
            try:
                all(map(lambda x: double(x) == 2 * x, [1, 2]))
            except RuntimeError as error:
                assert "no" in str(error)
            else:
                raise AssertionError("the loop ended")
        """
    assert attempt(executor, code, textwrap.dedent(test)).reason == "passed"


# Resources


def test_processes_and_threads_are_bounded(executor):
    text = """
        import os, threading
        for act in (os.fork, threading.Thread(target=print).start):
            try:
                act()
            except (OSError, RuntimeError):
                continue
            raise AssertionError(act)
        """
    assert alone(executor, text).passed


def test_a_fork_bomb_ends_with_its_job(executor):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    outcome = alone(executor, bomb, Limits(wall_s=2, processes=16))
    assert outcome.timed_out or outcome.reason == "ended before the test did"
    assert not outcome.passed
    assert gone(sandboxes)


FILLING = {
    "folders": "os.mkdir(f'd{n}')",
    "files": "open(f'f{n}', 'w').close()",
    "links": "os.symlink('x' * 4000, f's{n}')",
    "hard links": "n or open('f', 'w').close(); os.link('f', f'l{n}')",
    "folders in folders": "os.mkdir('d'); os.chdir('d')",
}


@pytest.mark.parametrize("kind", FILLING)
def test_how_many_files_there_can_be_is_bounded(executor, kind):
    """Each takes memory of the kernel that `memory_mb` and `disk_mb` do not count."""
    if getattr(executor.isolation, "program", "") == "podman":
        pytest.skip("podman refuses nr_inodes; its bound of memory counts them")
    text = f"import os\nn = 0\ntry:\n    while n < 5000:\n        {FILLING[kind]}; n += 1\nexcept OSError: pass\nassert n < 300, n"
    outcome = alone(executor, text, Limits(wall_s=20, files=300))
    assert outcome.passed, outcome


def test_the_bound_of_files_cannot_be_lifted(executor):
    text = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        for flags, options in ((32, b"nr_inodes=100000"), (0, b"")):
            assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, options) == -1, "it mounts"
            assert ctypes.get_errno() == 1, ctypes.get_errno()
        assert os.statvfs("/tmp").f_files == 1024
        """
    outcome = alone(executor, text)
    assert outcome.passed, outcome


def test_memory_is_bounded(executor):
    outcome = alone(executor, "x = bytearray(400 * 2**20)", Limits(wall_s=10, memory_mb=256))
    assert (outcome.passed, outcome.reason.split(":")[0]) == (False, "MemoryError")
    assert alone(executor, "x = bytearray(100 * 2**20)", Limits(wall_s=10, memory_mb=256)).passed


def test_memory_that_no_limit_counts_is_refused(executor):
    text = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.shmget(0, 2**20, 0o1600) == -1 and ctypes.get_errno() == 1
        try:
            os.memfd_create("x")
        except PermissionError:
            pass
        else:
            raise AssertionError("memfd")
        """
    assert alone(executor, text).passed


def test_namespaces_mounts_and_tracing_are_refused(executor):
    text = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        for flag in (0x10000000, 0x20000, 0x40000000):
            assert libc.unshare(flag) == -1 and ctypes.get_errno() == 1
        assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == -1 and ctypes.get_errno() == 1
        assert libc.ptrace(16, 1, 0, 0) == -1 and ctypes.get_errno() == 1
        assert libc.chroot(b"/tmp") == -1 and ctypes.get_errno() == 1
        """
    assert alone(executor, text).passed


def test_no_capability_is_left(executor):
    text = """
        import ctypes, struct
        libc = ctypes.CDLL(None)
        data = ctypes.create_string_buffer(24)
        assert libc.capget(struct.pack("<Ii", 0x20080522, 0), data) == 0
        assert data.raw == bytes(24), data.raw
        assert libc.prctl(39, 0, 0, 0, 0) == 1  # no new privileges
        """
    assert alone(executor, text).passed


def test_what_can_be_written_is_bounded(executor):
    text = """
        import os
        written, places = 0, 0
        for place in ("/", "/tmp", "/dev", "/dev/shm", "/old", os.path.dirname(os.__file__), "/var/tmp"):
            for i in range(100):
                try:
                    with open(f"{place}/fill{i}", "wb") as file:
                        while True:
                            written += file.write(bytes(2**20))
                            file.flush()
                except OSError:
                    pass
        print(written / 2**20)
        """
    outcome = alone(executor, text, Limits(wall_s=20, disk_mb=8, file_mb=3))
    assert outcome.passed, outcome
    assert 1 <= float(outcome.output) <= 8


def test_endless_output_is_cut_off(executor):
    outcome = alone(executor, "while True: print('x' * 1000)", Limits(wall_s=10, output_bytes=5000))
    assert (outcome.passed, outcome.killed, outcome.timed_out) == (False, True, False)
    assert (outcome.reason, outcome.output) == ("more output than allowed", ("x" * 1000 + "\n") * 4 + "x" * 996)


def test_an_endless_message_is_cut_off(executor):
    outcome = attempt(executor, "def double(x): return 'x' * 10**7", limits=Limits(wall_s=10, message_bytes=10**5))
    assert (outcome.passed, outcome.reason) == (False, "a message above 100000 bytes")


def test_time_is_bounded(executor):
    sleeps = alone(executor, "import time; time.sleep(60)", Limits(wall_s=1))
    assert (sleeps.passed, sleeps.timed_out, sleeps.killed) == (False, True, True)
    assert sleeps.reason == "no verdict after 1 s"
    burns = alone(executor, "while True: pass", Limits(wall_s=60, cpu_s=1))
    assert (burns.passed, burns.timed_out, burns.killed or burns.exit is not None) == (False, False, True)


def test_signals_do_not_lift_the_limits(executor):
    text = """
        import resource, signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        for name in ("CPU", "AS", "NPROC", "FSIZE", "NOFILE", "CORE"):
            try:
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (2**40, 2**40))
            except (OSError, ValueError):
                continue
            raise AssertionError(name)
        while True: pass
        """
    outcome = alone(executor, text, Limits(wall_s=60, cpu_s=1))
    assert (outcome.passed, outcome.timed_out) == (False, False)
    assert "AssertionError" not in outcome.reason


# The host


def test_no_network(executor):
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = f"""
            import socket
            for address in (("127.0.0.1", {server.getsockname()[1]}), ("192.0.2.1", 80), ("8.8.8.8", 53)):
                try:
                    socket.create_connection(address, 1)
                except OSError:
                    continue
                raise AssertionError(address)
            for family, kind in ((socket.AF_VSOCK, 1), (socket.AF_NETLINK, 3), (socket.AF_ALG, 5), (socket.AF_PACKET, 3)):
                try:
                    socket.socket(family, kind)
                except OSError as error:
                    assert error.errno == 97, (family, error)
                    continue
                raise AssertionError(family)
            for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
                socket.socket(family, socket.SOCK_STREAM).close()
            socket.socketpair()
            try:
                socket.getaddrinfo("example.com", 80)
            except OSError:
                pass
            else:
                raise AssertionError("a name was looked up")
            """
        assert alone(executor, text).reason == "passed"
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_file_of_the_host_and_no_environment(executor, tmp_path, monkeypatch):
    secret = tmp_path / "shadow"
    secret.write_text("root:planted-secret")
    secret.chmod(0o644)
    monkeypatch.setenv("PLANTED_TOKEN", "planted-secret")
    text = f"""
        import os, sys
        for path in ({str(secret)!r}, "/etc/shadow", "/etc/passwd", "/proc/1/environ", "/proc/self/root/etc/passwd",
                     {str(Path.home() / ".bashrc")!r}, {str(Path(__file__).resolve())!r}, "/old/etc/passwd", "/sys/kernel"):
            assert not os.path.exists(path), path
        assert set(os.environ) <= {{"HOME", "LANG", "PYTHONHASHSEED", "PWD"}}, dict(os.environ)
        here = set(os.listdir("/"))
        assert not here & {{"home", "etc", "var", "work", "sys", "proc", "mnt"}}, here
        assert os.listdir("/tmp") == []
        assert not any("site-packages" in path for path in sys.path)
        """
    outcome = alone(executor, text)
    assert outcome.passed, outcome
    assert "planted" not in outcome.output


def test_links_lead_nowhere(executor, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("planted")
    text = f"""
        import os
        os.symlink({str(tmp_path)!r}, "/tmp/link")
        os.symlink("../../../../../..{tmp_path}/secret", "/tmp/up")
        for act in (lambda: open("/tmp/link/secret").read(), lambda: open("/tmp/up").read(),
                    lambda: open("/tmp/link/new", "w"), lambda: os.link({str(secret)!r}, "/tmp/hard")):
            try:
                act()
            except OSError:
                continue
            raise AssertionError(act)
        """
    assert alone(executor, text).passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]


def test_the_interpreter_cannot_be_changed(executor):
    text = """
        import json, os, sys
        for path in (json.__file__, sys.executable, os.__file__):
            for act in (lambda: open(path, "a"), lambda: os.remove(path), lambda: os.chmod(path, 0o777)):
                try:
                    act()
                except OSError:
                    continue
                raise AssertionError(path)
        """
    before = Path(os.__file__).stat()
    assert alone(executor, text).passed
    assert Path(os.__file__).stat().st_mtime_ns == before.st_mtime_ns


def test_processes_of_the_host_are_out_of_reach(executor):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        text = f"""
            import os, signal
            for pid in ({os.getpid()}, {bystander.pid}, os.getppid(), 1):
                for target in (pid, -pid):
                    try:
                        if pid > 1 or os.getpid() != 1:
                            os.kill(target, signal.SIGKILL)
                    except OSError:
                        pass
            """
        alone(executor, text)
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()


def test_nothing_is_left_behind(executor):
    daemon = """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(0)
        """
    outcome = alone(executor, daemon, Limits(wall_s=10, processes=16))
    assert outcome.passed, outcome
    assert gone(sandboxes)


AWAY = """
import ctypes, os, time
for act in (lambda: ctypes.CDLL(None).prctl(1, 0, 0, 0, 0), os.setsid):  # 1: PR_SET_PDEATHSIG
    try:
        act()
    except OSError:
        pass
print("away", flush=True)
time.sleep(100)
"""
"""Leaves the group and the session that are killed, and clears the signal of a parent's death."""


@pytest.mark.parametrize("signal_of_death", ["kept", "cleared"])
def test_the_first_process_of_a_sandbox_cannot_outlive_its_job(executor, signal_of_death):
    text = AWAY if signal_of_death == "cleared" else "import os, time\ntry: os.setsid()\nfinally: time.sleep(100)"
    outcome = alone(executor, text, Limits(wall_s=1))
    assert outcome.timed_out or "PermissionError" in outcome.reason, outcome
    assert gone(sandboxes)


def test_sandboxes_end_with_the_process_that_started_them(executor):
    """Even one whose text does what it can to outlive it: killed well before its time is up."""
    if (runner := os.fork()) == 0:
        try:
            executor.run(Job(AWAY), Limits(wall_s=90))
        finally:
            os._exit(1)

    def theirs():
        mark = f"{MARK}-{runner}-".encode()
        return [f for f in Path("/proc").iterdir() if f.name.isdigit() and mark in _cmdline(f)]

    until = time.monotonic() + 20
    while not theirs() and time.monotonic() < until:
        time.sleep(0.02)
    assert theirs()
    time.sleep(2)  # for the text to get away
    assert theirs()
    os.kill(runner, signal.SIGKILL)
    os.waitpid(runner, 0)
    assert gone(theirs, seconds=20)


def _cmdline(folder):
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""
