"""A storage controller and a guest's driver in one process."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from hvkvm.abi import scsi, vmbus
from hvkvm.abi import storvsp as wire
from hvkvm.abi.ring import VM_PKT_DATA_USING_GPA_DIRECT, GpaRange, Packet, gpa_direct_header
from hvkvm.abi.storvsp import Srb
from hvkvm.block.buffers import size_of
from hvkvm.devices.synth import storvsp_pages
from hvkvm.devices.synth.storvsp_channel import MAX_IN_FLIGHT
from hvkvm.devices.synth.storvsp_handshake import Phase
from hvkvm.memory.atomics import FREE_THREADED
from hvkvm.testing.storvsc_driver import PAGE, RESET_ID, StorvscDriver

SUCCESS = wire.SRB_STATUS_SUCCESS
CHECKED = wire.SRB_STATUS_ERROR | wire.SRB_STATUS_AUTOSENSE_VALID


def rw(operation: int, lba: int, blocks: int) -> bytes:
    return scsi.cdb10.pack(operation, 0, lba, 0, blocks, 0)


def awake(driver: StorvscDriver, lun: int = 0) -> None:
    """The first command of a unit tells that it was switched on."""
    answer = driver.execute(bytes(6), lun=lun)
    assert (answer.srb_status, answer.scsi_status, answer.moved) == (CHECKED, scsi.CHECK_CONDITION, 0)
    assert (answer.sense[2], answer.sense[12]) == (scsi.UNIT_ATTENTION, scsi.POWER_ON.asc)
    assert driver.execute(bytes(6), lun=lun).srb_status == SUCCESS


def test_long_transfers_of_scattered_pages(bench: Any) -> None:
    world = bench()
    driver = world.start()
    awake(driver)
    memory, random = world.loop.memory, Random(1)
    pages, offset = random.sample(range(800, 1000), 65), 1536
    length = 64 * PAGE
    for pfn in pages:
        memory.write(pfn * PAGE, random.randbytes(PAGE))
    data = b"".join(memory.read(pfn * PAGE, PAGE) for pfn in pages)[offset : offset + length]
    sent = driver.execute(
        rw(scsi.WRITE_10, 8, length // 512),
        pages=pages,
        offset=offset,
        length=length,
        data_in=wire.WRITE_TYPE,
    )
    assert (sent.srb_status, sent.moved) == (SUCCESS, length)
    assert world.paths[0].read_bytes()[8 * 512 : 8 * 512 + length] == data
    for pfn in pages:
        memory.write(pfn * PAGE, b"\xa5" * PAGE)
    random.shuffle(pages)
    got = driver.execute(rw(scsi.READ_10, 8, length // 512), pages=pages, offset=offset, length=length)
    assert (got.srb_status, got.moved) == (SUCCESS, length)
    there = b"".join(memory.read(pfn * PAGE, PAGE) for pfn in pages)
    rest = PAGE - offset
    assert there == b"\xa5" * offset + data + b"\xa5" * rest
    # VERIFY with data, WRITE SAME and UNMAP take theirs from such lists, too.
    compared = bytes((scsi.VERIFY, 2)) + rw(scsi.READ_10, 8, length // 512)[2:]
    assert (
        driver.execute(
            compared, pages=pages, offset=offset, length=length, data_in=wire.WRITE_TYPE
        ).srb_status
        == SUCCESS
    )


@pytest.mark.parametrize("version", wire.VERSIONS)
def test_a_guest_writes_and_reads_its_disk(bench: Any, version: int) -> None:
    world = bench()
    driver = world.start(version=version)
    assert world.device.inspect()["version"] == f"{version >> 8}.{version & 255}"
    awake(driver)
    memory = world.loop.memory
    pages = [900, 901, 950, 910]  # neighbours, and others
    data = bytes(range(256)) * 48
    offset = 512
    for at, pfn in enumerate(pages):
        piece = data[max(0, at * PAGE - offset) : (at + 1) * PAGE - offset]
        memory.write(pfn * PAGE + (offset if not at else 0), piece)
    answer = driver.execute(
        rw(scsi.WRITE_10, 8, 24), pages=pages, offset=offset, length=len(data), data_in=wire.WRITE_TYPE
    )
    assert (answer.operation, answer.status, answer.srb_status) == (wire.COMPLETE_IO, 0, SUCCESS)
    assert (answer.scsi_status, answer.moved) == (scsi.GOOD, len(data))
    assert world.paths[0].read_bytes()[8 * 512 : 8 * 512 + len(data)] == data
    back = [920, 930]
    for pfn in back:
        memory.write(pfn * PAGE, b"\xa5" * PAGE)
    assert driver.execute(rw(scsi.READ_10, 9, 1), pages=back, offset=4000, length=512).moved == 512
    got = memory.read(920 * PAGE + 4000, 96) + memory.read(930 * PAGE, 416)
    assert got == data[512:1024]
    assert memory.read(920 * PAGE, 4000) == b"\xa5" * 4000
    assert memory.read(930 * PAGE + 416, PAGE - 416) == b"\xa5" * (PAGE - 416)
    assert driver.execute(bytes((scsi.SYNCHRONIZE_CACHE,)) + bytes(9)).srb_status == SUCCESS
    assert not world.loop.notes.events


def test_an_unknown_version_is_refused_and_another_may_follow(bench: Any) -> None:
    world = bench()
    world.loop.connect(vmbus.VERSION_WIN10_V5_3)
    driver = StorvscDriver(world.loop, world.device.offer.instance)
    assert driver.control(wire.QUERY_PROPERTIES)[0] == wire.STATUS_INVALID_DEVICE_STATE
    assert driver.control(wire.BEGIN_INITIALIZATION)[0] == 0
    assert driver.control(wire.END_INITIALIZATION)[0] == wire.STATUS_INVALID_DEVICE_STATE
    query = wire.QUERY_PROTOCOL_VERSION
    assert driver.control(query, wire.version_body(0x0700))[0] == wire.STATUS_REVISION_MISMATCH
    assert driver.control(query, wire.version_body(0x0402))[0] == wire.STATUS_REVISION_MISMATCH
    assert driver.control(query, wire.version_body(wire.VERSION_WIN8))[0] == 0
    assert driver.control(wire.FCHBA_DATA)[0] == wire.STATUS_INVALID_DEVICE_REQUEST
    assert driver.control(99)[0] == wire.STATUS_INVALID_DEVICE_REQUEST
    # No request is taken before the handshake is over.
    trans_id = driver.begin(bytes(6))
    world.loop.run()
    answer = driver.finished(trans_id)
    assert answer is not None
    assert answer.status == wire.STATUS_INVALID_DEVICE_STATE
    assert driver.control(wire.END_INITIALIZATION)[0] == 0
    awake(driver)


def test_who_is_not_there(bench: Any) -> None:
    world = bench(disks=2)
    driver = world.start()
    memory = world.loop.memory
    for address in ({"lun": 5}, {"target": 1}, {"path": 3}):
        answer = driver.execute(bytes((scsi.INQUIRY, 0, 0, 0, 36, 0)), pages=[900], length=36, **address)
        assert (answer.srb_status, answer.moved) == (SUCCESS, 36)
        assert memory.read(900 * PAGE, 1)[0] == scsi.NO_UNIT
        answer = driver.execute(bytes(6), **address)
        if "path" in address:  # Linux would take the unit on path 0 away
            assert answer.srb_status == CHECKED
            assert answer.sense[12] == scsi.INVALID_LUN.asc
        else:
            assert answer.srb_status == wire.SRB_STATUS_INVALID_LUN
    report = bytes((scsi.REPORT_LUNS, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0))
    assert driver.execute(report, pages=[900], length=64).moved == 24
    assert [memory.read(900 * PAGE + 8 * n, 2)[1] for n in (1, 2)] == [0, 1]
    # LUN 0 answers for the others, though it is not there itself.
    world.device.detach(0, 0, lambda _unit: None)
    assert driver.execute(report, pages=[900], length=64).moved == 16
    for nobody in ({"target": 1}, {"path": 1}):
        assert driver.execute(report, pages=[900], length=64, **nobody).moved == 8
        assert memory.read(900 * PAGE, 8) == bytes(8)


def test_errors_come_with_their_sense(bench: Any) -> None:
    world = bench()
    driver = world.start()
    awake(driver)
    answer = driver.execute(rw(scsi.READ_10, 1 << 30, 1), pages=[900], length=512)
    assert (answer.srb_status, answer.scsi_status, answer.moved) == (CHECKED, scsi.CHECK_CONDITION, 0)
    assert (answer.sense[2], answer.sense[12]) == (scsi.ILLEGAL_REQUEST, scsi.LBA_OUT_OF_RANGE.asc)
    assert len(answer.sense) == scsi.SENSE_BYTES
    world.paths[0].open("r+b").truncate(4096)
    answer = driver.execute(rw(scsi.READ_10, 100, 1), pages=[900], length=512)
    assert (answer.sense[2], answer.sense[12]) == (scsi.MEDIUM_ERROR, scsi.UNRECOVERED_READ.asc)


def test_pages_are_kept_within_bounds_and_taken_anew_once_they_were_revoked(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storvsp_pages, "MAX_PAGES", 4)
    world = bench()
    driver = world.start()
    awake(driver)
    kept = world.device._primary._pages.kept
    for round_ in range(2):
        for page in range(900, 910):
            world.loop.memory.write(page * PAGE, bytes([round_ + page % 100]) * 512)
            sent = driver.execute(
                rw(scsi.WRITE_10, page - 900, 1), pages=[page], length=512, data_in=wire.WRITE_TYPE
            )
            assert sent.srb_status == wire.SRB_STATUS_SUCCESS
            assert len(kept) <= 4
            assert kept or FREE_THREADED  # which keeps none
        for view in kept.values():
            view.release()
        assert [world.paths[0].read_bytes()[512 * n] for n in range(10)] == [round_ + n for n in range(10)]


def test_lists_of_pages_are_kept_within_bounds_and_hold_for_their_own_length(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storvsp_pages, "MAX_LISTS", 3)
    world = bench()
    driver = world.start()
    awake(driver)
    memory, random, lists = world.loop.memory, Random(3), world.device._primary._pages._lists
    named = [(random.sample(range(800, 1000), 32), random.randrange(0, PAGE, 512)) for _ in range(5)]
    named.append((list(range(700, 732)), 512))
    expected = bytearray(world.paths[0].read_bytes())
    for _ in range(60):
        pages, offset = random.choice(named)
        length, lba = random.choice((31 * PAGE, 31 * PAGE - 512, 20 * PAGE)), random.randrange(64)
        for pfn in pages:
            memory.write(pfn * PAGE, random.randbytes(PAGE))
        there = b"".join(memory.read(pfn * PAGE, PAGE) for pfn in pages)
        transfer = {"pages": pages, "offset": offset, "length": length}
        if random.random() < 0.5:
            expected[lba * 512 : lba * 512 + length] = there[offset : offset + length]
            done = driver.execute(rw(scsi.WRITE_10, lba, length // 512), data_in=wire.WRITE_TYPE, **transfer)
        else:
            done = driver.execute(rw(scsi.READ_10, lba, length // 512), **transfer)
            told = expected[lba * 512 : lba * 512 + length]
            there = there[:offset] + told + there[offset + length :]
        assert (done.srb_status, done.moved) == (SUCCESS, length)
        assert b"".join(memory.read(pfn * PAGE, PAGE) for pfn in pages) == there
        assert world.paths[0].read_bytes() == expected
        assert len(lists) <= 3
        assert lists or FREE_THREADED  # which keeps none
    pages = world.device._primary._pages
    pages.clear()
    assert not lists
    longest = gpa_direct_header([GpaRange(400 * PAGE, 0, tuple(range(100, 900, 2)))])
    packet = Packet(VM_PKT_DATA_USING_GPA_DIRECT, 1, 1, longest, b"")
    assert pages.of(Srb(0, 0, 0, bytes(10), wire.READ_TYPE, 400 * PAGE, 0), packet) is not None
    assert not lists
    header = gpa_direct_header([GpaRange(31 * PAGE, 512, tuple(range(800, 864, 2)))])
    packet = Packet(VM_PKT_DATA_USING_GPA_DIRECT, 1, 1, header, b"")
    for length in (31 * PAGE, 30 * PAGE + 512, 31 * PAGE, 18 * PAGE, 32 * PAGE):  # of one range
        found = pages.of(Srb(0, 0, 0, bytes(10), wire.READ_TYPE, length, 0), packet)
        assert (None if found is None else size_of(found)) == (length if length < 32 * PAGE else None)


LIES: list[tuple[str, dict[str, Any]]] = [
    ("no pages", {"ranges": []}),
    ("two ranges", {"ranges": [GpaRange(512, 0, (900,)), GpaRange(512, 0, (901,))]}),
    ("a range too short", {"ranges": [GpaRange(256, 0, (900,))]}),
    ("no RAM", {"ranges": [GpaRange(512, 0, (1 << 40,))]}),
    ("beyond RAM", {"ranges": [GpaRange(512, 3900, (1023, 1024))]}),
    (
        "much of it beyond RAM",
        {"ranges": [GpaRange(20 * PAGE, 0, tuple(range(1000, 1040, 2)))], "length": 20},
    ),
    (
        "the last of all",
        {"ranges": [GpaRange(20 * PAGE, 0, (*range(900, 938, 2), (1 << 52) - 1))], "length": 20},
    ),
    (
        "no page at all",
        {"ranges": [GpaRange(20 * PAGE, 0, (*range(900, 938, 2), (1 << 64) - 1))], "length": 20},
    ),
]


@pytest.mark.parametrize("lie", [lie for _name, lie in LIES], ids=[name for name, _lie in LIES])
def test_a_guest_that_lies_of_its_pages_gets_an_error(bench: Any, lie: dict[str, Any]) -> None:
    world = bench()
    driver = world.start()
    awake(driver)
    ranges = {name: value for name, value in lie.items() if name != "length"}
    pages = lie.get("length", 0)
    cdb = rw(scsi.READ_10, 0, 8 * pages or 1)
    payload = wire.request(Srb(0, 0, 0, cdb, wire.READ_TYPE, pages * PAGE or 512, 0))
    assert driver.send(payload, 77, **ranges)
    world.loop.run()
    answer = driver.finished(77)
    assert answer is not None
    assert (answer.status, answer.srb_status, answer.moved) == (0, wire.SRB_STATUS_INVALID_REQUEST, 0)
    assert driver.execute(bytes(6)).srb_status == SUCCESS


@pytest.mark.parametrize("payload", [b"", b"12345678", bytes(56)])
def test_packets_that_are_none_are_answered_all_the_same(bench: Any, payload: bytes) -> None:
    world = bench()
    driver = world.start()
    assert driver.send(payload, 5)
    world.loop.run()
    driver.collect()
    assert int.from_bytes(driver.answers[5][8:12], "little") == wire.STATUS_INVALID_PARAMETER


@pytest.mark.parametrize("operation", [wire.RESET_ADAPTER, wire.RESET_BUS, wire.RESET_LUN])
def test_a_reset_is_answered_behind_what_is_in_flight(bench: Any, operation: int) -> None:
    world = bench(disks=2)
    driver = world.start()
    awake(driver)
    world.workers.held = True
    reads = [driver.begin(rw(scsi.READ_10, n, 1), pages=[900 + n], length=512) for n in range(5)]
    world.loop.run()
    assert driver.send(wire.ask(operation), RESET_ID)
    world.loop.run()
    driver.collect()
    assert not driver.answers
    late = driver.begin(rw(scsi.READ_10, 0, 1), pages=[920], length=512)
    world.loop.run()
    answer = driver.finished(late)
    assert answer is not None
    assert (answer.srb_status, answer.scsi_status) == (wire.SRB_STATUS_BUSY, scsi.BUSY)
    world.workers.held = False
    world.workers.release()
    world.loop.run()
    driver.collect()
    assert all(driver.finished(one).srb_status == SUCCESS for one in reads)
    assert int.from_bytes(driver.answers[RESET_ID][8:12], "little") == 0
    assert list(driver.answers)[-1] == RESET_ID
    assert driver.execute(bytes(6)).sense[12] == scsi.POWER_ON.asc


def test_completions_of_one_turn_leave_with_one_signal(bench: Any) -> None:
    world = bench()
    driver = world.start()
    awake(driver)
    world.workers.held = True
    with driver.primary.opened:
        for n in range(32):
            driver.begin(rw(scsi.READ_10, n, 1), pages=[900 + n], length=512)
    world.loop.run()
    world.workers.held = False
    world.workers.release()
    before = len(world.loop.synic.flags_set)
    while world.loop.deferred:
        world.loop._run_deferred()
    assert len(world.loop.synic.flags_set) == before + 1
    world.loop.run()
    driver.collect()
    assert len([one for one in driver.answers.values() if wire.parse_answer(one).srb_status == SUCCESS]) == 32


def test_a_ring_without_room_holds_back_requests_and_loses_none(bench: Any) -> None:
    world = bench()
    world.loop.connect(vmbus.VERSION_WIN10_V5_3)
    driver = StorvscDriver(world.loop, world.device.offer.instance, ring_pages=2)
    driver.shake_hands()
    awake(driver)
    driver.primary.on_interrupt = lambda: None  # the guest takes no completion
    sent = []
    for _round in range(2000):
        payload = wire.request(Srb(0, 0, 0, bytes(6), wire.UNKNOWN_TYPE, 0, 0))
        if driver.send(payload, 1000 + len(sent)):
            sent.append(1000 + len(sent))
        world.loop.run()
    assert 1024 < len(sent) < 1200
    assert world.device._primary.in_flight.count == 0
    assert len(world.device._primary._done) == 1024
    driver.primary.on_interrupt = None
    driver.primary.interrupt()
    world.loop.run()
    driver.collect()
    assert [one for one in driver.answers if one >= 1000] == sent


def test_close_waits_for_the_workers(bench: Any) -> None:
    world = bench()
    driver = world.start()
    awake(driver)
    world.workers.held = True
    driver.begin(rw(scsi.READ_10, 0, 8), pages=[900], length=PAGE)
    world.loop.run()
    torn_down = world.loop.client.count(12)
    world.loop.client.close(driver.primary)
    world.loop.run()
    assert world.loop.client.count(12) == torn_down
    assert world.device.phase is Phase.NEW
    world.workers.held = False
    world.workers.release()
    world.loop.run()
    assert world.loop.client.count(12) == torn_down + 1
    driver.open(driver.primary)
    driver.shake_hands()
    assert driver.execute(bytes(6)).srb_status == SUCCESS
    assert not world.loop.notes.events


def test_sub_channels_carry_requests_to_any_unit(bench: Any) -> None:
    world = bench(disks=2, vp_count=4)
    driver = world.start(sub_channels=3)
    assert driver.sub_channels == 3
    for lun in (0, 1):
        awake(driver, lun)
    memory = world.loop.memory
    for number, channel in enumerate(driver.channels):
        for lun in (0, 1):
            memory.write(900 * PAGE, bytes([number * 2 + lun + 1]) * 512)
            options = {"pages": [900], "length": 512, "lun": lun, "channel": channel}
            assert driver.execute(rw(scsi.WRITE_10, number, 1), data_in=0, **options).srb_status == SUCCESS
    for lun in (0, 1):
        data = world.paths[lun].read_bytes()
        assert [data[512 * n] for n in range(4)] == [n * 2 + lun + 1 for n in range(4)]
    body = wire.count_body(4)
    assert driver.control(wire.CREATE_SUB_CHANNELS, body)[0] == wire.STATUS_INVALID_PARAMETER
    # Linux closes the sub-channels first, and then the primary.
    for sub in driver.subs:
        world.loop.client.close(sub)
    world.loop.client.close(driver.primary)
    world.loop.run()
    assert world.device.inspect()["channels"] == 0
    assert driver.subs == []
    assert not world.loop.notes.events


def test_sub_channels_that_are_asked_for_twice_are_those_that_there_are(bench: Any) -> None:
    """A request on one of them is waited for before the machine is at rest."""
    world = bench(vp_count=4)
    driver = world.start(sub_channels=1)
    awake(driver)
    assert driver.control(wire.CREATE_SUB_CHANNELS, wire.count_body(1))[0] == wire.STATUS_SUCCESS
    world.workers.held = True
    read = {"pages": [900], "length": 512, "channel": driver.subs[0]}
    trans_id = driver.begin(rw(scsi.READ_10, 0, 1), **read)
    world.loop.run()
    rested: list[int] = []
    world.loop.host.stop(lambda: rested.append(1))
    world.loop.run()
    assert not rested
    assert world.device.inspect()["in_flight"] == {0: 0, 1: 1}
    world.workers.held = False
    world.workers.release()
    while world.loop.deferred:
        world.loop._run_deferred()
    assert rested
    assert len(world.device.save().done) == 1
    world.loop.host.go_on()
    world.loop.run()
    assert driver.finished(trans_id).srb_status == SUCCESS


@pytest.mark.parametrize("length", [512, 4096])
def test_requests_that_want_no_answer_make_room_for_others(bench: Any, length: int) -> None:
    """As many as may be in flight, and more in the ring: when they end, what stands behind them is taken."""
    world = bench(vp_count=1)
    driver = world.start()
    awake(driver)
    world.workers.held = True
    count = length // 512
    srb = Srb(0, 0, 0, rw(scsi.READ_10, 0, count), wire.READ_TYPE, length, 0)
    sent = 0
    while sent < MAX_IN_FLIGHT:
        sent += driver.send(wire.request(srb), sent + 10, ranges=[GpaRange(length, 0, (900,))], flags=0)
        world.loop.run()
    assert world.device.inspect()["in_flight"] == {0: MAX_IN_FLIGHT}
    waits = driver.begin(bytes(6))
    world.loop.run()
    assert driver.finished(waits) is None
    world.workers.held = False
    world.workers.release()
    world.loop.run()
    assert driver.finished(waits).srb_status == SUCCESS


def test_a_machine_of_one_processor_has_no_sub_channels(bench: Any) -> None:
    driver = bench(vp_count=1).start()
    assert driver.sub_channels == 0
    body = wire.count_body(1)
    assert driver.control(wire.CREATE_SUB_CHANNELS, body)[0] == wire.STATUS_INVALID_PARAMETER


def test_units_come_and_go(bench: Any, tmp_path: Any) -> None:
    world = bench()
    driver = world.start()
    awake(driver)
    path = tmp_path / "another"
    path.write_bytes(bytes(1 << 16))
    unit = world.unit(path)
    world.device.attach(0, 3, unit)
    with pytest.raises(ValueError, match="target 0 has a LUN 3"):
        world.device.attach(0, 3, unit)
    with pytest.raises(ValueError, match="target 2 LUN 0: there are 0 to 1"):
        world.device.attach(2, 0, unit)
    world.device.rescan()
    world.loop.run()
    driver.collect()
    assert driver.notices == [wire.ENUMERATE_BUS]
    awake(driver, 3)
    world.workers.held = True
    read = driver.begin(rw(scsi.READ_10, 0, 1), pages=[900], length=512, lun=3)
    world.loop.run()
    gone: list[Any] = []
    world.device.detach(0, 3, gone.append)
    world.loop.run()
    assert not gone
    driver.collect()
    assert driver.notices == [wire.ENUMERATE_BUS, wire.REMOVE_DEVICE]
    assert driver.execute(bytes(6), lun=3).srb_status == wire.SRB_STATUS_INVALID_LUN
    world.workers.held = False
    world.workers.release()
    world.loop.run()
    assert gone == [unit]
    assert driver.finished(read).srb_status == SUCCESS


def test_a_machine_reset_is_power_on(bench: Any) -> None:
    world = bench()
    driver = world.start(sub_channels=2)
    awake(driver)
    world.loop.host.stop(lambda: None)
    world.loop.host.reset()
    world.device.reset()
    world.loop.host.go_on()
    awake(world.start())
