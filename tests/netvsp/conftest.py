"""A NIC with a scripted wire and a driver, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from netvsp_lan import Lan


@pytest.fixture
def lan() -> Iterator[Callable[..., Lan]]:
    """Makes them, and closes them."""
    made: list[Lan] = []

    def make(**options: Any) -> Lan:
        made.append(Lan(**options))
        return made[-1]

    yield make
    for one in made:
        one.loop.close()
