"""A controller that is saved and gone on with by another, at any moment: no request lost, none doubled."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
from saved_bus import swap

from hvkvm.abi import scsi
from hvkvm.abi import storvsp as wire
from hvkvm.errors import StateError
from hvkvm.testing.storvsc_driver import PAGE

SEEDS = int(os.environ.get("HVKVM_SAVED_SEEDS", "10"))
"""Of runs; in each a machine is saved and gone on with more than ten times."""


def rw(operation: int, lba: int) -> bytes:
    return scsi.cdb10.pack(operation, 0, lba, 0, 1, 0)


def go_on_with_another(world: Any, change: Any = lambda state: state) -> None:
    """Save, and have another controller on other disks of the same files go on."""
    world.workers.held = False
    world.workers.release()
    world.device = world.make()
    swap(world.loop, [world.device])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_requests_come_once_through_many_machines(bench: Any, seed: int) -> None:
    random = Random(seed)
    world = bench(disks=2, seed=seed)
    driver = world.start(sub_channels=2)
    for lun in (0, 1):
        driver.execute(bytes(6), lun=lun)
    memory = world.loop.memory
    expected = [dict.fromkeys(range(64), 0) for _ in range(2)]
    under_way: dict[int, tuple[int, int, int, int]] = {}
    free = list(range(900, 1000))
    swaps = done = 0
    for step in range(600):
        world.workers.held = random.random() < 0.5
        if not world.workers.held:
            world.workers.release()
        busy = {(lun, lba) for lun, lba, _value, _page in under_way.values()}
        lun, lba = random.randrange(2), random.randrange(64)
        if len(under_way) < 12 and (lun, lba) not in busy:
            page, writes, value = free.pop(), random.random() < 0.5, random.randrange(1, 256)
            memory.write(page * PAGE, bytes([value if writes else 0xEE]) * 512)
            options = {"data_in": wire.WRITE_TYPE} if writes else {}
            channel = random.choice(driver.channels)
            trans_id = driver.begin(
                rw(scsi.WRITE_10 if writes else scsi.READ_10, lba),
                pages=[page],
                length=512,
                lun=lun,
                channel=channel,
                **options,
            )
            under_way[trans_id] = (lun, lba, value if writes else -1, page)
        for _ in range(random.randrange(8)):
            world.loop.step()
        if random.random() < 0.05:
            go_on_with_another(world)
            swaps += 1
        if step == 599:
            world.workers.held = False
            world.workers.release()
            world.loop.run()
        for trans_id, (lun, lba, value, page) in list(under_way.items()):
            answer = driver.finished(trans_id)
            if answer is None:
                continue
            assert (answer.srb_status, answer.moved) == (wire.SRB_STATUS_SUCCESS, 512)
            if value >= 0:
                expected[lun][lba] = value
            assert memory.read(page * PAGE, 512) == bytes([expected[lun][lba]]) * 512
            free.append(page)
            del under_way[trans_id]
            done += 1
    assert not under_way
    assert swaps > 10
    assert done > 100
    for lun, path in enumerate(world.paths):
        data = path.read_bytes()
        assert [data[lba * 512] for lba in range(64)] == list(expected[lun].values())
    assert not world.loop.notes.events


def test_completions_without_room_are_kept(bench: Any) -> None:
    world = bench()
    driver = world.start()
    driver.execute(bytes(6))
    driver.primary.on_interrupt = lambda: None
    sent = []
    for number in range(300):
        if driver.send(wire.ask(wire.ENUMERATE_BUS), 1000 + number):
            sent.append(1000 + number)
        world.loop.run()
    assert len(world.device._primary._done) > 100
    world.device.rescan()
    go_on_with_another(world)
    world.loop.run()
    driver.primary.on_interrupt = None
    driver.primary.interrupt()
    world.loop.run()
    driver.collect()
    assert [one for one in driver.answers if one >= 1000] == sent
    assert driver.notices == [wire.ENUMERATE_BUS]


def test_a_machine_that_was_saved_before_its_guest_looked(bench: Any) -> None:
    """The unit attention of its power-on is not told twice, nor lost."""
    world = bench()
    go_on_with_another(world)
    driver = world.start()
    assert driver.execute(bytes(6)).sense[12] == scsi.POWER_ON.asc
    go_on_with_another(world)
    assert driver.execute(bytes(6)).srb_status == wire.SRB_STATUS_SUCCESS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"phase": "asleep"}, "no driver has come to 'asleep'"),
        ({"version": 0x0700}, "no driver has come to 'ready'"),
        ({"phase": "new"}, "no driver has come to 'new'"),
        ({"units": {}}, "only this machine has a unit at '0:0'"),
    ],
)
def test_what_no_controller_was_is_refused(bench: Any, change: dict[str, Any], why: str) -> None:
    world = bench()
    world.start()
    state = world.device.save()._replace(**change)
    with pytest.raises((ValueError, StateError), match=why):
        world.make().load(world.device._primary._io, state)


def test_made_up_completions_are_refused(bench: Any) -> None:
    world = bench()
    world.start()
    state = world.device.save()
    one = (0, 5, bytes(63))
    from hvkvm.devices.synth.storvsp_channel import MAX_IN_FLIGHT, SavedCompletion

    for done in ((SavedCompletion(*one),), (SavedCompletion(0, 5, bytes(64)),) * (4 * MAX_IN_FLIGHT + 1)):
        with pytest.raises(ValueError, match="wait"):
            world.make().load(world.device._primary._io, state._replace(done=done))


def test_a_dvd_in_the_place_of_a_disk_is_refused(bench: Any) -> None:
    world = bench()
    state = world.device.save()
    (place,) = state.units
    from hvkvm.devices.scsi.dvd import DvdState
    from hvkvm.devices.scsi.saved import UnitState

    other = UnitState(None, DvdState((), False, False, ()))
    with pytest.raises(StateError, match="something else in its place"):
        world.make().load(None, state._replace(units={place: other}))
