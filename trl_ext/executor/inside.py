"""Runs inside a sandbox, as `python -c` of this text: gives up every privilege, then runs the untrusted text.

Standard library only (Python 3.11 or newer), and nothing of this project: the file's text is all that a sandbox gets.
It speaks one line of JSON at a time over what were its standard input and output; what the untrusted text prints goes
to standard error.
"""

import builtins
import collections
import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types

_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6; a vsock would reach the hypervisor past the network namespace
_BOTH = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
# By machine: architecture number, clone, socket and socketpair, and calls that are refused. They make memory that no limit counts (shared
# memory, memfd, keys), namespaces and mounts, look into other processes, or are a kernel's less tested doors.
_CALLS = {
    "x86_64": (
        *(0xC000003E, 56, (41, 53)),
        (29, 30, 64, 68, 101, 155, 161, 165, 166, 175, 246, 248, 249, 250, 272, 298, 304, 308, 310, 311, 313, 319)
        + (321, 323, *_BOTH),
    ),
    "aarch64": (
        *(0xC00000B7, 220, (198, 199)),
        (194, 196, 190, 186, 117, 41, 51, 40, 39, 105, 104, 217, 218, 219, 97, 241, 265, 268, 270, 271, 273, 279)
        + (280, 282, *_BOTH),
    ),
}


MACHINES = tuple(_CALLS)


def _filter(machine):
    """A BPF program over seccomp's data (number at 0, architecture at 4, first argument at 16), 8 bytes a step."""
    arch, clone, sockets, refused = _CALLS[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    error, allow, kill = 0x00050000, 0x7FFF0000, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 way round the numbers below
    steps += [(equal, 0, 1, 435), (give, 0, 0, error | _ENOSYS)]  # clone3 hides its flags; libc then takes clone
    for number in refused:
        steps += [(equal, 0, 1, number), (give, 0, 0, error | _EPERM)]
    one, two, three = _FAMILIES
    for number in sockets:
        steps += [
            (equal, 0, 6, number),
            (load, 0, 0, 16),
            (equal, 3, 0, one),
            (equal, 2, 0, two),
            (equal, 1, 0, three),
        ]
        steps += [(give, 0, 0, error | _EAFNOSUPPORT), (give, 0, 0, allow)]
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, _NAMESPACES), (give, 0, 0, error | _EPERM)]
    steps += [(give, 0, 0, allow)]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def confine(config):
    """Limits, another user, no capabilities, no new ones, fewer system calls. Raises OSError if any of it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if config["old_root"] is not None:
        _checked(libc.umount2(config["old_root"].encode(), 2))  # MNT_DETACH
    if config["remount"] is not None:  # MS_REMOUNT, NOSUID, NODEV, NOEXEC
        _checked(libc.mount(None, config["folder"].encode(), None, 32 | 2 | 4 | 8, config["remount"].encode()))
    for name, value in config["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[config["uid"]] * 3)
        os.setresuid(*[config["uid"]] * 3)
    _checked(libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)))
    _checked(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    program = _filter(platform.machine())
    text = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(text))
    _checked(libc.prctl(22, 2, header, 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    os.environ.clear()
    os.environ.update(config["environment"])
    os.chdir(config["folder"])


def _checked(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def encode(value):
    """A plain value as JSON can hold it. TypeError for any other.

    A named tuple goes as a tuple and a defaultdict as a dictionary: the other side has not their class, their function.
    A long whole number goes in base 16, for Python refuses to write or read more than 4300 decimal digits.
    """
    kind = type(value)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        kind = tuple
    if kind is int and value.bit_length() > 64:
        return {"int": hex(value)}
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple, set, frozenset, collections.deque):
        return {kind.__name__: [encode(item) for item in value]}
    if kind in _DICTIONARIES:
        return {_DICTIONARIES[kind]: [[encode(key), encode(item)] for key, item in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: list(value)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [encode(bound) for bound in (value.start, value.stop, value.step)]}
    if hasattr(kind, "__next__"):
        return {"iter": [encode(item) for item in value]}
    raise TypeError(f"{kind.__name__} is no plain value")


_MAKERS: dict = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iter": iter, "bytes": bytes}
_MAKERS.update({"dict": dict, "bytearray": bytearray, "deque": collections.deque})
_MAKERS.update({"Counter": lambda pairs: collections.Counter(dict(pairs)), "OrderedDict": collections.OrderedDict})
_DICTIONARIES: dict = {dict: "dict", collections.defaultdict: "dict"}
_DICTIONARIES.update({collections.Counter: "Counter", collections.OrderedDict: "OrderedDict"})
_CHANGEABLE = (list, set, bytearray, collections.deque, *_DICTIONARIES)


def decode(data):
    """What `encode` was given."""
    if not isinstance(data, dict):
        return data
    ((kind, items),) = data.items()
    if kind in ("int", "complex"):
        return int(items, 16) if kind == "int" else complex(*items)
    if kind in _DICTIONARIES.values():
        items = [[decode(key), decode(item)] for key, item in items]
    elif kind not in ("bytes", "bytearray"):
        items = [decode(item) for item in items]
    return range(*items) if kind == "range" else _MAKERS[kind](items)


def told(error):
    """An exception in one line."""
    try:
        text = str(error)
    except BaseException:
        text = "an exception without a text"
    return " ".join(f"{type(error).__name__}: {text}"[:300].splitlines())


def flush():
    """What was printed leaves this process, which is killed once its verdict is known."""
    with contextlib.suppress(BaseException):  # the text may have closed or broken it; that is its own loss
        sys.stdout.flush()


def module(names):
    """A fresh `__main__` with these names."""
    fresh = types.ModuleType("__main__")
    fresh.__dict__.update(names)
    sys.modules["__main__"] = fresh
    return fresh.__dict__


def serve(job, source, say):
    """Loads the code, then answers calls of its entry point until nobody asks."""
    names = module({})
    try:
        exec(compile(job["text"], "<code>", "exec"), names)
        function = names[job["entry_point"]]
    except BaseException as error:
        return say("broken " + told(error))
    say("ready")
    for line in source:
        reply = answered(function, line)
        flush()
        say(reply)
    return None


def answered(function, line):
    """The line that answers a call."""
    try:
        return json.dumps(answer(function, decode(json.loads(line))))
    except Exception as error:  # a value that JSON cannot hold, as one that is nested too deeply
        return json.dumps(raised(error) | {"args": []})


def answer(function, request):
    """The function's value and its arguments afterwards (those by keyword last), or what it raised."""
    args, kwargs = request
    try:
        reply = {"value": encode(function(*args, **kwargs))}
    except Exception as error:
        reply = raised(error)
    try:
        left = (*args, *kwargs.values())
        return reply | {"args": [encode(a) if type(a) in _CHANGEABLE else None for a in left]}
    except Exception as error:
        return raised(error) | {"args": []}


def raised(error):
    """An exception as the other sandbox can raise it."""
    return {"raised": type(error).__name__, "text": told(error)}


def judge(job, source, say):
    """Runs the test, or a text without one. The last line is the verdict, with the secret of this run."""
    calls: list = []
    names = {}
    if job["entry_point"] is not None:
        names[job["entry_point"]] = stand_in(source, say, calls)
    try:
        exec(compile(job["text"], "<test>", "exec"), module(names))
        reason = "passed" if calls or not names else f"the test never called {job['entry_point']}"
    except BaseException as error:
        reason = told(error)
    flush()
    say("v" + json.dumps({"secret": job["secret"], "reason": reason}))


def stand_in(source, say, calls):
    """The entry point as a test sees it: the call happens in the other sandbox."""

    def function(*args, **kwargs):
        calls.append(1)
        say("c" + json.dumps(encode([args, kwargs])))
        reply = json.loads(source.readline())
        for mine, theirs in zip((*args, *kwargs.values()), reply["args"], strict=False):
            update(mine, decode(theirs))
        if "raised" in reply:
            raise exception(reply["raised"], reply["text"])
        return decode(reply["value"])

    return function


# The first two would end a loop of the test in silence, as in `all(map(...))`; the others take more than a text.
_NEVER_RAISED = (StopIteration, StopAsyncIteration, UnicodeError, BaseExceptionGroup)


def exception(name, text):
    """A built-in exception of that name, else a RuntimeError."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _NEVER_RAISED):
        return kind(text)
    return RuntimeError(text)


def update(mine, theirs):
    """Makes a list, a set, a dictionary or the like that was passed what the function left of it."""
    kind = dict if type(mine) is collections.defaultdict else type(mine)
    if kind not in _CHANGEABLE or type(theirs) is not kind:
        return
    mine.clear()
    (mine.update if kind is set or kind in _DICTIONARIES else mine.extend)(theirs)


def main():
    """The first line of the input is the confinement; the second, sent once all sandboxes are confined, the job."""
    source = os.fdopen(os.dup(0), "r", encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def say(line):
        sink.write(line + "\n")
        sink.flush()

    try:
        confine(json.loads(source.readline()))
    except (OSError, ValueError, KeyError) as error:
        return say("refused " + told(error))
    say("confined")
    job = json.loads(source.readline())
    {"code": serve, "test": judge}[job["role"]](job, source, say)
    os._exit(0)


if __name__ == "__main__":
    main()
