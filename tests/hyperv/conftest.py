"""Fixtures for the SynIC's tests: a SynIC in plain memory, below the real routes and pages."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The SynIC stand-in is a module for tests, not part of the package.
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from fake_synic import World


@pytest.fixture
def world() -> World:
    """Two VPs with their SynIC on, routes over them, and an I/O loop that runs when told to."""
    from fake_synic import World

    return World()


@pytest.fixture
def open_fds() -> Callable[[], int]:
    """`open_fds()`: how many fds this process has open."""
    gc.collect()  # or what an earlier test dropped in a cycle is closed in the middle of this one
    return lambda: len(list(Path("/proc/self/fd").iterdir()))
