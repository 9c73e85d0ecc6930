"""A controller's turn is bounded by the guest pages that its requests name. In requests, not time."""

from __future__ import annotations

from typing import Any

import pytest

from hvkvm.abi import scsi, vmbus
from hvkvm.abi import storvsp as wire
from hvkvm.devices.synth.storvsp_channel import BUDGET
from hvkvm.testing.storvsc_driver import PAGE, StorvscDriver

PAGES = [900, 902]


@pytest.mark.parametrize(("pages", "requests", "a_turn"), [(8190, 3, 1), (15, 2 * BUDGET, BUDGET)])
def test_requests_of_many_pages_end_a_turn(bench: Any, pages: int, requests: int, a_turn: int) -> None:
    world = bench()
    world.loop.connect(vmbus.VERSION_WIN10_V5_3)
    driver = world.driver = StorvscDriver(world.loop, world.device.offer.instance, ring_pages=64)
    driver.shake_hands()
    driver.execute(bytes(6))
    world.workers.held = True
    options = {"pages": (PAGES * pages)[:pages], "length": pages * PAGE, "data_in": wire.READ_TYPE}
    for _ in range(requests):
        driver.begin(scsi.cdb10.pack(scsi.READ_10, 0, 0, 0, 1, 0), **options)
    taken, before = [], world.device._primary.requests
    while world.loop.step():
        taken.append(world.device._primary.requests - before)
        before += taken[-1]
    assert max(taken) == a_turn
    assert sum(taken) == requests
    world.workers.held = False
    world.workers.release()
    world.loop.run()
