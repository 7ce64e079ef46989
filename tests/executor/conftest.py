"""The executors that work on this machine; the others are skipped with the reason."""

import pytest

from trl_ext.executor import EXECUTORS, NoIsolation, make_executor


@pytest.fixture(params=list(EXECUTORS))
def executor(request):
    """Every executor that passes its probe here."""
    try:
        return make_executor(request.param)
    except NoIsolation as error:
        pytest.skip(str(error))
