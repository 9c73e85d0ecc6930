"""The guest's driver of an integration component, in the loopback: answers as Linux's hv_utils does.

Why: each component's test wants to be asked, and to answer rightly, wrongly, late
or not at all. For tests; one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack, unpack_from

from hvkvm.abi import ic, vmbus
from hvkvm.abi.ring import Packet
from hvkvm.devices.synth.ic import IntegrationComponent
from hvkvm.testing.vmbus_loopback import Loopback

Answer = tuple[int, bytes | None]
"""An HRESULT, and what replaces the front of the request's body (None: nothing)."""


class IcDriver:
    """Connects to the bus and opens the device's channel; `negotiate` and the rest are the test's."""

    def __init__(
        self,
        loop: Loopback,
        device: IntegrationComponent,
        version: ic.Version = (3, 0),
        *,
        in_pages: int = 4,
    ) -> None:
        self.loop = loop
        self.in_pages = in_pages
        loop.host.add(device)
        loop.connect(vmbus.VERSION_WIN10_V5_3)
        self.channel = loop.client.by_interface(device.INTERFACE)
        self.version = version
        self.packets: list[Packet] = []
        self.open()

    def open(self) -> None:
        """Open the channel, with the rings that Linux gives it unless the test said otherwise."""
        self.loop.open(self.channel, out_pages=4, in_pages=self.in_pages)

    def close(self) -> None:
        """Close the channel, whatever is unanswered."""
        self.loop.client.close(self.channel)
        self.loop.run()
        self.channel.received.clear()

    def requests(self) -> list[bytes]:
        """What has come, unanswered."""
        packets, self.channel.received = self.channel.received, []
        self.packets = packets
        return [packet.payload for packet in packets]

    def answer(self, payload: bytes, body: bytes | None = None, status: int = 0) -> None:
        """Answer the request last taken: the same bytes, changed."""
        changed = bytearray(payload)
        changed[20:24] = pack("<I", status)
        changed[25] = ic.ICMSGHDRFLAG_TRANSACTION | ic.ICMSGHDRFLAG_RESPONSE
        if body is not None:
            changed[ic.ICMSG_HDR : ic.ICMSG_HDR + len(body)] = body
        self.answer_raw(bytes(changed))

    def answer_raw(self, payload: bytes) -> None:
        """Answer the request last taken by these bytes."""
        self.channel.opened.send(payload, trans_id=self.packets[-1].trans_id)
        self.loop.run()

    def serve(self, daemon: Callable[[bytes], Answer], limit: int = 10_000) -> int:
        """Have `daemon(body)` answer all that comes; how many. AssertionError if it never ends."""
        self.loop.run()
        for count in range(limit):
            requests = self.requests()
            if not requests:
                return count
            (payload,) = requests  # never two at a time
            status, body = daemon(payload[ic.ICMSG_HDR :])
            self.answer(payload, body, status)
        raise AssertionError(f"more than {limit} requests")

    def negotiate(self, counts: tuple[int, int] = (1, 1)) -> None:
        """Take the host's NEGOTIATE and choose frame 3.0 and `version`."""
        (payload,) = self.requests()
        assert unpack_from("<H", payload, 12) == (ic.ICMSGTYPE_NEGOTIATE,)
        frames, messages = unpack_from("<HH", payload, 28)
        assert len(payload) >= 36 + 4 * (frames + messages)
        self.answer(payload, pack("<HHIHHHH", *counts, 0, 3, 0, *self.version))
