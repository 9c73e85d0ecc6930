"""A wire over a stream socket: each frame behind its length, 4 bytes, big endian.

That is what QEMU's `-netdev stream`, passt and others speak. Frames go whole, with nothing left undone,
unless the peer is said not to mind (`offloads`). Who the peer is, and what follows when it goes, is
`stream_peer`'s. It is hostile: a length that no frame has ends the connection, since nothing says where the
next frame begins.

Owner: the I/O loop, for all but construction.
"""

from __future__ import annotations

import _socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvkvm.abi.virtio_net_hdr import PLAIN, VIRTIO_NET_HDR_BYTES, parse
from hvkvm.errors import NO_MEMORY
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.net.base import TURN_BYTES, TURN_FRAMES, BasePort
from hvkvm.net.port import ETHERNET_BYTES, MAX_FRAME_BYTES, NO_OFFLOADS, Frame, Offloads
from hvkvm.net.segment import MAX_SEGMENTS, finish
from hvkvm.runtime.protocols import Loop
from hvkvm.runtime.socket_watch import WRITE, SocketWatch, Watched

LENGTH_BYTES = 4
MAX_VIEWS = 1024
"""IOV_MAX."""
_FLAGS = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL


class StreamPort(BasePort):
    """The wire; down until `connected`. `lost(reason)` hears that the peer is gone, in a turn of the loop.

    `header` is the vnet header that every frame for the guest gets. With `offloads` the peer takes frames
    whose checksums are not filled in and TCP packets that are not cut.
    """

    kind = "socket"
    call_bytes = TURN_BYTES
    """Several frames go in one system call up to so many bytes."""

    def __init__(
        self,
        io: Loop,
        mtu: int,
        *,
        offloads: Offloads = NO_OFFLOADS,
        header: bytes = PLAIN,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        super().__init__(io, mtu, offloads=offloads, up=False, observer=observer)
        self.lost: Callable[[str], object] = lambda _reason: None
        self._closing: Callable[[], object] = lambda: None
        self._header = memoryview(header)
        self._sock: Any = None
        self._handle: Any = None
        self._watch: SocketWatch | None = None
        self._watched: Watched | None = None
        self._tail = b""
        self._cut = 0
        self._buffer = memoryview(bytearray(TURN_BYTES))
        self._start = self._end = 0
        self._asked = False

    def connected(self, sock: Any) -> None:
        """`sock`, non-blocking and from now on this port's, leads to the peer. There is none yet."""
        self._sock = sock
        self._start = self._end = 0
        self._tail = b""
        self._wire(True)
        self.io.call_soon(self._go_on)

    @property
    def has_peer(self) -> bool:
        """Whether somebody is connected."""
        return self._sock is not None

    def on_close(self, closing: Callable[[], object]) -> None:
        """`closing()` is part of closing this port."""
        self._closing = closing

    def close(self) -> None:
        """See `Port.close`."""
        self._started = False
        self._drop_peer()
        closing, self._closing = self._closing, lambda: None
        closing()

    def _details(self) -> Mapping[str, object]:
        return {"peer": "connected" if self.has_peer else "none"}

    def _drop_peer(self) -> None:
        self._stop_reading()
        self._room_retry.cancel()
        self._kept = ()
        self._tail = b""
        if self._watch is not None:
            self._watch.close()
            self._watch = self._watched = None
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _hung_up(self, reason: str) -> None:
        if self._sock is None:
            return
        self._drop_peer()
        self._wire(False)
        self.io.call_soon(self._writable)  # for what waited for room: it is dropped now
        self.lost(reason)

    # Sending.

    def _transmit(self, frames: Sequence[Frame], queue: int) -> int:
        taken = 0
        self._cut = 0
        while taken < len(frames) and self._sock is not None:
            if self._tail:
                break  # the peer's socket takes no more: `_room` comes
            if self._cut > MAX_SEGMENTS:
                self.io.call_soon(self._writable)  # enough for a turn
                break
            batch, sizes, views = self._batch(frames, taken)
            if not views:
                taken += batch
                continue
            try:
                count = self._sock.sendmsg(views, (), _FLAGS)
            except BlockingIOError:
                self._await_room(self._sock.fileno())
                break
            except OSError as error:
                if error.errno in NO_MEMORY:
                    # Linux had none for a packet. The socket is writable, so that watching it would not wait.
                    self._room_retry.later()
                    break
                self.io.call_soon(self._hung_up, error.strerror or str(error))
                self.statistics.sent_dropped += len(frames) - taken
                return len(frames)
            taken += self._account(count, sizes, views)
        return taken

    def _batch(self, frames: Sequence[Frame], first: int) -> tuple[int, list[int], list[Any]]:
        """How many frames one call is given, each one's bytes in it, and all of it as views."""
        sizes: list[int] = []
        views: list[Any] = []
        total = 0
        for frame in frames[first : first + TURN_FRAMES]:
            if self._cut > MAX_SEGMENTS:
                break
            whole = self._whole(frame)
            size = sum(map(len, whole))
            if views and (total + size > self.call_bytes or len(views) + len(whole) > MAX_VIEWS):
                break
            views += whole if len(whole) <= MAX_VIEWS else [b"".join(whole)]
            sizes.append(size)
            total += size
        return len(sizes), sizes, views

    def _whole(self, frame: Frame) -> list[Any]:
        """What goes over the socket for a frame; nothing for one that cannot be carried."""
        header = frame[0]
        size = sum(map(len, frame)) - VIRTIO_NET_HDR_BYTES
        if not ETHERNET_BYTES <= size <= MAX_FRAME_BYTES:
            self.statistics.sent_dropped += 1
            return []
        if header == PLAIN or self.offloads.csum:
            return [size.to_bytes(LENGTH_BYTES, "big"), *frame[1:]]
        whole = finish(parse(header), b"".join(frame[1:]))
        self._cut += len(whole)
        if not whole:
            self.statistics.sent_dropped += 1
        return [part for each in whole for part in (len(each).to_bytes(LENGTH_BYTES, "big"), each)]

    def _account(self, count: int, sizes: list[int], views: list[Any]) -> int:
        """Of `count` bytes that went: how many frames they are. The rest of one that went in part is kept."""
        statistics = self.statistics
        frames = 0
        at = 0
        for size in sizes:
            if size:
                if at >= count:
                    break
                statistics.sent_frames += 1
                statistics.sent_bytes += size - LENGTH_BYTES
            at += size
            frames += 1
        if at > count:
            self._tail = b"".join(views)[count:at]
        if at > count or frames < len(sizes):
            self._await_room(self._sock.fileno())
        return frames

    def _watch_room(self, fd: int) -> None:
        if self._watch is None:
            self._watch = SocketWatch(self.io)
        if self._watched is None:
            self._watched = self._watch.add(fd, lambda _mask: self._room())
        self._watched.arm(WRITE)

    def _room(self) -> None:
        if self._tail:
            try:
                count = self._sock.send(self._tail, _FLAGS)
            except BlockingIOError:
                count = 0
            except OSError as error:
                if error.errno in NO_MEMORY:
                    self._room_retry.later()
                else:
                    self._hung_up(error.strerror or str(error))
                return
            self._tail = self._tail[count:]
            if self._tail:
                self._await_room(self._sock.fileno())
                return
        self._writable()

    # Receiving.

    def _read_on(self) -> None:
        self._handle = self.io.add_reader(self._sock.fileno(), self._readable)
        self._ask()

    def _read_off(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()

    def _ask(self) -> None:
        """What was read is more than a turn takes: have another."""
        if not self._asked and self._end - self._start > LENGTH_BYTES:
            self._asked = True
            self.io.call_soon(self._again)

    def _again(self) -> None:
        self._asked = False
        if self._reading:
            self._take()

    def _readable(self) -> None:
        if not self._asked:
            self._fill()

    def _fill(self) -> None:
        buffer = self._buffer
        if self._start:
            kept = self._end - self._start
            buffer[:kept] = bytes(buffer[self._start : self._end])
            self._start, self._end = 0, kept
        try:
            count = self._sock.recv_into(buffer[self._end :], 0, _FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            self._hung_up(error.strerror or str(error))
            return
        if not count:
            self._hung_up("the peer has hung up")
            return
        self._end += count
        self._take()

    def _take(self) -> None:
        """Give the receiver the frames that are whole, a turn's worth."""
        buffer, at, end = self._buffer, self._start, self._end
        frames: list[Frame] = []
        while len(frames) < TURN_FRAMES and end - at >= LENGTH_BYTES:
            size = int.from_bytes(buffer[at : at + LENGTH_BYTES], "big")
            if not ETHERNET_BYTES <= size <= MAX_FRAME_BYTES:
                self._hung_up(f"the peer sent a frame of {size} bytes")
                return
            behind = at + LENGTH_BYTES + size
            if behind > end:
                break
            frames.append((self._header, buffer[at + LENGTH_BYTES : behind]))
            at = behind
        self._start = at
        if frames:
            self._deliver(self._read(frames))
        if len(frames) == TURN_FRAMES:
            self._ask()

    def _read(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """What the receiver gets of frames that the peer sent; called once for each."""
        return frames
