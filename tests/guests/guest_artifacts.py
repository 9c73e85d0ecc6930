"""Where the distribution's guest kernels lie that tests boot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def artifact(name: str) -> Path:
    """What scripts/artifacts fetched; the lab and scripts/test put the paths into the environment."""
    value = os.environ.get(name)
    if not value:
        fetch = "`scripts/artifacts fetch` says whether the package can be had"
        pytest.fail(f'{name} is not set: eval "$(scripts/artifacts env)" first, or run scripts/test; {fetch}')
    return Path(value)
