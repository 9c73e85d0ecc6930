"""What a NIC is to its wire and a wire to its NIC: batches of frames, room both ways, link state.

A `Port` is the wire's end (a tap, a socket, passt ...), a `Receiver` the NIC. All of it runs on the I/O loop,
and a call is bounded work. Three rules keep both simple:

- A port calls its receiver from turns of its own, never from inside a call that the receiver makes.
- A receiver calls `send`, `resume` and `set_offloads` from turns of its own, never from inside a call of the
  port.
- Whoever took fewer frames than it was given says later that there is room again: once, and it may come too
  often, never too seldom. Who was refused keeps what was not taken, in order, and offers it then.

Frames. A frame's first view is its vnet header, exactly the 12 bytes of `abi.virtio_net_hdr`; the views
behind it, at least one and none of them empty, are the Ethernet frame from the destination address to the end
of the payload, without FCS. A VLAN tag stands in the frame. The bytes are the caller's again when the call
returns. IP packets are whole whatever the header leaves to the other side: total length (IPv4) and payload
length (IPv6) are those of the whole packet, the IPv4 header's checksum is right, and where NEEDS_CSUM is set
the field holds the pseudo-header's sum of the whole packet's length, as virtio has it. (Linux's hv_netvsc
hands over a packet to be segmented with these lengths 0: its NIC puts them right.) A NIC believes nothing of
what a frame holds, nor does a port.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hvkvm.abi.virtio_net_hdr import VIRTIO_NET_HDR_BYTES
from hvkvm.tuples import NamedTuple

Frame = Sequence[memoryview]
"""The vnet header, then the bytes of an Ethernet frame."""

ETHERNET_BYTES = 14
VLAN_BYTES = 4
MIN_MTU = 68
"""RFC 791: what every IPv4 link carries."""
MAX_MTU = 65521
"""Such that a frame has at most 65535 bytes, which is also what a tap takes at once."""
MAX_QUEUES = 8
"""Most channels that a NIC has."""
MAX_FRAME_BYTES = 65535 + ETHERNET_BYTES + VLAN_BYTES
"""Most bytes of a frame, the vnet header not counted: a whole IP packet, to be segmented, with a VLAN tag."""


class Offloads(NamedTuple):
    """What a side accepts undone: checksums, and TCP packets longer than the MTU.

    Segmentation goes with checksums only: `tso4` or `tso6` without `csum` counts as not there.
    """

    csum: bool = False
    tso4: bool = False
    tso6: bool = False

    def within(self, other: Offloads) -> Offloads:
        """What both have."""
        csum = self.csum and other.csum
        return Offloads(csum, csum and self.tso4 and other.tso4, csum and self.tso6 and other.tso6)


NO_OFFLOADS = Offloads()
ALL_OFFLOADS = Offloads(True, True, True)


class Receiver(Protocol):
    """The NIC's end."""

    def frames(self, frames: Sequence[Frame]) -> int:
        """Take frames for the guest; how many were taken. Fewer: no room, and `Port.resume` comes later.

        A frame that the guest is not to have (filtered, too long, its NIC down) is taken and dropped.
        """
        ...

    def writable(self) -> None:
        """The port has room again, after `send` took fewer than it was given."""
        ...

    def link(self, up: bool) -> None:
        """The wire carries frames, or not. Comes on every change, and first inside a turn after `start`."""
        ...


class Port(Protocol):
    """A backend. Until the first `link(True)` the wire is down; frames sent then are taken and dropped."""

    kind: str
    """"tap", "user", ...: the word of `--net`."""
    offloads: Offloads
    """What `send` accepts, and the most that frames for the guest may need. Constant."""
    mtu: int
    """Bytes of the longest IP packet on the wire, the Ethernet header not counted. Constant."""

    @property
    def statistics(self) -> Statistics:
        """What went over it so far."""
        ...

    def attach(self, receiver: Receiver) -> None:
        """Whose frames are ours. Once, before `start`."""
        ...

    def start(self) -> None:
        """Call the receiver from now on. Also after `stop`."""
        ...

    def stop(self, done: Callable[[], object]) -> None:
        """Call the receiver no more, and `done()` when that is so: at once, or in a later turn."""
        ...

    def close(self) -> None:
        """Give back everything that was made on the host. Idempotent; on the loop or after its end.

        On the loop nothing is waited for: see `when_closed`.
        """
        ...

    def when_closed(self, done: Callable[[], object]) -> None:
        """Call `done()` when all of that is gone from the host: at once, or in a later turn. On the loop."""
        ...

    def send(self, frames: Sequence[Frame], queue: int = 0) -> int:
        """Take frames of the guest; how many were taken. Fewer: `Receiver.writable` comes later.

        `queue` is the channel of the NIC that they came by, from 0: a port that has several queues itself
        keeps them apart, and may have room in one while another has none.

        A frame that cannot be carried (too short or long, or lying about its offloads) is taken and counted
        as dropped. Never raises for what a frame holds.
        """
        ...

    def resume(self) -> None:
        """The receiver has room again."""
        ...

    def set_offloads(self, wanted: Offloads) -> None:
        """What frames for the guest may leave undone from now on: `wanted` within `offloads`.

        Nothing before the first call. Frames on their way may still need more than a later call says.
        """
        ...

    def inspect(self) -> Mapping[str, object]:
        """For `hvkvm ctl`; any thread."""
        ...


class Statistics:
    """What went over a port, the guest's view: `received` is what the NIC took. Vnet headers do not count."""

    sent_frames: int = 0
    sent_bytes: int = 0
    sent_dropped: int = 0
    """Frames of the guest that the port took and could not carry."""
    received_frames: int = 0
    received_bytes: int = 0
    received_dropped: int = 0
    """Frames for the guest that the port dropped; not those that a tap's or a peer's own queue dropped."""
    send_waits: int = 0
    """Times that the port had no room."""
    receive_waits: int = 0
    """Times that the receiver had no room."""

    def as_dict(self) -> dict[str, int]:
        """For `inspect`."""
        return {name: getattr(self, name) for name in type(self).__annotations__}


def frame_bytes(frame: Frame) -> int:
    """Bytes of the Ethernet frame, the vnet header not counted."""
    return len(frame[1]) if len(frame) == 2 else sum(map(len, frame)) - VIRTIO_NET_HDR_BYTES
