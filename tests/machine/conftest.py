"""Fixtures for the machine room."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A file that may be named as a kernel."""
    path = tmp_path / "kernel"
    path.write_bytes(b"x")
    return path
