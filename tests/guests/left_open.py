"""A pytest plugin: a test leaves no file open, neither by oversight nor in a cycle that nobody collected.

Other tests look at what the process has open, and what is left in a cycle is closed in the middle of any.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
from open_files import newly_open, open_files

SECONDS = 30.0  # for threads that close what they had when they come to it


class LeftOpen:
    """Compares what is open behind a test with what was open before it."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}
        self._for_long: dict[str, str] = {}  # what fixtures of more than one test hold
        self._of_modules: set[str] = set()  # fixtures that may open more when a test asks them to

    def _left(self) -> dict[str, str]:
        left = newly_open(self._before)
        return {fd: to for fd, to in left.items() if self._for_long.get(fd) != to}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        self._before = open_files()
        yield

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        before = open_files()
        made = yield
        self._for_long.update(newly_open(before))
        if fixturedef.scope == "module":
            self._of_modules.add(fixturedef.argname)
        return made

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        yield
        if self._left():
            gc.collect()  # an exception that was caught keeps what its frames had
        if not self._of_modules.isdisjoint(getattr(item, "fixturenames", ())):
            self._for_long.update(self._left())
            return
        end = time.monotonic() + SECONDS
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, f"{item.nodeid} left open: {left}"
