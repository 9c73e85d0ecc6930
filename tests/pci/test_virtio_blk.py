"""The virtio block device against a driver in the test: requests, interrupts, saved machines."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from nvme_guest import SECTORS
from virtio_guest import (
    AVAILABLE,
    BASE,
    DATA,
    EVENT_IDX,
    HEADERS,
    INDIRECT,
    READY,
    SIZE,
    STATUS,
    TABLE,
    USED,
    VERSION_1,
    VirtioGuest,
)

from hvkvm.abi import pci, virtio
from hvkvm.block.request import Op, Status
from hvkvm.devices.pci.virtio import function as places
from hvkvm.devices.pci.virtio.transport import VirtioState
from hvkvm.state import codec

IN, OUT, FLUSH = virtio.VIRTIO_BLK_T_IN, virtio.VIRTIO_BLK_T_OUT, virtio.VIRTIO_BLK_T_FLUSH
OK, IOERR, UNSUPP = virtio.VIRTIO_BLK_S_OK, virtio.VIRTIO_BLK_S_IOERR, virtio.VIRTIO_BLK_S_UNSUPP


@pytest.fixture(params=[EVENT_IDX | INDIRECT, 0], ids=["event idx", "plain"])
def guest(routes: Any, request: pytest.FixtureRequest) -> Iterator[VirtioGuest]:
    made = VirtioGuest(routes, request.param)
    made.enable()
    yield made
    made.close()


def test_it_says_what_it_is(guest: VirtioGuest) -> None:
    config = guest.device.function.config
    assert struct.unpack_from("<HH", config) == (0x1AF4, 0x1042)
    assert config[pci.PCI_CLASS_REVISION] == 1
    assert struct.unpack_from("<HH", config, pci.PCI_SUBSYSTEM_VENDOR_ID)[1] >= 0x40
    kinds, at = [], config[pci.PCI_CAPABILITY_LIST]
    while at:
        if config[at] == pci.PCI_CAP_ID_VNDR:
            assert config[at + 2] == (20 if config[at + 3] in (2, 5) else 16)
            kinds.append(config[at + 3])
        at = config[at + 1]
    assert sorted(kinds) == [1, 2, 3, 4, 5]
    raw = bytes(guest.device.read(places.DEVICE + at, 1) for at in range(60))
    assert struct.unpack_from("<Q", raw)[0] == SECTORS
    assert struct.unpack_from("<I", raw, 20)[0] == 512
    assert guest.device.read(places.DEVICE, 4) == SECTORS
    assert guest.offered() & VERSION_1


def test_data_goes_to_the_disk_and_back(guest: VirtioGuest) -> None:
    guest.memory.write(DATA, bytes(range(256)) * 16)
    assert guest.do(OUT, 3, 4096) == OK
    assert guest.disk.data[3 * 512 : 11 * 512] == bytes(range(256)) * 16
    guest.memory.write(DATA, bytes(4096))
    assert guest.do(IN, 4, 1024, writes=True) == OK
    assert guest.memory.read(DATA, 1024) == bytes(range(256)) * 4
    assert guest.do(FLUSH, 0, 0) == OK
    assert guest.disk.seen[-1].op is Op.FLUSH
    assert guest.do(virtio.VIRTIO_BLK_T_GET_ID, 0, 20, writes=True) == OK
    assert guest.memory.read(DATA, 20) == b"hvkvm-0".ljust(20, b"\0")


def test_ranges_are_discarded_and_zeroed(guest: VirtioGuest) -> None:
    guest.disk.data[:] = b"x" * len(guest.disk.data)
    pack = virtio.virtio_blk_discard_write_zeroes.pack
    guest.memory.write(DATA, pack(0, 2, 1) + pack(8, 1, 0))
    assert guest.do(virtio.VIRTIO_BLK_T_WRITE_ZEROES, 0, 32) == OK
    assert [one.may_unmap for one in guest.disk.seen[-2:]] == [True, False]
    assert guest.disk.data[:1024] == bytes(1024)
    assert guest.disk.data[8 * 512 : 9 * 512] == bytes(512)
    assert guest.do(virtio.VIRTIO_BLK_T_DISCARD, 0, 32) == UNSUPP, "its flag is for zeros only"
    guest.memory.write(DATA, pack(16, 4, 0))
    assert guest.do(virtio.VIRTIO_BLK_T_DISCARD, 0, 16) == OK
    assert guest.disk.seen[-1].op is Op.DISCARD
    assert guest.do(virtio.VIRTIO_BLK_T_DISCARD, 0, 15) == IOERR
    guest.memory.write(DATA, pack(SECTORS, 1, 0) + pack(0, 1, 0))
    asked = len(guest.disk.seen)
    assert guest.do(virtio.VIRTIO_BLK_T_DISCARD, 0, 32) == IOERR
    assert len(guest.disk.seen) == asked + 1, "it ends at the first that fails"


def test_as_many_ranges_as_its_configuration_says(guest: VirtioGuest) -> None:
    longest, most = (guest.device.read(places.DEVICE + at, 4) for at in (36, 40))
    pack = virtio.virtio_blk_discard_write_zeroes.pack

    def discard(*ranges: tuple[int, int]) -> int:
        guest.memory.write(DATA, b"".join(pack(at, count, 0) for at, count in ranges))
        guest.disk.seen.clear()
        return guest.do(virtio.VIRTIO_BLK_T_DISCARD, 0, 16 * len(ranges))

    each = [(2 * number, 1) for number in range(most + 1)]
    assert discard(*each[:-1]) == OK
    assert len(guest.disk.seen) == most
    assert discard(*each) == IOERR
    assert not guest.disk.seen
    assert discard() == IOERR
    assert discard((0, longest)) == IOERR
    assert len(guest.disk.seen) == 1, "so long a one is the disk's to refuse"
    assert discard((0, 1), (0, longest + 1)) == IOERR
    assert not guest.disk.seen


def test_what_the_block_layer_says_reaches_the_guest(guest: VirtioGuest) -> None:
    for status in (Status.NO_SPACE, Status.ERROR, Status.READ_ONLY, Status.CANCELLED):
        guest.disk.status = status
        assert guest.do(OUT) == IOERR
        assert guest.do(IN, writes=True) == IOERR
    guest.disk.status = Status.OK
    assert guest.do(IN, SECTORS, writes=True) == IOERR
    assert guest.do(IN, (1 << 64) - 1, writes=True) == IOERR
    assert guest.do(77) == UNSUPP


def test_buffers_may_be_cut_anywhere(guest: VirtioGuest) -> None:
    guest.memory.write(DATA, b"abcd" * 128)
    guest.header(OUT, 7)
    buffers = [(HEADERS, 5, False), (HEADERS + 5, 11, False), (DATA, 100, False), (DATA + 100, 412, False)]
    guest.lay([*buffers, (HEADERS + 16, 1, True)])
    guest.offer()
    guest.loop.settle()
    assert guest.used() == [(0, 1)]
    assert guest.disk.data[7 * 512 : 8 * 512] == b"abcd" * 128
    guest.header(IN, 7)
    guest.lay([(HEADERS, 16, False), (DATA + 4096, 500, True), (DATA + 8192, 13, True)])
    guest.offer()
    guest.loop.settle()
    assert guest.used() == [(0, 513)]
    assert guest.memory.read(DATA + 4096, 500) + guest.memory.read(DATA + 8192, 12) == b"abcd" * 128
    assert guest.memory.read(DATA + 8204, 1) == b"\0"


def test_indirect_descriptors(guest: VirtioGuest) -> None:
    guest.header(IN, 1)
    guest.disk.data[512:1024] = b"q" * 512
    guest.lay([(HEADERS, 16, False), (DATA, 512, True), (HEADERS + 16, 1, True)], table=TABLE)
    raw = virtio.vring_desc.pack(TABLE, 48, virtio.VRING_DESC_F_INDIRECT, 0)
    guest.memory.write(0x10000 + 16 * 5, raw)
    guest.offer(5)
    guest.loop.settle()
    assert guest.used() == [(5, 513)]
    assert guest.memory.read(DATA, 512) == b"q" * 512


def test_requests_overlap_and_end_in_any_order(guest: VirtioGuest) -> None:
    guest.disk.held = True
    guest.header(IN)
    for head in range(4):
        guest.lay([(HEADERS, 16, False), (DATA + 512 * head, 513, True)], 2 * head)
        guest.offer(2 * head)
    guest.loop.settle()
    assert len(guest.disk.waiting) == 4
    assert guest.used() == []
    guest.disk.waiting.reverse()
    guest.disk.release()
    guest.loop.settle()
    assert [head for head, _written in guest.used()] == [6, 4, 2, 0]


def test_interrupts_by_line(guest: VirtioGuest) -> None:
    assert not any(guest.intx)
    assert guest.do(FLUSH, 0, 0) == OK
    assert guest.intx[-1]
    assert guest.device.read(places.ISR, 1) == virtio.VIRTIO_PCI_ISR_QUEUE
    assert not guest.intx[-1]
    assert guest.device.read(places.ISR, 1) == 0


def test_interrupts_by_msix(routes: Any) -> None:
    guest = VirtioGuest(routes)
    msix = guest.device.function.capability_offsets[pci.PCI_CAP_ID_MSIX]
    guest.device.function.write(msix + 2, 2, pci.PCI_MSIX_FLAGS_ENABLE)
    for word, value in enumerate((0xFEE00000, 0, 0x41, 0)):
        guest.device.write(places.MSIX_TABLE + 16 + 4 * word, 4, value)
    guest.enable(vector=1)
    assert guest.do(FLUSH, 0, 0) == OK
    assert routes.sent == [(0xFEE00000, 0x41)]
    assert not any(guest.intx)
    guest.close()


def test_an_interrupt_is_left_out_where_the_driver_wants_none(routes: Any) -> None:
    plain = VirtioGuest(routes, 0)
    plain.enable()
    plain.memory.write(AVAILABLE, b"\1\0")
    assert plain.do(FLUSH, 0, 0) == OK
    assert not any(plain.intx)
    plain.close()
    events = VirtioGuest(routes, EVENT_IDX)
    events.enable()
    events.memory.write(AVAILABLE + 4 + 2 * SIZE, struct.pack("<H", 1))
    assert events.do(FLUSH, 0, 0) == OK
    assert not any(events.intx), "it asked to hear of the second"
    assert events.do(FLUSH, 0, 0) == OK
    assert events.intx[-1]
    events.close()


def test_a_batch_has_one_interrupt(guest: VirtioGuest) -> None:
    guest.header(FLUSH)
    for head in range(3):
        guest.lay([(HEADERS, 16, False), (HEADERS + 16, 1, True)], 2 * head)
        guest.offer(2 * head, ring=head == 2)
    before = guest.intx.count(True)
    guest.loop.settle()
    assert len(guest.used()) == 3
    assert guest.intx.count(True) == before + 1


def test_it_rings_by_ioeventfd_where_the_bar_is(guest: VirtioGuest) -> None:
    at = BASE + places.NOTIFY
    assert list(guest.bells) == [at]
    guest.header(FLUSH)
    guest.lay([(HEADERS, 16, False), (HEADERS + 16, 1, True)])
    guest.offer(ring=False)
    guest.bells[at]()
    guest.loop.settle()
    assert guest.used() == [(0, 1)]
    guest.device.moved(places.BAR, 0xD0000000)
    guest.loop.settle()
    assert list(guest.bells) == [0xD0000000 + places.NOTIFY]
    guest.device.moved(places.BAR, None)
    guest.loop.settle()
    assert not guest.bells


def test_with_event_idx_it_asks_for_the_next_notification(routes: Any) -> None:
    guest = VirtioGuest(routes, EVENT_IDX)
    guest.enable()
    for count in range(1, 20):
        assert guest.do(FLUSH, 0, 0) == OK
        assert guest.memory.read(USED + 4 + 8 * SIZE, 2) == struct.pack("<H", count)
    guest.close()


def test_features_must_be_what_is_offered(routes: Any) -> None:
    guest = VirtioGuest(routes)
    guest.features = EVENT_IDX
    assert guest.negotiate() == READY & 3, "no virtio 1"
    guest.features = VERSION_1 | 1 << 40
    assert guest.negotiate() == READY & 3
    guest.features = VERSION_1
    assert guest.negotiate() == READY
    guest.reg(virtio.VIRTIO_PCI_COMMON_GF, 4, 0)
    assert guest.reg(virtio.VIRTIO_PCI_COMMON_GF, 4) == 1, "they stay as agreed"
    guest.close()


def test_reset_waits_for_what_is_in_flight(guest: VirtioGuest) -> None:
    guest.disk.held = True
    guest.header(IN)
    guest.lay([(HEADERS, 16, False), (DATA, 513, True)])
    guest.offer()
    guest.loop.settle()
    guest.reg(STATUS, 1, 0)
    assert guest.reg(STATUS, 1), "a worker has guest memory"
    guest.reg(STATUS, 1, 1)
    guest.loop.settle()
    assert guest.reg(STATUS, 1) & READY == READY
    guest.disk.release()
    guest.loop.settle()
    assert guest.reg(STATUS, 1) == 0
    assert guest.used() == [], "nobody hears of it"
    guest.disk.held = False
    guest.enable()
    assert guest.do(FLUSH, 0, 0) == OK


def test_reset_without_requests_is_done_at_once(guest: VirtioGuest) -> None:
    guest.reg(STATUS, 1, 0)
    assert guest.reg(STATUS, 1) == 0
    guest.loop.settle()
    assert not guest.bells


def test_the_window_in_configuration_space(guest: VirtioGuest) -> None:
    function = guest.device.function
    at = function.capability_offsets[pci.PCI_CAP_ID_VNDR]
    assert function.config[at + 3] == virtio.VIRTIO_PCI_CAP_PCI_CFG
    function.write(at + 8, 4, places.DEVICE)
    function.write(at + 12, 4, 4)
    assert function.read(at + 16, 4) == SECTORS
    function.write(at + 8, 4, virtio.VIRTIO_PCI_COMMON_GFSELECT)
    function.write(at + 16, 4, 1)
    assert guest.reg(virtio.VIRTIO_PCI_COMMON_GFSELECT, 4) == 1
    for offset, size in ((0x8000, 4), (2, 4), (0, 3), (1 << 31, 1)):
        function.write(at + 8, 4, offset)
        function.write(at + 12, 4, size)
        function.read(at + 16, 4)
        function.write(at + 16, 4, 0xFFFFFFFF)
    assert guest.do(FLUSH, 0, 0) == OK


def test_a_line_falls_when_msix_is_switched_on(guest: VirtioGuest) -> None:
    """It stayed up, and a guest that reads no ISR status then had it for ever, in a restored machine too."""
    assert guest.do(FLUSH, 0, 0) == OK
    assert guest.intx[-1]
    function = guest.device.function
    at = function.capability_offsets[pci.PCI_CAP_ID_MSIX] + pci.PCI_MSIX_FLAGS
    for flags in (pci.PCI_MSIX_FLAGS_ENABLE, 0):
        function.write(at, 2, flags)
        guest.loop.settle()
        assert guest.intx[-1] is not bool(flags)


def test_read_only_disks_say_so(routes: Any) -> None:
    guest = VirtioGuest(routes, read_only=True)
    offered = guest.offered()
    assert offered & 1 << virtio.VIRTIO_BLK_F_RO
    assert not offered & 1 << virtio.VIRTIO_BLK_F_DISCARD
    guest.close()


def test_saved_and_restored_it_goes_on(guest: VirtioGuest, routes: Any) -> None:
    for _ in range(5):
        assert guest.do(FLUSH, 0, 0) == OK
    guest.header(IN, 3)
    guest.lay([(HEADERS, 16, False), (DATA, 513, True)])
    guest.offer()
    rested: list[int] = []
    guest.device.stop(lambda: rested.append(1))
    guest.loop.settle()
    assert rested
    before = guest.used()
    config, state = guest.device.function.save(), guest.device.save()
    again = VirtioGuest(routes, memory=guest.memory)
    again.device.stop(lambda: None)
    again.loop.settle()
    again.device.reset()
    again.device.function.load(config)
    again.device.load(codec.restored(VirtioState, codec.plain(state), "test"))
    assert again.device.save() == state
    again.device.moved(places.BAR, BASE)
    again.device.start()
    again.loop.settle()
    again.next, again.seen = guest.next, guest.seen
    assert before == [] or again.used() == []
    if not before:
        assert again.used() == [(0, 513)], "what was in the ring is taken now"
    assert again.do(FLUSH, 0, 0) == OK
    again.device.close()


def test_a_driver_that_asks_for_too_much_is_refused_as_before_a_save(guest: VirtioGuest, routes: Any) -> None:
    """What it had asked for was cut to what is offered, and then agreed on."""
    wanted = 1 << virtio.VIRTIO_F_VERSION_1 - 32 | 1 << 30
    guest.reg(virtio.VIRTIO_PCI_COMMON_STATUS, 1, 0)
    guest.reg(virtio.VIRTIO_PCI_COMMON_GFSELECT, 4, 1)
    guest.reg(virtio.VIRTIO_PCI_COMMON_GF, 4, wanted)
    again = VirtioGuest(routes, memory=guest.memory)
    for one in (guest, again):
        one.device.stop(lambda: None)
        one.loop.settle()
    again.device.load(codec.restored(VirtioState, codec.plain(guest.device.save()), "test"))
    for one in (guest, again):
        assert one.reg(virtio.VIRTIO_PCI_COMMON_GF, 4) == wanted
        one.reg(virtio.VIRTIO_PCI_COMMON_STATUS, 1, virtio.VIRTIO_CONFIG_S_FEATURES_OK)
        assert one.reg(virtio.VIRTIO_PCI_COMMON_STATUS, 1) == 0
    again.device.close()


def test_reset_of_the_machine_is_power_on(guest: VirtioGuest, routes: Any) -> None:
    fresh = VirtioGuest(routes)
    fresh.device.stop(lambda: None)
    assert guest.do(FLUSH, 0, 0) == OK
    guest.device.stop(lambda: None)
    guest.loop.settle()
    guest.device.reset()
    guest.device.function.reset()
    assert guest.device.save() == fresh.device.save()
    assert not guest.bells
    fresh.close()


def test_a_stopped_device_touches_no_memory(guest: VirtioGuest) -> None:
    guest.device.stop(lambda: None)
    guest.loop.settle()
    guest.header(IN)
    guest.lay([(HEADERS, 16, False), (DATA, 513, True)])
    guest.offer()
    before = guest.memory.read(0, 1 << 20)
    guest.loop.settle()
    assert guest.memory.read(0, 1 << 20) == before
    guest.device.start()
    guest.loop.settle()
    assert guest.used() == [(0, 513)]
