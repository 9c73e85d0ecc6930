"""Long random attacks on PCI's devices and on what firmware is offered: HVKVM_PCI_STEPS makes them longer."""

from __future__ import annotations

import os
from random import Random
from time import monotonic
from typing import Any

import pytest
from storms import STORMS

STEPS = int(os.environ.get("HVKVM_PCI_STEPS", "2000"))
SEED = int(os.environ.get("HVKVM_SEED", "1"))


@pytest.mark.parametrize("name", STORMS)
def test_a_storm(name: str, new_routes: Any, new_board: Any) -> None:
    began = monotonic()
    STORMS[name](Random(f"{name} {SEED}"), STEPS, new_routes, new_board)
    print(f"\n  {name}: {STEPS} steps from seed {SEED} in {monotonic() - began:.0f} s")
