"""A tap interface of the host as a wire: frames by readv and writev, checksums and segments left to Linux.

How an interface is made or found is `tap_open`'s. Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from functools import partial
from typing import Any

from hvkvm.abi.if_tun import TUNSETOFFLOAD
from hvkvm.abi.virtio_net_hdr import (
    PLAIN,
    TUN_F_CSUM,
    TUN_F_TSO4,
    TUN_F_TSO6,
    TUN_F_TSO_ECN,
    VIRTIO_NET_HDR_BYTES,
)
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.net.base import TURN_BYTES, TURN_FRAMES, BasePort
from hvkvm.net.port import ALL_OFFLOADS, ETHERNET_BYTES, MAX_FRAME_BYTES, NO_OFFLOADS, Frame, Offloads
from hvkvm.net.tap_open import Tap
from hvkvm.runtime.protocols import Loop
from hvkvm.runtime.socket_watch import WRITE, SocketWatch, Watched

MAX_VIEWS = 1024
"""IOV_MAX."""
ALONE_TURNS = 8
"""Once so many turns in a row had one frame each, only one turn in so many asks whether there is another."""
SLOT_BYTES = (VIRTIO_NET_HDR_BYTES + MAX_FRAME_BYTES + 4095) & ~4095


class TapPort(BasePort):
    """The tap interface `tap`, whose fds become this port's: one a queue.

    Linux remembers by which queue a flow's frames came, and has those that go back take the same one.
    """

    kind = "tap"

    def __init__(self, io: Loop, tap: Tap, *, observer: Observer = NULL_OBSERVER) -> None:
        super().__init__(
            io, tap.mtu, offloads=ALL_OFFLOADS if tap.vnet_header else NO_OFFLOADS, observer=observer
        )
        self.name = tap.name
        self._fds = [tap.fd, *tap.more]
        self._vnet_header = tap.vnet_header
        self._wanted = NO_OFFLOADS
        self._handles: list[Any] = []
        self._alone = 0
        self._watch: SocketWatch | None = None
        self._watched: dict[int, Watched] = {}
        # For all queues: a turn's frames are taken or kept, and nothing is read while some are kept.
        # Pages that no frame reaches stay untouched, and cost nothing.
        pool = memoryview(bytearray(TURN_FRAMES * SLOT_BYTES))
        slots = [pool[at : at + SLOT_BYTES] for at in range(0, len(pool), SLOT_BYTES)]
        self._slots = [(slot[:VIRTIO_NET_HDR_BYTES], slot[VIRTIO_NET_HDR_BYTES:]) for slot in slots]

    def set_offloads(self, wanted: Offloads) -> None:
        """See `Port.set_offloads`."""
        wanted = wanted.within(self.offloads)
        if wanted == self._wanted or not self._fds:
            return
        flags = TUN_F_CSUM if wanted.csum else 0
        flags |= TUN_F_TSO4 | TUN_F_TSO_ECN if wanted.tso4 else 0
        flags |= TUN_F_TSO6 | TUN_F_TSO_ECN if wanted.tso6 else 0
        try:
            ioctl(self._fds[0], TUNSETOFFLOAD, flags)
        except OSError as error:
            self._fail(f"{self.name}: TUNSETOFFLOAD: {error.strerror}")
            return
        self._wanted = wanted

    def close(self) -> None:
        """See `Port.close`. An interface that was made for us goes with its fds."""
        self._started = False
        self._stop_reading()
        self._room_retry.cancel()
        if self._watch is not None:
            self._watch.close()
            self._watch, self._watched = None, {}
        while self._fds:
            os.close(self._fds.pop())

    def _details(self) -> Mapping[str, object]:
        return {
            "interface": self.name,
            "queues": len(self._fds),
            "offloads": " ".join(k for k, on in self._wanted._asdict().items() if on),
        }

    def _transmit(self, frames: Sequence[Frame], queue: int) -> int:
        fd = self._fds[queue % len(self._fds)] if self._fds else -1
        statistics, plain = self.statistics, not self._vnet_header
        sent = 0
        for frame in frames:
            views = frame[1:] if plain else frame
            if len(views) > MAX_VIEWS:
                views = [memoryview(b"".join(views))]
            try:
                count = os.writev(fd, views)
            except BlockingIOError:
                self._await_room(fd)
                break
            except OSError as error:
                if error.errno == errno.EBADFD:
                    self._fail(f"interface {self.name} is gone")
                # Else it does not believe the header (EINVAL), is down (EIO), or has no memory now.
                statistics.sent_dropped += 1
            else:
                statistics.sent_frames += 1
                statistics.sent_bytes += count if plain else count - VIRTIO_NET_HDR_BYTES
            sent += 1
        return sent

    def _watch_room(self, fd: int) -> None:
        if self._watch is None:
            self._watch = SocketWatch(self.io)
        if fd not in self._watched:
            self._watched[fd] = self._watch.add(fd, lambda _mask: self._room())
        self._watched[fd].arm(WRITE)

    def _read_on(self) -> None:
        for fd in self._fds:
            self._handles.append(self.io.add_reader(fd, partial(self._readable, fd)))

    def _read_off(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _readable(self, fd: int) -> None:
        plain, readv = not self._vnet_header, os.readv
        frames: list[Frame] = []
        size = 0
        # Frames that come one by one cost no read that finds nothing: where there is another, epoll says so.
        self._alone += 1
        only = self._alone > ALONE_TURNS and self._alone % ALONE_TURNS != 0
        try:
            for slot in self._slots:
                if plain:
                    slot[0][:] = PLAIN
                    count = readv(fd, slot[1:])
                else:
                    count = readv(fd, slot) - VIRTIO_NET_HDR_BYTES
                if count < ETHERNET_BYTES:
                    continue
                frames.append((slot[0], slot[1][:count]))
                size += count
                if only or size >= TURN_BYTES:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            gone = error.errno == errno.EBADFD
            self._fail(f"interface {self.name} is gone" if gone else f"{self.name}: {error.strerror}")
        if len(frames) > 1:
            self._alone = 0
        if frames:
            self._deliver(frames, size)
