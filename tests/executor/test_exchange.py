"""Plain values between code and test: round trips, refusals, changes of arguments, exceptions."""

import asyncio
import collections
import json
import warnings

import pytest

from trl_ext.executor import Job, Limits
from trl_ext.executor.inside import answer, decode, encode, exception, told, update

QUICK = Limits(wall_s=20)
VALUES = [
    *(None, True, 0, -(2**70), 1.5, "tëxt\n", [1, [2.0, None]], (1, (2,)), {1, 2}, frozenset({"a"})),
    *({"a": 1, 2: [3], (1, 2): {"x": ()}}, b"\x00\xff", bytearray(b"x"), 1 + 2j, range(1, 9, 2)),
    *(collections.Counter("abca"), collections.OrderedDict([("b", 1), ("a", 2)]), collections.deque([1, (2,)])),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_as_they_were(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_whole_numbers_of_any_length():
    """Python refuses to write more than 4300 decimal digits, so no number may reach pytest's messages either."""
    long = 10**5000
    value = [long, -long, {long: range(long, 2 * long, 3)}, 2**64, -(2**64), 2**64 - 1]
    same = decode(json.loads(json.dumps(encode(value)))) == value
    assert same


def test_the_base_travels_of_what_needs_a_class_or_a_function():
    point = collections.namedtuple("point", "x y")
    groups = collections.defaultdict(list, {"a": [point(1, 2)]})
    back = decode(json.loads(json.dumps(encode(groups))))
    assert back == {"a": [(1, 2)]}
    assert (type(back), type(back["a"][0])) == (dict, tuple)


def test_infinity_and_nan():
    assert decode(json.loads(json.dumps(encode(float("-inf"))))) == float("-inf")
    assert decode(json.loads(json.dumps(encode(float("nan"))))) != decode(json.loads(json.dumps(encode(0.0))))


def test_iterators_are_read_to_their_end():
    assert list(decode(encode(x * x for x in range(4)))) == [0, 1, 4, 9]
    assert list(decode(encode(zip("ab", (1, 2), strict=True)))) == [("a", 1), ("b", 2)]


class Same(int):
    """Equals everything."""

    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value", [object(), Same(1), [Same(1)], len, {"a": object()}, int], ids=lambda value: type(value).__name__
)
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match="is no plain value"):
        encode(value)


@pytest.mark.parametrize("data", [{"eval": ["1"]}, {"a": 1, "b": 2}, {}])
def test_other_messages_are_refused(data):
    with pytest.raises((KeyError, ValueError)):
        decode(data)


def test_exceptions_by_name():
    assert type(exception("ValueError", "x")) is ValueError
    assert type(exception("ZeroDivisionError", "x")) is ZeroDivisionError
    other = ("SystemExit", "KeyboardInterrupt", "BaseException", "GeneratorExit", "print", "Missing", None)
    for name in (*other, "UnicodeDecodeError", "StopIteration", "StopAsyncIteration", "ExceptionGroup"):
        assert type(exception(name, "x")) is RuntimeError


def test_updates_keep_the_object():
    mine = [3, 1]
    kept = mine
    update(mine, [1, 3])
    assert kept == [1, 3]
    counter, groups = collections.Counter("ab"), collections.defaultdict(list, {1: [2]})
    left = [(counter, collections.Counter("bb")), (groups, {3: [4]}), (collections.deque([1]), collections.deque([2]))]
    for before, after in (({1: 2}, {3: 4}), ({1}, {2, 3}), (bytearray(b"x"), bytearray(b"yz")), *left):
        kind = type(before)
        update(before, after)
        assert before == after
        assert type(before) is kind
    update(mine, (9,))
    assert kept == [1, 3]


def test_arguments_that_an_exception_left_changed():
    def function(xs):
        xs.append(2)
        raise ValueError("no")

    assert answer(function, ([[1]], {})) == {
        "raised": "ValueError",
        "text": "ValueError: no",
        "args": [{"list": [1, 2]}],
    }
    assert answer(lambda xs: xs.append(object()), ([[1]], {}))["raised"] == "TypeError"
    assert answer(lambda n, xs: xs.append(n), ([3], {"xs": [1]})) == {"value": None, "args": [None, {"list": [1, 3]}]}


def test_an_exception_is_told_in_one_line():
    assert told(ValueError("a\nb\r\nc")) == "ValueError: a b c"


CASES = {
    "arguments are changed in place": (
        "def f(xs, d):\n    xs.sort()\n    d['n'] = len(xs)\n",
        "a, d = [3, 1, 2], {}\nassert f(a, d) is None\nassert a == [1, 2, 3] and d == {'n': 3}\n",
        True,
    ),
    "exceptions are raised": (
        "def f(x):\n    raise ValueError('no')\n",
        "try:\n    f(1)\nexcept ValueError as e:\n    assert 'no' in str(e)\nelse:\n    raise AssertionError\n",
        True,
    ),
    "collections": (
        "from collections import *\ndef f(x): return Counter(x), defaultdict(int, a=1), namedtuple('p', 'x')(1), deque(x)",
        "c, *rest = f('aab')\nassert c.most_common(1) == [('a', 2)]\n"
        "from collections import deque\nassert rest == [{'a': 1}, (1,), deque('aab')]",
        True,
    ),
    "keywords and defaults": (
        "def f(a, b=2, *c, **d): return (a, b, c, d)",
        "assert f(1, k=3) == (1, 2, (), {'k': 3})",
        True,
    ),
    "state is kept between calls": (
        "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)\n",
        "assert [f(5), f(5)] == [1, 2]",
        True,
    ),
    "recursion": ("def f(n): return f(n + 1)", "f(1)", False),
    "a deep value": ("def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x", "f()", False),
    "huge numbers": ("def f(n): return n * 10**6000", "assert f(10**5000) == 10**11000", True),
    "arguments by keyword are changed in place": (
        "def f(n, xs, d):\n    xs.append(n)\n    d['n'] = len(xs)",
        "a, d = [], {}\nf(3, d=d, xs=a)\nassert a == [3] and d == {'n': 1}",
        True,
    ),
    "a value that fits no message": ("def f(): return [1] * 10**6", "assert f()", False),
    "no such function": ("def g(): return 1", "assert f() == 1", False),
    "the code does not load": ("1 / 0", "assert f() == 1", False),
    "the test does not parse": ("def f(): return 1", "assert f( == 1", False),
}


@pytest.mark.parametrize("name", CASES)
def test_jobs(executor, name):
    code, test, passes = CASES[name]
    outcome = executor.run(Job(code, test, "f"), QUICK)
    assert outcome.passed is passes, outcome
    assert not outcome.timed_out


def test_each_job_starts_anew_also_where_an_event_loop_runs(executor):
    code = "import os\ndef f():\n    open('/tmp/code', 'w')\n    return os.listdir('/tmp')"
    job = Job(code, "import os\nassert os.listdir('/tmp') == []\nopen('/tmp/test', 'w')\nassert f() == ['code']", "f")

    async def notebook():
        return executor.run_all([job, job], QUICK, at_once=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [outcome.reason for outcome in asyncio.run(notebook())] == ["passed", "passed"]


def test_the_reason_names_what_is_wrong(executor):
    lone = executor.run(Job("raise ValueError('\\ud800\\nx')", "f()", "f"), QUICK).reason
    assert lone == "the code does not load: ValueError: \\ud800 x"
    assert executor.run(Job("1 / 0", "f()", "f"), QUICK).reason.startswith("the code does not load: ZeroDivisionError")
    assert executor.run(Job("x = 1", "f()", "f"), QUICK).reason == "the code does not load: KeyError: 'f'"
    assert "is no plain value" in executor.run(Job("def f(): return f", "f()", "f"), QUICK).reason


def test_what_is_printed_is_kept(executor):
    outcome = executor.run(Job("print('code')\ndef f(): print('call')", "print('test')\nf()", "f"), QUICK)
    assert outcome.passed
    assert sorted(outcome.output.split()) == ["call", "code", "test"]
