"""The warm-started model, built once and kept in the user's cache."""

from __future__ import annotations

import pytest

from trl_ext.sandbox import ensure_model


@pytest.fixture(scope="session")
def sandbox_model() -> str:
    return ensure_model()
