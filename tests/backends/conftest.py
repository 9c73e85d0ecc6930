"""Fixtures: a running I/O loop, and waiting for what it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from hvkvm.runtime.io_loop import IoLoop


@pytest.fixture
def io() -> Iterator[IoLoop]:
    """A running loop; the test fails if one of its callbacks raised."""
    faults: list[BaseException] = []
    loop = IoLoop(on_fault=faults.append)
    loop.start()
    yield loop
    loop.stop()
    assert faults == []


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    """`until(condition)`: wait for it; fails when it never comes."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < deadline, "the awaited did not come"
            time.sleep(0.002)

    return wait
