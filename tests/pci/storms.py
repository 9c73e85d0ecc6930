"""A guest that means harm and never tires: long random sequences of accesses to what PCI and firmware offer.

Each storm takes a random generator and a number of steps; a step is one access, command, descriptor or
doorbell. Now and then it looks at the bounds, resets the device and has a well-behaved driver use it. What it
raises is a fault of the device: AssertionError for a bound that does not hold.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

from nvme_guest import DATA, IO_CQ, IO_SQ, MIB, SHADOW, NvmeGuest, ram
from virtio_guest import AVAILABLE, DESCRIPTORS, HEADERS, SIZE, STATUS, TABLE, USED, VirtioGuest

from hvkvm.abi import fw_cfg, nvme, pci, virtio
from hvkvm.devices.flash import BLOCK, Flash
from hvkvm.devices.pci.board_functions import PowerManagement, host_bridge, isa_bridge
from hvkvm.devices.pci.nvme.controller import MAX_COMMANDS
from hvkvm.devices.pci.nvme.function import VECTORS
from hvkvm.devices.pci.virtio import function as places
from hvkvm.devices.pci.virtio.transport import MAX_IN_FLIGHT
from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.fw_cfg import FirmwareFwCfg
from hvkvm.devices.ramfb import Ramfb

LOOK = 500
"""Steps between two looks."""
MOST_PENDING = 16
"""Calls that may wait for the loop, whatever the guest does between two of its turns."""
ON = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER
ADDRESSES = (
    0,
    0x1000,
    MIB,
    0x8000_0000,
    0xC000_0000,
    0xC000_2000,
    0xFEC0_0000,
    0xFEE0_0000,
    0xFFFF_F000,
    0xFFFF_FFFF,
)
Storm = Callable[[Random, int, Any, Any], object]
"""storm(random, steps, routes, board): the last two are the fixtures' classes."""


def word(random: Random, bits: int = 64) -> int:
    """A number that is small, near an edge, or any."""
    which = random.randrange(4)
    if which == 0:
        return random.randrange(16)
    if which == 1:
        return (1 << bits) - 1 - random.randrange(16)
    if which == 2:
        return 1 << random.randrange(bits)
    return random.getrandbits(bits)


def address(random: Random) -> int:
    """A guest physical address: mostly in RAM of 2 MiB, else at its end, or anywhere."""
    which = random.randrange(8)
    if which < 5:
        return random.choice((DATA, IO_SQ, IO_CQ, SHADOW, HEADERS, TABLE)) + random.choice((0, 0, 0, 4, 4088))
    return 2 * MIB - random.randrange(9000) if which < 7 else word(random)


def bars(random: Random, steps: int, routes: Any, board_of: Any) -> None:
    """Configuration space, and BARs that overlap RAM, each other and the APIC; accesses through them."""
    board = board_of()
    bases: list[int | None] = []
    board.bus.add_function(0, 0, host_bridge())
    board.bus.add_function(1, 0, isa_bridge())
    board.bus.add_function(1, 3, PowerManagement(bases.append))
    lines = routes(), routes()
    disks = NvmeGuest(lines[0]), VirtioGuest(lines[1])
    slots = [board.bus.plug(one.device) for one in disks]
    for step in range(steps):
        size = random.choice((1, 2, 4))
        which = random.randrange(8)
        if which < 3:
            slot, offset = random.choice((0, 1, *slots, *slots, 31)), random.randrange(256) & -size
            value = random.choice((*ADDRESSES, word(random, 32)))
            board.write(slot, offset, value & (1 << 8 * size) - 1, size, random.choice((0, 0, 0, 3, 7)))
        elif which < 4:
            board.read(random.randrange(32), random.randrange(256) & -size, size, random.randrange(8))
        else:
            ranges = board.mmio.ranges()
            gpa = random.choice(ranges).gpa + random.randrange(0x4100) if ranges else random.choice(ADDRESSES)
            size = random.choice((1, 2, 4, 8))
            if which < 6:
                board.mmio.read(gpa, size)
            else:
                board.mmio.write(gpa, size, word(random, 8 * size))
        if not step % 7:
            for one in disks:
                assert len(one.loop.soon) <= MOST_PENDING
                one.loop.settle()
        if not step % LOOK:
            bases.clear()
            assert len(board.mmio.ranges()) <= 2
            assert all(len(one.open_now) <= VECTORS for one in lines)
            for slot in slots:
                board.write(slot, pci.PCI_BASE_ADDRESS_0, 0xC000_0000 + 0x10_0000 * slot)
                board.write(slot, pci.PCI_COMMAND, ON, 2)
    for one in disks:
        one.close()


def nvme_queues(random: Random, steps: int, routes: Any, _board: Any) -> None:
    """Commands of every kind with PRPs to everywhere, queues made and deleted, doorbells, resets amid it."""
    guest = NvmeGuest(routes())
    guest.enable()
    guest.make_queues()
    for step in range(1, steps + 1):
        which = random.randrange(16)
        if which < 10:
            queue = random.randrange(2)
            opcode = random.choice((*range(14), 0x14, 0x7C, random.randrange(256)))
            words = tuple(random.choice((0x70001, 0x30003, word(random, 32))) for _ in range(6))
            nsid = random.choice((1, 1, 1, 0, 0xFFFFFFFF))
            guest.put(
                queue,
                guest.command(
                    opcode,
                    nsid=nsid,
                    prp1=address(random),
                    prp2=address(random),
                    flags=random.choice((0, 0, 0, 0x40)),
                    cdw=words,
                ),
            )
            guest.ring(queue)
        elif which < 12:
            offset = random.choice((*range(0, 0x40, 4), *range(0x1000, 0x1018, 4), 0x2000, 0x200C, 0x2800))
            if offset != nvme.NVME_REG_CC or not random.randrange(10):
                guest.device.write(offset, random.choice((4, 8)), word(random, 32))
            guest.device.read(offset, 8)
        elif which < 14:
            gpa, raw = address(random), random.randbytes(random.randrange(1, 300))
            if guest.memory.contains(gpa, len(raw)):
                guest.memory.write(gpa, raw)
        elif which < 15:
            for bell in list(guest.bells.values()):
                bell()
        else:
            guest.disk.held = not random.randrange(3)
            if not guest.disk.held:
                guest.disk.release()
        if not step % 5:
            assert len(guest.loop.soon) <= MOST_PENDING + len(guest.disk.seen)
            guest.loop.settle()
            assert len(guest.disk.waiting) <= MAX_COMMANDS + 1
            assert len(guest.device.admin.events) <= 4
            assert len(guest.bells) <= guest.device.vectors
            guest.disk.seen.clear()
        if not step % LOOK:
            _nvme_recovers(guest)
    guest.close()


def _nvme_recovers(guest: NvmeGuest) -> None:
    guest.disk.held = False
    guest.disk.release()
    guest.loop.settle()
    guest.device.stop(lambda: None)
    guest.loop.settle()
    guest.device.reset()
    guest.device.moved(guest.device.function.bars[0], 0xC0000000)
    guest.device.start()
    guest.memory.zero(0, 2 * MIB)
    guest.heads, guest.phases, guest.tails = {0: 0, 1: 0}, {0: 1, 1: 1}, {0: 0, 1: 0}
    guest.enable()
    guest.make_queues()
    assert guest.io(nvme.NVME_CMD_WRITE, 3, prp1=DATA) == 0
    assert guest.io(nvme.NVME_CMD_READ, 3, prp1=DATA) == 0


def virtio_rings(random: Random, steps: int, routes: Any, _board: Any) -> None:
    """Descriptors, indirect tables, rings and requests that nobody sane makes, and registers between."""
    guest = VirtioGuest(routes())
    guest.enable()
    for step in range(1, steps + 1):
        which = random.randrange(-8, 16)
        if which < 0:  # one that can be, but for where its data are
            writes = bool(random.randrange(2))
            guest.header(random.choice((0, 1, 4, 8, 11, 13)), random.choice((0, 3, word(random))))
            data = address(random), random.choice((512, 4096, 48, 16)), writes
            guest.lay([(HEADERS, 16, False), data, (HEADERS + 16, 1, True)])
            guest.offer()
        elif which < 6:
            at = random.choice((DESCRIPTORS, TABLE)) + 16 * random.randrange(SIZE)
            length = random.choice((0, 1, 16, 17, 512, 4096, 16 * SIZE, 0xFFFFFFFF))
            raw = virtio.vring_desc.pack(
                address(random), length, random.randrange(8), random.randrange(SIZE + 1)
            )
            guest.memory.write(at, raw)
        elif which < 8:
            guest.memory.write(HEADERS, virtio.virtio_blk_outhdr.pack(random.randrange(16), word(random)))
        elif which < 13:
            guest.offer(random.randrange(SIZE), ring=bool(random.randrange(2)))
        elif which < 14:
            offset = random.choice((random.randrange(60), random.randrange(places.BAR.size - 8)))
            size = random.choice((1, 2, 4, 8))
            guest.device.read(offset, size)
            if offset != STATUS or not random.randrange(10):
                guest.device.write(offset, size, word(random, 8 * size))
        elif which < 15:
            gpa = random.choice((AVAILABLE, USED)) + random.randrange(6 + 8 * SIZE)
            guest.memory.write(gpa, random.randbytes(2))
        else:
            guest.disk.held = not random.randrange(3)
            if not guest.disk.held:
                guest.disk.release()
        if not step % 5:
            assert len(guest.loop.soon) <= MOST_PENDING + len(guest.disk.seen)
            guest.loop.settle()
            assert len(guest.disk.waiting) <= MAX_IN_FLIGHT
            guest.disk.seen.clear()
        if not step % 50 or guest.reg(STATUS, 1) & virtio.VIRTIO_CONFIG_S_NEEDS_RESET:
            guest.disk.held = False
            guest.disk.release()
            guest.loop.settle()
            guest.enable()
        if not step % LOOK:
            assert guest.do(virtio.VIRTIO_BLK_T_OUT, 3) == 0
            assert guest.do(virtio.VIRTIO_BLK_T_IN, 3, writes=True) == 0
    guest.close()


def fw_cfg_dma(random: Random, steps: int, _routes: Any, _board: Any) -> None:
    """Descriptors to everywhere, of every length, and what the guest says of its framebuffer looked at."""
    memory, bus, display = ram(), PortBus(), Ramfb()
    device = FirmwareFwCfg(2, 1 << 30, memory)
    device.attach(bus)
    device.add_writable(fw_cfg.RAMFB_FILE, 28, lambda: display.content, display.write)
    device.add_file("etc/abc", random.randbytes(5000))
    keys = (0, 1, 5, 0x19, 0x20, 0x20, 0x20, 0x21, 0x22)
    shown = 0
    for step in range(1, steps + 1):
        at = address(random)
        key = random.choice((*keys, random.getrandbits(16)))
        control = key << 16 | random.choice((0x08, 0x0A, 0x0C, 0x18, 0x18, random.getrandbits(5)))
        length = random.choice(
            (0, 1, 28, 28, random.randrange(64), random.randrange(3 * MIB), word(random, 32))
        )
        source = address(random)
        if memory.contains(source, 28):
            sizes = (random.choice((1, 5, 640, word(random, 32))) for _ in range(3))
            fourcc = int.from_bytes(random.choice((b"XR24", b"RG24", random.randbytes(4))), "little")
            memory.write(source, fw_cfg.RAMFBCfg.pack(address(random), fourcc, 0, *sizes))
        if memory.contains(at, 16):
            memory.write(at, fw_cfg.DMA_ACCESS.pack(control, length, source))
        for port, half in ((0x514, at >> 32), (0x518, at & 0xFFFFFFFF)):
            bus.write(port, 4, int.from_bytes(struct.pack(">I", half), "little"))
        bus.write(0x510, 2, random.getrandbits(16))
        bus.read(0x511, 1)
        assert len(display.content) == 28
        try:
            picture = display.picture(memory)
        except ValueError:
            pass
        else:
            shown += 1
            if picture.width * picture.height < 1 << 16:
                assert sum(map(len, picture.rows)) == 3 * picture.width * picture.height
        if not step % LOOK:
            device.load(device.save())
    assert shown or steps < 10 * LOOK
    memory.close()


class _Array:
    """A flash's bytes without a VM."""

    size = 3 * BLOCK

    def __init__(self) -> None:
        self.bytes = bytearray(self.size)
        self.shown = True

    def view(self) -> memoryview:
        return memoryview(self.bytes)

    def show(self, *, shown: bool) -> None:
        self.shown = shown


def flash(random: Random, steps: int, _routes: Any, _board: Any) -> None:
    """Commands in any order and half way through; what it holds stays as long as it is, and is saved."""
    array = _Array()
    device = Flash(array)
    commands = (0x10, 0x40, 0x20, 0xD0, 0xD0, 0x50, 0x70, 0x90, 0xFF, 0x00)
    for step in range(1, steps + 1):
        offset, size = random.randrange(array.size), random.choice((1, 2, 4, 8))
        device.write(offset, size, random.choice((*commands, random.getrandbits(8 * size))))
        if not array.shown:
            device.read(random.randrange(array.size), size)
        if not step % LOOK:
            assert len(array.bytes) == array.size
            device.load(device.save())
            device.reset()
            assert array.shown


STORMS: dict[str, Storm] = {
    "bars": bars,
    "nvme": nvme_queues,
    "virtio": virtio_rings,
    "fw_cfg": fw_cfg_dma,
    "flash": flash,
}
