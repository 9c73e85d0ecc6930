"""Records a machine's bus to a file: taken by whoever does the work, written by a thread of its own.

Taking an entry is an append to a queue of bounded size. When the file is slower than
the guest, entries are lost and counted, and the guest waits for nobody.

The file keeps what it held until `start`: a run that does not come about takes no
recording from anybody.

Threads: `Tap`'s methods come on the I/O loop and on vCPU threads; construction, `start`
and `close` are the main thread's.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from time import time_ns
from typing import Any, Literal

from hvkvm.abi import pcapng
from hvkvm.abi.record_format import LINK_DESCRIPTION, LINK_NAME, ChannelEvent, Entry, Kind
from hvkvm.events import NULL_OBSERVER, Observer, Warned
from hvkvm.given_file import open_to_write
from hvkvm.record.words import packets
from hvkvm.runtime.thread_start import start_thread
from hvkvm.vmbus.offer import Channel
from hvkvm.vmbus.tap import TO_GUEST, TO_HOST, Tap

Depth = Literal["messages", "packets", "full"]

MAX_WAITING_BYTES = 32 << 20
"""Entries that may wait for the file, together."""
ENTRY_BYTES = 200
"""What an entry costs beside its own bytes."""
PACKET_BYTES = 512
"""Kept of a packet at depth "packets"."""
PAUSE_SECONDS = 0.02
"""How long entries gather before they are written."""
WRITE_BYTES = 1 << 18
"""Written at a time."""
CLOSE_SECONDS = 10.0
"""How long a file may take for what still waits at the end."""

_EVENTS = {
    "opened": ChannelEvent.OPENED,
    "closed": ChannelEvent.CLOSED,
    "failed": ChannelEvent.FAILED,
}


class Recorder(Tap):
    """Writes to `path` what crosses the bus, once started. ConfigError when the file cannot be had.

    `depth`: "messages" leaves out rings and signals, "packets" keeps PACKET_BYTES of
    each packet, "full" all of it. `machine` is what the first entry says of the machine.
    """

    def __init__(
        self,
        path: Path,
        depth: Depth,
        machine: Mapping[str, Any],
        *,
        observer: Observer = NULL_OBSERVER,
        max_waiting: int = MAX_WAITING_BYTES,
    ) -> None:
        import json

        self.path = path
        self.wants_rings = depth != "messages"
        self.lost = 0
        """Entries that nobody took in time, or that the file refused."""
        self.entries = 0
        """Entries taken."""
        self.unwritten = ""
        """Why the file lacks the end of the recording; empty where it has all that there was time for."""
        self._most = None if depth == "full" else PACKET_BYTES
        self._observer = observer
        self._max = max_waiting
        self._lock = threading.Lock()  # the four below
        self._waiting: deque[tuple[int, Entry]] = deque()
        self._size = 0
        self._lost_here = 0
        self._closing = False
        self._awake = threading.Event()
        self._ending = threading.Event()
        self._file = open_to_write(path, "--record ", 0o600)
        os.set_blocking(self._file.fd, True)
        self._failed = False
        self._header = pcapng.section_header("hvkvm") + pcapng.interface_description(
            pcapng.LINKTYPE_USER0, LINK_NAME, description=LINK_DESCRIPTION
        )
        self._take(Entry(Kind.MACHINE, TO_HOST, json.dumps(dict(machine)).encode()))
        self._thread = threading.Thread(target=self._main, name="record", daemon=True)

    def start(self) -> None:
        """Empty the file, and write to it from here on. Once. HostExhausted."""
        start_thread(self._thread)

    # What happens on the bus.

    def _take(self, entry: Entry) -> None:
        cost = len(entry.data) + ENTRY_BYTES
        with self._lock:
            if self._size + cost > self._max or self._failed or self._closing:
                self.lost += 1
                self._lost_here += 1
                return
            now = time_ns()
            if self._lost_here:
                self._waiting.append((now, Entry(Kind.LOST, TO_HOST, b"", value=self._lost_here)))
                self._lost_here = 0
            self._waiting.append((now, entry))
            self._size += cost
            self.entries += 1
        if not self._awake.is_set():
            self._awake.set()

    def received(self, payload: bytes) -> None:
        """See Tap."""
        self._take(Entry(Kind.MESSAGE, TO_HOST, payload))

    def refused(self, connection_id: int, payload: bytes, status: int) -> None:
        """See Tap."""
        self._take(Entry(Kind.MESSAGE, TO_HOST, payload, value=status))

    def sent(self, vp_index: int, sint: int, payload: bytes) -> None:
        """See Tap."""
        self._take(Entry(Kind.MESSAGE, TO_GUEST, payload, vp=vp_index, sint=sint))

    def channel(self, channel: Channel, what: str) -> None:
        """See Tap."""
        self._take(
            Entry(
                Kind.CHANNEL,
                TO_HOST,
                channel.offer.name.encode(),
                channel.relid,
                channel.offer.interface,
                value=_EVENTS[what],
            )
        )

    def ring(self, channel: Channel, to_host: bool, data: bytes) -> None:
        """See Tap. The packets are told apart by the thread that writes."""
        self._take(Entry(Kind.PACKET, to_host, data, channel.relid, channel.offer.interface))

    def pointed(self, channel: Channel, to_host: bool, data: bytes) -> None:
        """See Tap."""
        most = self._most
        if most is None or len(data) <= most:
            self._take(Entry(Kind.POINTED, to_host, data, channel.relid, channel.offer.interface))
        else:
            cut = Entry(Kind.POINTED, to_host, data[:most], channel.relid, channel.offer.interface, cut=True)
            self._take(cut)

    def signal(self, channel: Channel, to_host: bool) -> None:
        """See Tap."""
        self._take(Entry(Kind.SIGNAL, to_host, b"", channel.relid, channel.offer.interface))

    def hypercall(self, control: int, value: int, result: int) -> None:
        """A hypercall that came to this process, and its result. The vCPU's thread."""
        if self.wants_rings:
            data = control.to_bytes(8, "little") + value.to_bytes(8, "little")
            self._take(Entry(Kind.HYPERCALL, TO_HOST, data, value=result & 0xFFFF))

    # The thread.

    def _main(self) -> None:
        try:
            self._record()
        except Exception as error:  # out of memory, say: the machine goes on without it
            self._failed = True
            self._tell_unwritten(f"{self.path}: {type(error).__name__}: {error}; the recording ends here")

    def _record(self) -> None:
        self._write(self._header, anew=True)
        while True:
            self._awake.wait()
            # Many at a time: each turn of this thread costs the others the interpreter's lock.
            self._ending.wait(PAUSE_SECONDS)
            self._awake.clear()
            with self._lock:
                taken, self._waiting = self._waiting, deque()
                closing = self._closing
            while taken:
                self._write_some(taken)
            if closing:
                return

    def _write_some(self, taken: deque[tuple[int, Entry]]) -> None:
        """Write the first of `taken`, WRITE_BYTES or a little more, and give their room back."""
        blocks: list[bytes] = []
        size = cost = 0
        while taken and size < WRITE_BYTES:
            at, entry = taken.popleft()
            made = self._blocks(at, entry)
            blocks += made
            size += sum(map(len, made))
            if entry.kind is not Kind.LOST:
                cost += len(entry.data) + ENTRY_BYTES
        self._write(b"".join(blocks))
        with self._lock:
            self._size -= cost

    def _blocks(self, at: int, entry: Entry) -> list[bytes]:
        if entry.kind is not Kind.PACKET:
            return [_block(at, entry, entry.data, len(entry.data))]
        found = []
        for packet in packets(entry.data):
            if isinstance(packet, str):
                break
            whole = packet.raw
            kept = whole if self._most is None else whole[: self._most]
            found.append(_block(at, entry, kept, packet.size))
        return found

    def _write(self, data: bytes, *, anew: bool = False) -> None:
        if self._failed:
            return
        view = memoryview(data)
        try:
            if anew:
                self._file.begin()
            while view:
                view = view[os.write(self._file.fd, view) :]
        except OSError as error:
            self._failed = True
            self._tell_unwritten(f"{self.path}: {error.strerror}; the recording ends here")

    def _tell_unwritten(self, text: str) -> None:
        self.unwritten = text
        self._observer.event(Warned("record", text))

    def close(self) -> None:
        """Write what waits, for CLOSE_SECONDS at most. Nothing is told any more. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._ending.set()
        self._awake.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._tell_unwritten(f"{self.path}: is not read; the recording lacks what came last")
            return  # its thread still has the file
        self._file.close()
        if self.lost:
            self._observer.event(
                Warned("record", f"{self.path}: {self.lost} entries are lost, the file was too slow for them")
            )


def _block(at: int, entry: Entry, data: bytes, length: int) -> bytes:
    cut = len(data) < length
    packed = entry.pack() if data is entry.data and not cut else entry._replace(data=data, cut=cut).pack()
    return pcapng.enhanced_packet(0, at, packed, length=len(packed) - len(data) + length)
