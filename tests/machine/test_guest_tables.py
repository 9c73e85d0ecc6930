"""The ACPI tables that a machine's guest finds name what the machine has."""

from __future__ import annotations

import pytest
from guest_machine import Guest

from hvkvm.abi import board


@pytest.mark.kvm
@pytest.mark.parametrize("vmbus", ["on", "off"])
def test_the_bus_is_in_the_dsdt_where_there_is_one(vmbus: str) -> None:
    guest = Guest(vmbus=vmbus, synic="user", hv="host-model")
    try:
        guest.start()
        tables = bytes(guest.machine.memory.read(board.ACPI_AREA_ADDRESS, board.ACPI_AREA_SIZE))
    finally:
        guest.close()
    assert b"COM1" in tables
    assert (b"VMBS" in tables, b"VMOD" in tables) == (vmbus == "on", vmbus == "on")
