"""A fixture: waiting for what another thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    """`until(condition)`: wait for it; fails when it never comes."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < deadline, "the awaited did not come"
            time.sleep(0.002)

    return wait
