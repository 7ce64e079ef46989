"""The executors that work on this machine; the others are skipped with the reason."""

import functools

import pytest

from trl_ext.executor import EXECUTORS, NoIsolation, make_executor


@pytest.fixture(params=list(EXECUTORS))
def executor(request):
    """Every executor that passes its probe here."""
    found = _tried_once(request.param)
    if isinstance(found, NoIsolation):
        pytest.skip(str(found))
    return found


@functools.cache
def _tried_once(name):
    """`make_executor` keeps no refusal: trying a container program in vain for each test takes minutes."""
    try:
        return make_executor(name)
    except NoIsolation as error:
        return error
