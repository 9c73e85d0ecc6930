"""Fixtures: waiting for what another thread does, and a host that refuses to watch an fd at first."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from hvkvm.runtime import retry
from hvkvm.runtime.io_loop import IoLoop


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], None]:
    """`until(condition)`: wait for it; fails when it never comes."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < deadline, "the awaited did not come"
            time.sleep(0.002)

    return wait


@pytest.fixture
def refused(io: IoLoop, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The errors with which the loop's next watches of an fd fail."""
    numbers, real = [errno.ENOMEM, errno.ENOSPC], io.add_reader

    def add_reader(*arguments: Any, **options: Any) -> Any:
        if numbers:
            number = numbers.pop()
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(io, "add_reader", add_reader)
    return numbers
