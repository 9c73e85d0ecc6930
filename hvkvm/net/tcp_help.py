"""What TCP between a guest and passt lacks: windows that fit, news of windows, and word of a loss.

passt acknowledges what its own socket took, and offers the window of the server behind that socket, which may
be megabytes. What its socket then has no room for, passt drops. Of that it tells by two acknowledgements
alike, where senders without SACK wait for three, or not at all. It carries no timestamps, so each time-out is
twice the last one, until the connection all but stands. Nor does it tell of a window that has opened again:
the guest asks after 0.2 s, and ever later. The passts of March 2023 and of May 2025 were seen to do all this.

So a guest is offered MAX_WINDOW at most, or SMALL_WINDOW where passt's socket has little room. Where passt
repeats itself on purpose, it is repeated twice more. While a window is closed passt is asked in the guest's
place, as a guest asks (RFC 9293, 3.8.6.1). Frames of either side are hostile: what is not plain TCP goes by
unchanged, and no more than MAX_FLOWS connections are remembered. Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from hvkvm.abi import tcp
from hvkvm.abi.virtio_net_hdr import VALID
from hvkvm.net.checksum import checksum, transport_checksum
from hvkvm.net.port import Frame
from hvkvm.runtime.protocols import Delayer, TimerHandle

MAX_WINDOW = 128 * 1024
"""Bytes under way to passt at most. More were dropped at times; a guest and passt are some 0.1 ms apart."""
SMALL_WINDOW = 32 * 1024
"""The same where passt may not say how much room its sockets have. Then Linux gives them 20 segments' worth
for a start, 85 KiB at an MTU of 1500, and some of that is taken."""
SMALL_SEGMENT = 8192
"""Bytes in a segment from which on 20 of them are room enough for MAX_WINDOW."""
ROOM_PATH = "/proc/sys/net/core/wmem_max"
LEAST_ROOM = 2 << 20
"""passt says it, if Linux gives twice this at least."""
CLOSED_WINDOW = 2048
"""A window below this, in bytes, holds up a sender of full segments."""
MAX_FLOWS = 1024
MAX_CLOSED = 64
"""For so many closed windows passt is asked; guests ask for themselves too."""
FIRST_SECONDS, LAST_SECONDS = 0.005, 0.5
"""Until passt is asked first, and between two questions at most."""


class Flow:
    """What is known of a connection."""

    __slots__ = (
        "answer",
        "at",
        "delay",
        "due",
        "fins",
        "guest",
        "guest_scales",
        "last",
        "most",
        "offered",
        "scale",
        "small",
        "told",
    )

    def __init__(self) -> None:
        self.guest_scales = False
        """Whether the guest's SYN has the option. Windows are scaled if both have it."""
        self.offered: int | None = None
        """The shift in passt's SYN; None until then, or if it has none."""
        self.scale = 0
        self.small = False
        """Whether the guest's segments are small."""
        self.most = 0xFFFF
        """The largest window field that the guest may see."""
        self.fins = 0
        self.guest = b""
        """The guest's last acknowledgement, flags and window: 8 bytes of its TCP header."""
        self.last = b""
        """Sequence number to window of passt's last frame, where that is an acknowledgement and no more."""
        self.told = b""
        """The `last` of which the guest has heard that it stands for a loss."""
        self.answer = b""
        """passt's last headers, with a closed window."""
        self.at = 0
        self.delay = FIRST_SECONDS
        self.due = 0.0


class TcpHelp:
    """The connections of one passt. `ask(frames)` sends it what a guest would.

    `little_room`: whether its sockets have only the room that Linux gives them by itself.
    """

    def __init__(
        self, io: Delayer, ask: Callable[[Sequence[Frame]], object], *, little_room: bool = False
    ) -> None:
        self.limited = 0
        """Windows made smaller, in frames."""
        self.asked = 0
        self.told = 0
        self._io = io
        self._ask = ask
        self._little_room = little_room
        self._flows: dict[bytes, Flow] = {}
        self._closed: dict[bytes, Flow] = {}
        self._timer: TimerHandle | None = None

    def stop(self) -> None:
        """Ask no more, until a window is seen closed again."""
        self._closed.clear()
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def inspect(self) -> Mapping[str, object]:
        """What was done so far."""
        return {"windows_limited": self.limited, "windows_asked": self.asked, "losses_told": self.told}

    def from_passt(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """What the guest gets of these frames, whose windows are made smaller in place."""
        given: list[Frame] = []
        for frame in frames:
            given.append(frame)
            view = frame[1]
            at = tcp.tcp_header(view)
            if not at:
                continue
            key = tcp.sender_and_receiver(view, at)
            flags = view[at + tcp.FLAGS]
            if flags & (tcp.SYN | tcp.RST | tcp.FIN):
                self._changed(key, flags, view, at, by_guest=False)
                continue
            flow = self._flows.get(key)
            if flow is None:
                continue
            window = view[at + tcp.WINDOW] << 8 | view[at + tcp.WINDOW + 1]
            if window > flow.most:
                tcp.set_window(view, at, flow.most)
                self.limited += 1
            if window << flow.scale < CLOSED_WINDOW:
                self._is_closed(key, flow, bytes(view[: at + tcp.TCP_BYTES]), at)
            elif key in self._closed:
                del self._closed[key]
            last, flow.last = flow.last, b""
            if flags == tcp.ACK and len(view) == at + tcp.TCP_BYTES:
                flow.last = bytes(view[at + tcp.SEQUENCE : at + tcp.CHECKSUM])
                if flow.last == last and last != flow.told:
                    # The first of them may have told of another window too, and then counts for nothing.
                    flow.told = last
                    self.told += 1
                    given += (frame, frame)
        return given

    def from_guest(self, frames: Sequence[Frame]) -> None:
        """Remember what frames of the guest's say. Each is read once, since a guest may write to it."""
        for frame in frames:
            view = frame[1] if len(frame[1]) >= tcp.DEEPEST_BYTES or len(frame) == 2 else b"".join(frame[1:])
            head = bytes(view[: tcp.DEEPEST_BYTES])
            at = tcp.tcp_header(head)
            if not at:
                continue
            key = tcp.receiver_and_sender(head, at)
            flags = head[at + tcp.FLAGS]
            if flags & (tcp.SYN | tcp.RST | tcp.FIN):
                # With its options, which only a SYN's matter of.
                self._changed(key, flags, head + bytes(view[tcp.DEEPEST_BYTES : at + 60]), at, by_guest=True)
            flow = self._flows.get(key)
            if flow is not None:
                flow.guest = head[at + tcp.ACKNOWLEDGEMENT : at + tcp.CHECKSUM]

    def _changed(self, key: bytes, flags: int, head: bytes | memoryview, at: int, *, by_guest: bool) -> None:
        """A connection begins or ends."""
        if flags & tcp.RST:
            self._forget(key)
        elif flags & tcp.SYN:
            self._begin(key, flags, head, at, by_guest=by_guest)
        elif (flow := self._flows.get(key)) is not None:
            flow.fins |= 1 if by_guest else 2
            if flow.fins == 3:
                self._forget(key)

    def _begin(self, key: bytes, flags: int, head: bytes | memoryview, at: int, *, by_guest: bool) -> None:
        scale = tcp.window_scale(head, at)
        flow = self._flows.get(key)
        if flow is None or not flags & tcp.ACK:
            self._forget(key)
            while len(self._flows) >= MAX_FLOWS:
                self._forget(next(iter(self._flows)))
            flow = self._flows[key] = Flow()
        if by_guest:
            flow.guest_scales = scale is not None
            flow.small = tcp.segment_size(head, at) < SMALL_SEGMENT
        else:
            flow.offered = scale
        if flow.guest_scales and flow.offered is not None:
            flow.scale = flow.offered
        most = SMALL_WINDOW if flow.small and self._little_room else MAX_WINDOW
        flow.most = min(most >> flow.scale, 0xFFFF)

    def _forget(self, key: bytes) -> None:
        self._flows.pop(key, None)
        self._closed.pop(key, None)

    # Asking whether a window is still closed.

    def _is_closed(self, key: bytes, flow: Flow, answer: bytes, at: int) -> None:
        flow.answer, flow.at = answer, at
        if key in self._closed or len(self._closed) >= MAX_CLOSED:
            return
        flow.delay = FIRST_SECONDS
        flow.due = monotonic() + flow.delay
        self._closed[key] = flow
        self._arm(flow.delay)

    def _arm(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self._io.call_later(seconds, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = monotonic()
        questions = []
        for flow in self._closed.values():
            if flow.due <= now:
                flow.delay = min(2 * flow.delay, LAST_SECONDS)
                flow.due = now + flow.delay
                if flow.guest:
                    questions.append(
                        (memoryview(VALID), memoryview(question(flow.answer, flow.at, flow.guest)))
                    )
        if self._closed:
            self._arm(max(min(flow.due for flow in self._closed.values()) - now, FIRST_SECONDS))
        if questions:
            self.asked += len(questions)
            self._ask(questions)


def little_room() -> bool:
    """Whether passt's sockets have, on this host, the room that Linux gives them by itself. Reads a file."""
    try:
        with open(ROOM_PATH) as file:
            return int(file.read()) < LEAST_ROOM
    except (OSError, ValueError):
        return True


def question(answer: bytes, at: int, guest: bytes) -> bytes:
    """A guest's frame that has passt tell of its window: nothing, from before what passt awaits.

    `answer`: the headers of passt's frame, TCP's at `at`. `guest`: acknowledgement, flags and window of the
    guest's last frame.
    """
    sequence = int.from_bytes(answer[at + tcp.ACKNOWLEDGEMENT : at + tcp.ACKNOWLEDGEMENT + 4], "big") - 1
    segment = bytearray(answer[at + 2 : at + 4] + answer[at : at + 2])
    segment += (sequence & 0xFFFFFFFF).to_bytes(4, "big") + guest[:4]
    segment += bytes((tcp.TCP_BYTES // 4 << 4, tcp.ACK)) + guest[6:8] + bytes(4)
    size = tcp.address_bytes(at)
    addresses = answer[at - size : at] + answer[at - 2 * size : at - size]
    found = transport_checksum(addresses, tcp.IPPROTO_TCP, segment)
    segment[tcp.CHECKSUM : tcp.CHECKSUM + 2] = found.to_bytes(2, "big")
    ip = bytearray(answer[14 : at - 2 * size])
    if size == 4:
        ip[2:6] = (20 + len(segment)).to_bytes(2, "big") + bytes(2)
        ip[10:12] = bytes(2)
        ip[10:12] = checksum(bytes(ip) + addresses).to_bytes(2, "big")
    else:
        ip[4:6] = len(segment).to_bytes(2, "big")
    return answer[6:12] + answer[:6] + answer[12:14] + bytes(ip) + addresses + bytes(segment)
