"""A guest that sends anything: one answer each, memory and disk are kept to, and the device lives."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storvsp_bench import DISK_BYTES, Bench

from hvkvm.abi import scsi, vmbus
from hvkvm.abi import storvsp as wire
from hvkvm.abi import vmbus_messages as messages
from hvkvm.abi.ring import (
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    VM_PKT_DATA_USING_XFER_PAGES,
    GpaRange,
    gpa_direct_header,
)
from hvkvm.abi.storvsp import Srb
from hvkvm.testing.storvsc_driver import PAGE, StorvscDriver

STEPS = int(os.environ.get("HVKVM_STORVSP_STEPS", "1500"))
SEED = os.environ.get("HVKVM_STORVSP_SEED", "")
OURS = range(900, 980)
"""Pages that the guest names; it also names others, that are no RAM."""
CANARIES = range(990, 1000)

KINDS = (*(VM_PKT_DATA_USING_GPA_DIRECT,) * 8, VM_PKT_DATA_INBAND, VM_PKT_DATA_USING_XFER_PAGES, 77)
CDBS = (
    scsi.READ_10,
    scsi.WRITE_10,
    scsi.READ_16,
    scsi.WRITE_SAME_16,
    scsi.UNMAP,
    scsi.INQUIRY,
    scsi.MODE_SENSE_10,
    scsi.MODE_SELECT_10,
    scsi.REPORT_LUNS,
    scsi.SYNCHRONIZE_CACHE,
    scsi.VERIFY_16,
)


class Hostile:
    """A guest on a controller of two disks, the second read-only to it by agreement of this test."""

    def __init__(self, folder: Any, random: Random, *, sub_channels: int = 2, now: bool = False) -> None:
        self.random = random
        self.bench = Bench(folder, disks=2, seed=random.randrange(1 << 30), now=now)
        self.loop = self.bench.loop
        self.memory = self.loop.memory
        self.sub_channels = sub_channels
        for pfn in CANARIES:
            self.memory.write(pfn * PAGE, b"\xc5" * PAGE)
        self.connect()

    def connect(self) -> None:
        self.loop.client.free_pages = list(range(64, 700))
        self.loop.connect(vmbus.VERSION_WIN10_V5_3)
        self.driver = StorvscDriver(self.loop, self.bench.device.offer.instance, ring_pages=6)
        self.driver.shake_hands(sub_channels=self.sub_channels)
        self.asked: set[int] = set()
        self.next = 1 << 20

    def pages(self, count: int) -> tuple[int, ...]:
        odd = (1 << 40, (1 << 52) - 1, 1024, 0xFFFFF)
        return tuple(
            self.random.choice(odd) if self.random.random() < 0.03 else self.random.choice(OURS)
            for _ in range(count)
        )

    def ranges(self) -> bytes:
        """A GPA-direct header that is mostly right."""
        if self.random.random() < 0.1:
            return self.random.randbytes(8 * self.random.randrange(6))
        ranges = []
        for _ in range(1 if self.random.random() < 0.9 else self.random.randrange(4)):
            length, offset = (
                self.random.choice((1, 24, 511, 512, 4096, 20000, 80000)),
                self.random.randrange(4096),
            )
            need = (length + offset + PAGE - 1) // PAGE
            if self.random.random() < 0.05:
                need, length = max(1, need - 1), self.random.choice((length, 0xFFFFFFFF))
            ranges.append(GpaRange(length, offset, self.pages(need)))
        return gpa_direct_header(ranges)

    def payload(self) -> bytes:
        """An EXECUTE_SRB that is mostly right, or anything."""
        random = self.random
        kind = random.random()
        if kind < 0.06:
            return random.randbytes(random.choice((0, 4, 12, 63, 64, 64, 64, 65, 200)))
        if kind < 0.12:
            operation = random.choice((*wire.OPERATIONS, 0, 99))
            return wire.ask(operation, random.randbytes(random.randrange(53)))
        cdb = bytearray(random.randbytes(16))
        if random.random() < 0.9:
            cdb[0] = random.choice(CDBS)
            cdb[2:8] = random.randrange(DISK_BYTES // 512 + 2).to_bytes(6, "big")
            if cdb[0] in (scsi.READ_10, scsi.WRITE_10):
                cdb[1:10] = bytes(9)
                cdb[2:6] = random.randrange(DISK_BYTES // 512 + 2).to_bytes(4, "big")
                cdb[8] = random.choice((1, 1, 8, 8, random.randrange(12))) if random.random() < 0.8 else 128
        srb = Srb(
            random.choice((0, 0, 0, 0, 0, 1, 255)),
            random.choice((0, 0, 0, 0, 1, 255)),
            0 if random.random() < 0.9 else random.randrange(256),
            bytes(cdb[: random.choice((0, 6, 10, 12, 16, 16, 16))]),
            random.choice((0, 1, 1, 1, 2, 77)),
            random.choice((0, 1, 24, 512, 512, 4096, 8192, 65536, 0xFFFFFFFF)),
            random.randrange(256),
        )
        raw = bytearray(wire.request(srb))
        if random.random() < 0.1:
            raw[random.randrange(12, 64)] = random.randrange(256)
        return bytes(raw)

    def shoot(self) -> None:
        random, trans_id = self.random, self.next
        self.next += 1
        kind = random.choice(KINDS)
        header = random.randbytes(8 * random.randrange(3))
        if kind == VM_PKT_DATA_USING_GPA_DIRECT:
            header = self.ranges()
        wants = random.random() < 0.95
        channel = random.choice(self.driver.channels)
        if (
            channel.opened.send(self.payload(), kind=kind, trans_id=trans_id, flags=int(wants), header=header)
            and wants
        ):
            self.asked.add(trans_id)

    def step(self) -> None:
        random = self.random
        self.bench.workers.held = random.random() < 0.3
        if not self.bench.workers.held:
            self.bench.workers.release()
        for _ in range(random.randrange(12)):
            self.shoot()
        for _ in range(random.randrange(40)):
            self.loop.step()
        if random.random() < 0.01:
            self.leave()

    def leave(self) -> None:
        """Close, or begin anew, with requests in flight; the pages are torn down under them."""
        if self.random.random() < 0.5:
            for channel in reversed(self.driver.channels):
                self.loop.client.close(channel)
        self.settle(all_answered=False)
        self.connect()

    def settle(self, *, all_answered: bool = True) -> None:
        self.bench.workers.held = False
        self.bench.workers.release()
        self.loop.run()
        while self.bench.workers.jobs:
            self.bench.workers.release()
            self.loop.run()
        self.driver.collect()
        if all_answered:
            missing = self.asked - set(self.driver.answers)
            assert not missing, sorted(missing)[:5]
            extra = set(self.driver.answers) - self.asked
            assert all(one < 1 << 20 or one > 1 << 60 for one in extra), "an answer that nobody asked for"

    def check(self) -> None:
        """What holds whatever the guest did."""
        self.settle()
        host = self.loop.host
        assert host.snapshot()["ended"] == {}
        told = [event.text for event in self.loop.notes.events if "failed" in event.text]  # type: ignore[union-attr]
        assert told == []
        for pfn in CANARIES:
            assert self.memory.read(pfn * PAGE, PAGE) == b"\xc5" * PAGE
        assert all(path.stat().st_size == DISK_BYTES for path in self.bench.paths)
        assert all(channel.in_flight.count == 0 for channel in self.bench.device._channels.values())
        self.driver.shake_hands()  # it may have begun anew, and stopped half-way
        while self.driver.execute(bytes(6)).srb_status != wire.SRB_STATUS_SUCCESS:
            pass  # unit attentions

    def close(self) -> None:
        self.bench.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_storm(tmp_path: Any, seed: int) -> None:
    hostile = Hostile(tmp_path, Random(f"{SEED}{seed}"), now=seed % 2 == 1)
    try:
        for step in range(STEPS // 6):
            hostile.step()
            if step % 100 == 99:
                hostile.check()
        hostile.check()
    finally:
        hostile.close()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_have_one_answer(tmp_path: Any, data: st.DataObject) -> None:
    hostile = Hostile(tmp_path, Random(0), sub_channels=0)
    try:
        io = hostile.driver.primary.opened
        for number in range(data.draw(st.integers(1, 10))):
            head = wire.EXECUTE_SRB.to_bytes(4, "little") if data.draw(st.booleans()) else b""
            payload = head + data.draw(st.binary(max_size=80))
            header = data.draw(st.binary(max_size=10)) * 8
            kind = data.draw(st.sampled_from((VM_PKT_DATA_INBAND, VM_PKT_DATA_USING_GPA_DIRECT)))
            assert io.send(payload, kind=kind, trans_id=1000 + number, flags=1, header=header)
            hostile.asked.add(1000 + number)
        hostile.settle()
        phase = hostile.bench.device.phase
        if phase.value == "ready":
            hostile.check()
    finally:
        hostile.close()


def test_a_guest_that_asks_without_reading_makes_nothing_grow(tmp_path: Any) -> None:
    hostile = Hostile(tmp_path, Random(5))
    try:
        for channel in hostile.driver.channels:
            channel.on_interrupt = lambda: None
        for _ in range(300):
            for _ in range(40):
                hostile.shoot()
            hostile.loop.run()
        for channel in hostile.bench.device._channels.values():
            assert len(channel._done) + channel.in_flight.count <= 1024
        hostile.loop.client.post(messages.UNLOAD)
        hostile.loop.run()
        assert hostile.bench.device.inspect()["channels"] == 0
    finally:
        hostile.close()
