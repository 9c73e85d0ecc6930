"""`ctl net` of a NIC that is being removed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.machine.control_net import NetControl


@pytest.mark.parametrize("leaving", [False, True])
def test_the_cable_of_a_nic_that_leaves_is_left_alone(leaving: bool) -> None:
    plugged: list[bool] = []
    wire = SimpleNamespace(plug=plugged.append, up=True)
    nics = SimpleNamespace(
        nics={"net0": SimpleNamespace(wire=wire)}, leaving={"net0": ...} if leaving else {}
    )
    told: list[tuple[Any, ...]] = []
    answer: Any = SimpleNamespace(
        ok=lambda result: told.append((result,)), fail=lambda *words: told.append(words)
    )
    parts: Any = SimpleNamespace(nics=nics)
    NetControl(parts).handle({"what": "link", "name": "net0", "state": "up"}, answer)
    if leaving:
        assert (plugged, told) == ([], [("busy", "net0 is being removed")])
    else:
        assert (plugged, told) == ([True], [({"name": "net0", "up": True},)])
