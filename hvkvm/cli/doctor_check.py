"""One finding of `hvkvm doctor`."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """One line of the report."""

    verdict: str
    name: str
    detail: str
    remedy: str = ""
    status: int = 0
