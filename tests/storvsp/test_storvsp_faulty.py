"""A disk that holds a guest's commands back, on a controller: nothing waits for it that must not."""

from __future__ import annotations

from typing import Any

import pytest
from storvsp_bench import Bench

from hvkvm.abi import scsi
from hvkvm.abi import storvsp as wire
from hvkvm.block.disk import Disk
from hvkvm.block.image import ImageOptions
from hvkvm.block.raw import RawImage
from hvkvm.devices.scsi.fault_rules import OPERATIONS, Action, Plan, Rule
from hvkvm.devices.scsi.faulty import FaultyDisk
from hvkvm.testing.storvsc_driver import PAGE, StorvscDriver

READ = scsi.cdb10.pack(scsi.READ_10, 0, 0, 0, 8, 0)


@pytest.fixture
def dropping(bench: Any) -> tuple[Bench, StorvscDriver, FaultyDisk]:
    """LUN 5 answers no READ."""
    world: Bench = bench()
    path = world.paths[0].with_name("faulty")
    path.write_bytes(bytes(1 << 20))
    image = world.images[path] = RawImage(path, ImageOptions())
    disk = Disk(image, world.workers, world.workers)  # type: ignore[arg-type]
    plan = Plan([Rule(Action.DROP, OPERATIONS["read"])])
    unit = FaultyDisk(disk, "faulty", plan, world.loop.call_later, lambda: None)  # type: ignore[arg-type]
    world.device.attach(0, 5, unit)
    driver = world.start()
    driver.execute(bytes(6), lun=5)
    driver.execute(bytes(6), lun=0)
    return world, driver, unit


def begun(world: Bench, driver: StorvscDriver, unit: FaultyDisk) -> int:
    trans_id = driver.begin(READ, lun=5, pages=[900], length=PAGE)
    world.loop.run()
    assert driver.finished(trans_id) is None
    assert unit.inspect()["held"] == 1
    return trans_id


def test_others_go_on_and_a_reset_brings_the_answer(dropping: Any) -> None:
    world, driver, unit = dropping
    trans_id = begun(world, driver, unit)
    assert driver.execute(READ, lun=0, pages=[901], length=PAGE).srb_status == wire.SRB_STATUS_SUCCESS
    assert driver.control(wire.RESET_BUS)[0] == wire.STATUS_SUCCESS
    answer = driver.finished(trans_id)
    assert answer is not None
    assert answer.sense[2] == scsi.ABORTED_COMMAND


def test_closing_the_channel_does_not_wait_for_it(dropping: Any) -> None:
    world, driver, unit = dropping
    begun(world, driver, unit)
    torn_down = world.loop.client.count(12)
    world.loop.client.close(driver.primary)
    world.loop.run()
    assert world.loop.client.count(12) == torn_down + 1
    assert unit.inspect()["held"] == 0


def test_a_machine_comes_to_rest(dropping: Any) -> None:
    world, driver, unit = dropping
    trans_id = begun(world, driver, unit)
    rested: list[int] = []
    world.device.rest(lambda: rested.append(1))
    world.loop.run()
    assert rested == [1]
    assert driver.finished(trans_id) is not None


def test_a_unit_that_is_taken_away_is_given_back(dropping: Any) -> None:
    world, driver, unit = dropping
    begun(world, driver, unit)
    gone: list[object] = []
    world.device.detach(0, 5, gone.append)
    world.loop.run()
    assert gone == [unit]
