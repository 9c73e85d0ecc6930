"""Where the distribution's guest kernels and root disk lie that tests boot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def artifact(name: str) -> Path:
    """What scripts/artifacts fetched; the lab and scripts/test put the paths into the environment."""
    value = os.environ.get(name)
    if not value:
        script, verb = ("root-disk", "make") if name.startswith("HVKVM_ROOT_") else ("artifacts", "fetch")
        first = f'eval "$(scripts/{script} env)" first, or run scripts/test'
        pytest.fail(f"{name} is not set: {first}; `scripts/{script} {verb}` says whether it can be had")
    return Path(value)
