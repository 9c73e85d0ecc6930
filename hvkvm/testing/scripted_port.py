"""A port whose wire is a test: it keeps what the NIC sends, and gives the NIC what the test says.

Why: a NIC's tests want a wire that is full, slow, or sends nonsense, at a moment of their choosing.
`call_soon` is the I/O loop's, or a loopback's, since a port calls its receiver from turns of its own. For
tests; one thread, or the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvkvm.abi.virtio_net_hdr import PLAIN, VIRTIO_NET_HDR_BYTES
from hvkvm.net.port import ALL_OFFLOADS, Frame, Offloads, Receiver, Statistics


class ScriptedPort:
    """A `net.port.Port`. `sent` has a copy of each frame: its vnet header, and its bytes."""

    kind = "scripted"

    def __init__(
        self, call_soon: Callable[..., object], *, offloads: Offloads = ALL_OFFLOADS, mtu: int = 1500
    ) -> None:
        self.offloads = offloads
        self.mtu = mtu
        self.statistics = Statistics()
        self.sent: list[tuple[bytes, bytes]] = []
        self.queues: list[int] = []
        """The queue that each call of `send` named."""
        self.batches: list[int] = []
        """How many frames each call of `send` had."""
        self.room: int | None = None
        """How many more frames are taken; None for any number."""
        self.wanted: list[Offloads] = []
        """What `set_offloads` was told."""
        self.on_send: Callable[[bytes, bytes], object] | None = None
        self.waiting: list[Frame] = []
        """Frames for the guest that it has had no room for."""
        self.resumed = 0
        self._call_soon = call_soon
        self._receiver: Receiver | None = None

    @property
    def receiver(self) -> Receiver:
        """The NIC. AssertionError before `attach`."""
        assert self._receiver is not None
        return self._receiver

    def attach(self, receiver: Receiver) -> None:
        """See `net.port.Port`."""
        self._receiver = receiver

    def start(self) -> None:
        """See `net.port.Port`: the link comes up."""
        self._call_soon(self.receiver.link, True)

    def stop(self, done: Callable[[], object]) -> None:
        """See `net.port.Port`."""
        done()

    def close(self) -> None:
        """See `net.port.Port`."""

    def send(self, frames: Sequence[Frame], queue: int = 0) -> int:
        """See `net.port.Port`."""
        self.queues.append(queue)
        taken = len(frames) if self.room is None else min(self.room, len(frames))
        self.batches.append(len(frames))
        for frame in frames[:taken]:
            assert len(frame[0]) == VIRTIO_NET_HDR_BYTES
            assert len(frame) > 1
            assert all(len(view) for view in frame)
            copy = bytes(frame[0]), b"".join(frame[1:])
            self.sent.append(copy)
            if self.on_send is not None:
                self.on_send(*copy)
        if self.room is not None:
            self.room -= taken
        return taken

    def make_room(self, frames: int | None) -> None:
        """The wire takes so many more, and says so."""
        self.room = frames
        self._call_soon(self.receiver.writable)

    def inject(self, *frames: bytes, header: bytes = PLAIN) -> None:
        """Frames for the guest, in a turn of their own."""
        self.waiting += [(memoryview(header), memoryview(frame)) for frame in frames]
        self._call_soon(self._give)

    def _give(self) -> None:
        if self.waiting:
            taken = self.receiver.frames(self.waiting)
            assert 0 <= taken <= len(self.waiting)
            del self.waiting[:taken]

    def resume(self) -> None:
        """See `net.port.Port`."""
        self.resumed += 1
        self._call_soon(self._give)

    def set_offloads(self, wanted: Offloads) -> None:
        """See `net.port.Port`."""
        self.wanted.append(wanted)

    def inspect(self) -> Mapping[str, Any]:
        """See `net.port.Port`."""
        return {"kind": self.kind}
