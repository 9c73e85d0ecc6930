"""Guests that write to a disk on NVMe by their own exits, for ever: to be killed. See `forked_vmm.py`.

    nvme_writer.py

Each line of input is an image, a tab and a seed. What is written follows from it (`stable_writes.py`), and
"stable 0 BATCH" says that a batch and all before it are stable. While one batch is flushed, the writes of
the next are in flight.
"""

from __future__ import annotations

import struct
from itertools import count

from forked_vmm import SECONDS, say, serve
from guest_machine import Guest
from nvme_driver import IO_CQ, IO_SQ, Driver
from stable_writes import BLOCK, MOST_BLOCKS, MOST_WRITES, SECTOR, Range, batches, stamp

from hvkvm.abi import nvme
from hvkvm.machine.disk_spec import DiskSpec

ENTRIES = 32
FLUSH = 0xFFFF
MEMORY = 32 << 20
"""Where the data of two batches lies: for each write a page of addresses, or of a range, and its blocks."""
STEP = (1 + MOST_BLOCKS) * BLOCK


class Writer(Driver):
    """The driver, with a longer queue for its writes."""

    def make_long_queues(self) -> None:
        size = (ENTRIES - 1) << 16 | 1
        assert self.do(0, nvme.NVME_ADMIN_CREATE_CQ, prp1=IO_CQ, cdw=(size, 1)) == 0
        assert self.do(0, nvme.NVME_ADMIN_CREATE_SQ, prp1=IO_SQ, cdw=(size, 1 << 16 | 1)) == 0
        self.tail = self.head = 0
        self.phase = 1
        self.in_flight: set[int] = set()

    def submit(self, op: int, id_: int, prp1: int = 0, prp2: int = 0, cdw: tuple[int, ...] = ()) -> None:
        words = (*cdw, *[0] * (6 - len(cdw)))
        raw = struct.pack("<BBHI8xQQQ6I", op, 0, id_, 1, 0, prp1, prp2, *words)
        self.guest.machine.memory.write(IO_SQ + 64 * self.tail, raw)
        self.tail = (self.tail + 1) % ENTRIES
        self.in_flight.add(id_)

    def begin_batch(self, number: int, ranges: list[Range], generation: int) -> set[int]:
        """Submit all of it; the commands' ids."""
        memory, ids = self.guest.machine.memory, set()
        for index, (first, blocks, discard) in enumerate(ranges):
            id_ = (number & 1) * MOST_WRITES + index
            at = MEMORY + id_ * STEP
            ids.add(id_)
            if discard:
                memory.write(at, nvme.DSM_RANGE.pack(0, blocks * 8, first * 8))
                self.submit(nvme.NVME_CMD_DSM, id_, at, 0, (0, nvme.NVME_DSMGMT_AD))
                continue
            pages = [at + BLOCK * (1 + n) for n in range(blocks)]
            for n, page in enumerate(pages):
                memory.write(page, stamp(first + n, generation) * (BLOCK // SECTOR))
            memory.write(at, struct.pack(f"<{blocks}Q", *pages[1:], 0))
            second = at if blocks > 2 else pages[-1] if blocks == 2 else 0
            self.submit(nvme.NVME_CMD_WRITE, id_, pages[0], second, (first * 8, 0, blocks * 8 - 1))
        self.ring()
        return ids

    def ring(self) -> None:
        self.reg(nvme.NVME_REG_DBS + 8, self.tail)

    def wait_for(self, ids: set[int]) -> None:
        memory = self.guest.machine.memory
        while ids & self.in_flight:
            at, phase = IO_CQ + 16 * self.head + 12, self.phase
            self.guest.until(lambda at=at, phase=phase: memory.read_u32(at) >> 16 & 1 == phase, "an answer")
            word = memory.read_u32(at)
            if word >> 17:
                say(f"complaint: command {word & 0xFFFF} ended with {word >> 17:#x}\n".encode())
            self.in_flight.remove(word & 0xFFFF)
            self.head = (self.head + 1) % ENTRIES
            self.phase ^= not self.head
            self.reg(nvme.NVME_REG_DBS + 12, self.head)


def write(image: str, seed: str) -> None:
    disks = (DiskSpec(image, bus="nvme"),)
    guest = Guest(hv="none", synic="auto", disks=disks, timeout=SECONDS).start()
    driver = Writer(guest)
    driver.enable()
    driver.make_long_queues()
    made = batches(int(seed))
    ids = driver.begin_batch(1, next(made), int(seed) << 32 | 1)
    for number in count(1):
        following = driver.begin_batch(number + 1, next(made), int(seed) << 32 | number + 1)
        driver.wait_for(ids)
        driver.submit(nvme.NVME_CMD_FLUSH, FLUSH)
        driver.ring()
        driver.wait_for({FLUSH})
        say(f"stable 0 {number}\n".encode())
        ids = following


if __name__ == "__main__":
    serve(write)
