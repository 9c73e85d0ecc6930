"""The guest's driver of a storage controller, in the loopback: speaks as Linux's hv_storvsc does.

Why: a test wants to send any request on any channel, right or wrong, and to see every
completion. Data lies in pages of the loopback's RAM. For tests; one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvkvm.abi import storvsp as wire
from hvkvm.abi import vmbus
from hvkvm.abi.ring import (
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    GpaRange,
    Packet,
    gpa_direct_header,
)
from hvkvm.abi.storvsp import Answer, Srb
from hvkvm.testing.vmbus_client import GuestChannel
from hvkvm.testing.vmbus_loopback import Loopback

PAGE = vmbus.HV_HYP_PAGE_SIZE
INIT_ID = 0xFFFFFFFFFFFFFFFD
RESET_ID = 0xFFFFFFFFFFFFFFFC


class StorvscDriver:
    """On a connected `loop` that has the controller with this `instance`; opens its channel."""

    def __init__(self, loop: Loopback, instance: bytes, *, ring_pages: int = 4) -> None:
        self.loop = loop
        self.ring_pages = ring_pages
        self.instance = instance
        found = [c for c in loop.client.offers.values() if c.offer["instance"] == instance]
        self.primary: GuestChannel = next(c for c in found if not c.offer["sub_channel_index"])
        self.answers: dict[int, bytes] = {}
        """By trans_id, the payload of each completion."""
        self.notices: list[int] = []
        """Operations that the host has sent by itself."""
        self.sub_channels = 0
        """How many the host has said it can have."""
        self._next = 1
        self.open(self.primary)

    def open(self, channel: GuestChannel) -> None:
        """Open a channel of it."""
        self.loop.open(channel, out_pages=self.ring_pages, in_pages=self.ring_pages)

    @property
    def subs(self) -> list[GuestChannel]:
        """Its sub-channels that are offered now."""
        return [
            c
            for c in self.loop.client.offers.values()
            if c.offer["instance"] == self.instance and c.offer["sub_channel_index"] and not c.rescinded
        ]

    @property
    def channels(self) -> list[GuestChannel]:
        """All that are open."""
        return [c for c in (self.primary, *self.subs) if c.io is not None]

    def collect(self) -> None:
        """Take what the host has sent. AssertionError for a completion that came twice."""
        for channel in (self.primary, *self.subs):
            packets, channel.received = channel.received, []
            for packet in packets:
                self._sort(packet)

    def _sort(self, packet: Packet) -> None:
        assert len(packet.payload) == wire.PACKET_BYTES
        operation = wire.operation_of(packet.payload)
        if operation != wire.COMPLETE_IO:
            assert (packet.type, packet.trans_id) == (VM_PKT_DATA_INBAND, 0)
            self.notices.append(operation)
            return
        assert packet.trans_id not in self.answers, f"request {packet.trans_id:#x} was answered twice"
        self.answers[packet.trans_id] = packet.payload

    def send(
        self,
        payload: bytes,
        trans_id: int,
        *,
        ranges: Sequence[GpaRange] = (),
        channel: GuestChannel | None = None,
        flags: int = VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED,
    ) -> bool:
        """Put one packet; False if the ring is full."""
        kind = VM_PKT_DATA_USING_GPA_DIRECT if ranges else VM_PKT_DATA_INBAND
        header = gpa_direct_header(list(ranges)) if ranges else b""
        io = (channel or self.primary).opened
        return io.send(payload, kind=kind, trans_id=trans_id, flags=flags, header=header)

    def control(self, operation: int, body: bytes = b"", *, trans_id: int = INIT_ID) -> tuple[int, bytes]:
        """Ask for anything but I/O and wait: the status, and what follows it."""
        self.answers.pop(trans_id, None)
        assert self.send(wire.ask(operation, body), trans_id)
        self.loop.run()
        self.collect()
        answer = self.answers.pop(trans_id)
        return int.from_bytes(answer[8:12], "little"), answer[12:]

    def shake_hands(self, version: int = wire.VERSION_WIN10, sub_channels: int = 0) -> None:
        """As Linux does at probe. AssertionError if anything is refused."""
        assert self.control(wire.BEGIN_INITIALIZATION)[0] == 0
        assert self.control(wire.QUERY_PROTOCOL_VERSION, wire.version_body(version))[0] == 0
        status, body = self.control(wire.QUERY_PROPERTIES)
        assert status == 0
        self.sub_channels = int.from_bytes(body[4:6], "little")
        assert self.control(wire.END_INITIALIZATION)[0] == 0
        if sub_channels:
            body = wire.count_body(sub_channels)
            assert self.control(wire.CREATE_SUB_CHANNELS, body)[0] == 0
            assert len(self.subs) == sub_channels
            for sub in self.subs:
                self.open(sub)

    def begin(
        self,
        cdb: bytes,
        *,
        pages: Sequence[int] = (),
        length: int = 0,
        offset: int = 0,
        data_in: int = wire.READ_TYPE,
        target: int = 0,
        lun: int = 0,
        path: int = 0,
        channel: GuestChannel | None = None,
    ) -> int:
        """Send a SCSI request whose data lies in `pages`; its trans_id. AssertionError for a full ring."""
        trans_id, self._next = self._next, self._next + 1
        kind = data_in if length else wire.UNKNOWN_TYPE
        payload = wire.request(Srb(path, target, lun, cdb, kind, length, 0))
        ranges = [GpaRange(length, offset, tuple(pages))] if length else []
        assert self.send(payload, trans_id, ranges=ranges, channel=channel)
        return trans_id

    def finished(self, trans_id: int) -> Answer | None:
        """The completion of a request; None while there is none."""
        self.collect()
        payload = self.answers.get(trans_id)
        return None if payload is None else wire.parse_answer(payload)

    def execute(self, cdb: bytes, **options: Any) -> Answer:
        """Send, let everything happen, take the completion."""
        trans_id = self.begin(cdb, **options)
        self.loop.run()
        answer = self.finished(trans_id)
        assert answer is not None, f"{cdb.hex()} was not answered"
        del self.answers[trans_id]
        return answer
