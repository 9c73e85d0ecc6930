"""A hostile guest at a NIC: random steps of a driver that breaks any rule, and what must hold all the same.

Each page and each section that packets are made of is stamped with bytes of its own, so that a frame on the
wire shows whose bytes it has. Run by itself it replays a seed: `python tests/guests/netvsp_fuzz.py SEED`. One
thread.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Any

from netvsp_lan import ADDRESS, Lan

from hvkvm.abi import nvsp, rndis
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.ring import (
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    VM_PKT_DATA_USING_XFER_PAGES,
    VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    GpaRange,
    gpa_direct_header,
)
from hvkvm.abi.virtio_net_hdr import VnetHeader
from hvkvm.devices.synth.netvsp_channel import MAX_WAITING
from hvkvm.devices.synth.netvsp_receive import MAX_CONTROL_WAITING
from hvkvm.devices.synth.netvsp_send import HEADER_BYTES
from hvkvm.testing.netvsc_driver import PAGE, NetvscDriver, data_message
from hvkvm.testing.vmbus_client import GuestChannel

LENGTH = 250
"""Steps of a sequence: to make the bench costs as much as dozens of them."""
FAULTS = ("device failed", "service failed")
SECTION = 6144
PEER = bytes.fromhex("020000000001")
ODD = (0, 1, 7, 8, 36, 44, 255, 4096, 6144, 6145, 65535, 65536, 1 << 31, (1 << 32) - 8, (1 << 32) - 1)


class Fuzz:
    """One guest's life. `step` does one thing; AssertionError when a rule of the host is broken."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.net = Lan(queues=self.random.choice([1, 3]))
        self.loop = self.net.loop
        self.stamped = [self.loop.client.free_pages.pop() for _ in range(60)]
        self.control_page = self.loop.client.free_pages.pop()
        for pfn in self.stamped:
            self.loop.memory.write(pfn * PAGE, stamp(pfn, PAGE))
        self.free = list(self.loop.client.free_pages)
        self.posted: list[int] = []
        self.next = 1 << 20
        self.under_way: set[int] = set()
        """Pages and sections that packets name which the host may not have looked at."""
        self.anything = False
        self.allowed: list[bytes] = []
        """What each packet since the last look may have put on the wire, as one stretch of bytes."""
        self.life()

    def life(self) -> None:
        """A new connection of the guest, with a driver that has come some way."""
        random, loop = self.random, self.loop
        loop.client.free_pages = list(self.free)
        self.posted.clear()
        self.net.port.room = None
        self.net.port.waiting.clear()
        driver = self.driver = self.net.driver = NetvscDriver(loop, ring_pages=random.choice([2, 4, 16]))
        driver.strict = False
        if random.random() < 0.1:
            driver.open()
            return
        rsc, version = random.random() < 0.5, random.choice(nvsp.NVSP_VERSIONS[2:])
        driver.start(version, receive_pages=random.choice([64, 64, 600]), rsc=rsc)
        for index in range(len(driver.send_pages) * PAGE // SECTION):
            self.stamp_section(index)
        if self.net.queues > 1 and random.random() < 0.5 and version >= nvsp.NVSP_PROTOCOL_VERSION_5:
            driver.ask(nvsp.subchannel.pack(nvsp.NVSP_MSG5_TYPE_SUBCHANNEL, 1, 2))
            for index in (1, 2):
                driver.open_sub(index)
            driver.scale([random.randrange(3) for _ in range(128)], bytes(range(40)))

    def close(self) -> None:
        """Release the RAM."""
        self.loop.close()

    # Steps.

    def step(self) -> None:
        """Do one thing, let some of what follows happen, and look."""
        if self.driver.channel.rescinded and self.random.random() < 0.5:
            self.again()
        self.random.choices(_STEPS, cum_weights=_WEIGHTS)[0](self)
        for _ in range(self.random.choice([0, 1, 3, 1000])):
            if not self.loop.step():
                break
        self.look()

    def word(self) -> int:
        return self.random.choice(ODD) if self.random.random() < 0.6 else self.random.getrandbits(32)

    def channel(self) -> GuestChannel:
        return self.random.choice([self.driver.channel, *self.driver.subs.values()])

    def post(self, payload: bytes, **options: Any) -> None:
        """A packet, if there is room for it and a channel."""
        channel = self.channel()
        if channel.io is None or channel.rescinded:
            return
        ident = self.next
        self.next += 1
        header = options.get("header", b"")
        if channel.io.fits(len(payload), len(header)) and channel.io.send(
            payload, trans_id=ident, flags=VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED, **options
        ):
            self.posted.append(ident)

    def mutated(self, data: bytes, chance: float = 0.5) -> bytes:
        """Now and then with words that are wrong."""
        found = bytearray(data)
        while len(found) >= 4 and self.random.random() < chance:
            at = self.random.randrange(0, len(found) - 3, 4)
            found[at : at + 4] = self.word().to_bytes(4, "little")
        if self.random.random() < chance / 4:
            del found[self.random.randrange(len(found) + 1) :]
        return bytes(found)

    def message(self, body: bytes) -> bytes:
        """A data message of `body`, with marks that may make no sense, itself perhaps not either."""
        random = self.random
        infos = [
            (random.choice([0, 2, 6, 8, 1 << 31 | 1]), self.word())
            for _ in range(random.choice([0, 0, 1, 2, 3]))
        ]
        return self.mutated(data_message(body, infos, pad=random.choice([0, 4])), 0.08)

    def stamp_section(self, index: int) -> None:
        pages = self.driver.send_pages
        for at in range(index * SECTION, (index + 1) * SECTION, 2048):
            pfn, inside = pages[at // PAGE], at % PAGE
            self.loop.memory.write(pfn * PAGE + inside, stamp(0x5000 + index, 2048))

    def section(self) -> tuple[int, int, bytes]:
        """Messages in a section: its index, the bytes told, and what lies there."""
        index = self.random.randrange(len(self.driver.send_pages) * PAGE // SECTION)
        if index in self.under_way:
            return index, 0, b""
        self.under_way.add(index)
        self.stamp_section(index)
        data = b"".join(
            self.message(head() + stamp(0x5000 + index, self.random.choice([46, 100, 700])))
            for _ in range(self.random.choice([1, 1, 2, 5]))
        )[:SECTION]
        for at in range(0, len(data), 2048):
            place = index * SECTION + at
            self.loop.memory.write(
                self.driver.send_pages[place // PAGE] * PAGE + place % PAGE, data[at : at + 2048]
            )
        size = len(data) if self.random.random() < 0.95 else self.word()
        return index, size, (data + stamp(0x5000 + index, SECTION - len(data)))[:SECTION]

    def ranges(self, body: bytes, total: int) -> tuple[list[GpaRange], bytes]:
        """Stamped pages, `body` at the first one's beginning, `total` bytes: ranges, and what they hold."""
        free = [pfn for pfn in self.stamped if pfn not in self.under_way]
        pages = self.random.sample(free, min(20, len(free)))
        at, ranges, held = self.random.choice([0, 8, 2000, 4000]), [], []
        for pfn in pages:
            if not total:
                break
            self.under_way.add(pfn)
            self.loop.memory.write(pfn * PAGE, stamp(pfn, PAGE))
            self.loop.memory.write(pfn * PAGE + at, body[: PAGE - at])
            body = body[PAGE - at :]
            length = min(total, PAGE - at, self.random.choice([PAGE, PAGE, 1000]) if not body else PAGE)
            ranges.append(GpaRange(length, at, (pfn,)))
            held.append(self.loop.memory.read(pfn * PAGE + at, length))
            total -= length
            at = 0
        return ranges, b"".join(held)

    def send_section(self) -> None:
        if not self.driver.send_pages:
            return
        index, size, lies = self.section()
        if self.random.random() < 0.03:
            index = self.word()  # another section, of which the guest has the right to say so
            lies = b"".join(self.loop.memory.read(pfn * PAGE, PAGE) for pfn in self.driver.send_pages)
        self.allowed.append(lies)
        self.post(self.driver.rndis(nvsp.RMC_DATA, index, size))

    def send_pages(self) -> None:
        whole = b""
        index, size = nvsp.NETVSC_INVALID_INDEX, 0
        if self.driver.send_pages and self.random.random() < 0.3:
            index, size, whole = self.section()
            whole = whole[:size]
        rest = self.random.choice([0, 100, 1000, 1300])
        message = self.message(head() + stamp(9, rest))
        total = len(message) if self.random.random() < 0.9 else self.random.randrange(1, 60_000)
        ranges, held = self.ranges(message[: len(message) - rest], total)
        if not ranges:
            return
        header = gpa_direct_header(ranges)
        if self.random.random() < 0.1:
            header = self.mutated(header, 0.6)
            header += bytes(-len(header) % 8)
            self.anything = True  # it may name any page, of which the guest has the right to say so
        self.allowed.append(whole + held)
        kind = VM_PKT_DATA_USING_GPA_DIRECT
        self.post(self.driver.rndis(self.random.choice([0, 0, 0, 1]), index, size), kind=kind, header=header)

    def nvsp(self) -> None:
        random = self.random
        kinds = [1, 100, 101, 103, 104, 106, 107, 108, 125, 129, 133, 134, random.getrandbits(16)]
        payload = random.choice(kinds).to_bytes(4, "little")
        payload += b"".join(self.word().to_bytes(4, "little") for _ in range(random.choice([0, 1, 3, 9])))
        kind = random.choice(
            [VM_PKT_DATA_INBAND] * 8 + [VM_PKT_DATA_USING_XFER_PAGES, random.getrandbits(16)]
        )
        self.post(payload, kind=kind)

    def control(self) -> None:
        random = self.random
        kind = random.choice([2, 3, 4, 4, 4, 5, 5, 6, 8, random.getrandbits(32)])
        oid = random.choice(OIDS) if random.random() < 0.9 else random.getrandbits(32)
        size = random.choice([0, 4, 6, 28, 100, 200])
        data = random.randbytes(size)
        message = self.mutated(rndis.request.pack(kind, 28 + size, 5, oid, size, 20, 0) + data, 0.3)
        if not message:
            return
        pages = self.driver.put(message, pages=[self.control_page])
        index = nvsp.NETVSC_INVALID_INDEX
        payload = self.driver.rndis(nvsp.RMC_CONTROL, index, 0)
        self.post(payload, kind=VM_PKT_DATA_USING_GPA_DIRECT, header=gpa_direct_header(pages))

    def complete(self) -> None:
        """Completions for what was never sent, or was completed before."""
        channel = self.channel()
        if channel.io is not None and not channel.rescinded:
            ident = self.random.choice([self.random.randrange(1, 200), self.random.getrandbits(64)])
            channel.io.send(b"x" * 8, kind=VM_PKT_COMP, trans_id=ident)

    def hold(self) -> None:
        """The guest completes late, or all at once."""
        driver = self.driver
        driver.complete = not driver.complete
        held, driver.held = driver.held, []
        for channel, ident in held:
            if channel.io is not None and not channel.rescinded:
                channel.io.send(b"x" * 8, kind=VM_PKT_COMP, trans_id=ident)

    def inject(self) -> None:
        random = self.random
        frames = [
            head(ADDRESS) + stamp(3, random.choice([0, 46, 1000, 1486]))
            for _ in range(random.choice([1, 40]))
        ]
        header = VnetHeader(
            random.choice([0, 1, 2]), random.choice([0, 0, 1, 3, 4]), *(self.word() & 0xFFFF for _ in "1234")
        )
        self.net.port.inject(*frames, header=header.pack() if random.random() < 0.3 else bytes(12))

    def room(self) -> None:
        self.net.port.make_room(self.random.choice([0, 1, 20, None]))

    def link(self) -> None:
        self.loop.call_soon(self.net.nic.link, self.random.random() < 0.5)

    def tear(self) -> None:
        """A buffer goes, in use or not."""
        gpadl = self.random.choice([self.driver.receive_gpadl, self.driver.send_gpadl, 1])
        self.loop.client.post(wire.GPADL_TEARDOWN, relid=self.driver.channel.relid, gpadl=gpadl)

    def swap(self) -> None:
        if self.loop.host.server.reports.counts.get("channel broken"):
            return
        self.net.go_on_with_another()

    def again(self) -> None:
        """The guest contacts anew, whatever it was doing."""
        self.loop.run()
        self.look()
        self.life()

    # What must hold.

    def look(self) -> None:
        """Bounds, faults, and whose bytes are on the wire."""
        nic, port = self.net.nic, self.net.port
        counts = self.loop.host.server.reports.counts
        assert not any(kind in counts for kind in FAULTS), self.loop.host.snapshot()["ended"]
        assert nic.receive.pieces.lent <= max(nic.receive.sections, 0)
        assert len(nic.receive.waiting) <= MAX_CONTROL_WAITING
        for channel in nic._channels.values():
            assert channel.waiting <= MAX_WAITING + 64
            assert len(channel._owed) <= 2 * MAX_WAITING
        done = Counter(one for one, _ in self.driver.completions)
        assert all(done[ident] <= 1 for ident in self.posted), "a packet was completed twice"
        for _vnet, frame in port.sent:
            known = self.anything or any(made_of(frame, lies) for lies in self.allowed)
            assert known, f"whose bytes are these? {frame.hex()}"
        port.sent.clear()
        synic = self.loop.synic
        quiet = not (self.loop.deferred or synic.messages or synic.doorbells or synic.flags)
        if quiet and not any(channel.waiting for channel in nic._channels.values()):
            self.allowed.clear()
            self.under_way.clear()
            self.anything = False
        self.driver.received.clear()
        self.driver.came.clear()


STEPS: Sequence[tuple[Any, int]] = (
    (Fuzz.send_section, 20),
    (Fuzz.send_pages, 20),
    (Fuzz.nvsp, 2),
    (Fuzz.control, 6),
    (Fuzz.complete, 2),
    (Fuzz.hold, 2),
    (Fuzz.inject, 12),
    (Fuzz.room, 3),
    (Fuzz.link, 1),
    (Fuzz.tear, 1),
    (Fuzz.swap, 1),
    (Fuzz.again, 1),
)
_STEPS, _WEIGHTS = [one for one, _ in STEPS], list(accumulate(weight for _, weight in STEPS))
OIDS = [value for name, value in vars(rndis).items() if "OID_" in name]


def head(to: bytes = PEER) -> bytes:
    """The front of a TCP frame, so that marks have something to be about."""
    ip = bytes.fromhex("4500004000004000400600000a0000010a000002")
    tcp = bytes.fromhex("03e807d0000000010000000250180200abcd0000")
    return to + ADDRESS + b"\x08\0" + ip + tcp


def stamp(number: int, size: int) -> bytes:
    """Bytes that tell where they come from."""
    return (number.to_bytes(2, "little") * (size // 2 + 1))[:size]


def made_of(frame: bytes, lies: bytes) -> bool:
    """Whether a frame is one stretch of `lies`, but for headers that a NIC may put right, and a tag."""
    if frame in lies:
        return True
    return any(
        (len(frame) > HEADER_BYTES and frame[HEADER_BYTES + tag :] in lies)
        or (len(frame) <= HEADER_BYTES + tag and frame[74:] in lies)
        for tag in (0, 4)
    )


def fuzz(seed: int, length: int = LENGTH) -> int:
    """One sequence; how many steps it was. What fails is raised with its seed."""
    bench = Fuzz(seed)
    done = 0
    try:
        for _ in range(length):
            bench.step()
            done += 1
        bench.loop.run()
        bench.look()
        bench.life()  # whatever was before, the next connection has a NIC
        assert bench.driver.channel.io is not None
    except Exception as error:
        error.add_note(f"seed {seed}, step {done}")
        raise
    finally:
        bench.close()
    return done


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1])))
