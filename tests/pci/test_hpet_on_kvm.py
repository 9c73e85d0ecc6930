"""The HPET by real exits and interrupts, with a guest of a few instructions: on any KVM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guest_machine import Guest

from hvkvm.abi import board, hpet
from hvkvm.abi.kvm import KVM_PIT_FLAGS_HPET_LEGACY
from hvkvm.machine.inspect import inspect

pytestmark = pytest.mark.kvm

LEVEL_ON_PIN_21 = hpet.HPET_TN_ENABLE | hpet.HPET_TN_LEVEL | 21 << hpet.HPET_TN_ROUTE_SHIFT


class Driver:
    """Registers, each access one of the guest's vCPU."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def r(self, offset: int, size: int = 8) -> int:
        return int(self.guest[0].do("READ", board.HPET_ADDRESS + offset, size).value)

    def w(self, offset: int, value: int, size: int = 8) -> None:
        self.guest[0].do("WRITE", board.HPET_ADDRESS + offset, size, value)

    @property
    def pit_flags(self) -> int:
        return int(self.guest.machine.platform.vm.get_pit2().flags)

    def shown(self) -> Any:
        return inspect(self.guest.machine.parts)["pci"]["hpet"]


def test_it_counts_interrupts_and_survives(boot_agent: Callable[..., Guest], tmp_path: Path) -> None:
    driver = Driver(boot_agent(hv="none", synic="auto", hpet="on"))
    assert driver.r(hpet.HPET_ID, 4) == hpet.CAPABILITIES
    assert driver.r(hpet.HPET_COUNTER) == 0
    timer = hpet.HPET_T0 + 2 * hpet.HPET_TN_SIZE
    driver.w(timer, LEVEL_ON_PIN_21)
    driver.w(timer + hpet.HPET_TN_CMP, 1000)  # before it counts, so that it cannot have passed
    driver.w(hpet.HPET_CFG, hpet.HPET_CFG_ENABLE | hpet.HPET_CFG_LEGACY)
    assert driver.pit_flags & KVM_PIT_FLAGS_HPET_LEGACY
    first = driver.r(hpet.HPET_COUNTER)
    assert driver.r(hpet.HPET_COUNTER) > first
    driver.guest.until(lambda: driver.r(hpet.HPET_STATUS) == 4, "the timer is due")
    assert driver.shown() == {"counts": True, "legacy": True, "interrupts": [0, 0, 1]}

    machine = driver.guest.machine
    machine.save(tmp_path / "saved")
    driver.guest.close()
    again = Driver(Guest(hv="none", synic="auto", restore=tmp_path / "saved"))
    try:
        again.guest.machine.start()
        assert again.pit_flags & KVM_PIT_FLAGS_HPET_LEGACY
        assert again.r(hpet.HPET_COUNTER) > first
        assert (again.r(hpet.HPET_STATUS), again.r(timer) & LEVEL_ON_PIN_21) == (4, LEVEL_ON_PIN_21)
        boots = again.guest.agent.boots
        again.guest.machine.request_reset("test")
        again.guest.agent.await_online(boots + 1)
        assert (again.pit_flags, again.r(hpet.HPET_CFG), again.r(hpet.HPET_COUNTER)) == (0, 0, 0)
    finally:
        again.guest.close()
