"""A UART's output on its way to the sink: gathered byte by byte, given on in batches.

Each byte a guest writes costs an exit, so nothing more may be spent on it than
an append. A batch leaves on the I/O loop, and costs the sink one write(2): after
TX_DELAY at the latest, a line at once. But in a stream of lines or bytes there
are TX_INTERVAL between two batches: each wakes the loop and the sink's reader,
and one for each line doubled the time of a guest on a single processor (measured).

It is bounded: a sink that is full calls `hold(True)`, then bytes wait here. From
TX_LIMIT on the UART shows `full` to the guest; what a driver still sends, having
looked just before, has room, and only what comes beyond is dropped and counted.

Any thread may call anything here. One lock guards the bytes that wait, for a
moment a byte: a bytearray that several threads change loses some, and crashes a
Python without GIL. It is never held while something is called. The flags are
each one store; who queues a flush looks at them after the bytes are in, and who
flushes clears them before it looks at the bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from hvkvm.devices.port.serial_registers import FIFO_SIZE
from hvkvm.errors import Stopped

if TYPE_CHECKING:
    from hvkvm.runtime.io_loop import IoLoop

TX_LIMIT = 1 << 16
"""Bytes that wait for the sink before the UART stops saying that it can send."""
_CAPACITY = TX_LIMIT + FIFO_SIZE
"""A driver that saw THRE fills the FIFO without another look."""
TX_BATCH = 4096
TX_DELAY = 0.004
"""Seconds that output without a newline may wait for more, after a pause."""
TX_INTERVAL = 0.020
"""Seconds between two batches of a stream, unless one is full."""

_NEWLINE = 0x0A


class OutputBatch:
    """Gathers bytes for `sink(data)`, which gets them in order on the I/O loop.

    `on_room()` is called on the flushing thread when output that was full has
    room again. Whoever ends the machine calls `flush(even_if_held=True)` after
    the vCPUs ended: bytes may still wait for a loop that has stopped.
    """

    def __init__(
        self, sink: Callable[[bytes], object], io: IoLoop, *, on_room: Callable[[], None] | None = None
    ) -> None:
        self.sink = sink
        """May be changed before the guest runs."""
        self._io = io
        self._on_room = on_room
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._sink_lock = threading.Lock()  # taken before the other
        self._held = False
        self._soon = False  # a flush is queued on the loop
        self._later = False  # a flush is queued on a timer
        self._left_at = -inf  # when the last batch left
        self.total = 0
        self.overruns = 0
        """Bytes the guest sent although the UART was full; they are lost."""

    @property
    def waiting(self) -> int:
        """Bytes that the sink has not been given."""
        return len(self._waiting)

    @property
    def held(self) -> bool:
        """Whether the sink asked to be given nothing."""
        return self._held

    @property
    def full(self) -> bool:
        """Whether the guest should wait."""
        return len(self._waiting) >= TX_LIMIT

    def put(self, value: int) -> None:
        """Take one byte. Any thread."""
        waiting = self._waiting
        if value == _NEWLINE or len(waiting) >= TX_BATCH - 1:
            self.put_block(bytes((value,)))
            return
        with self._lock:
            waiting.append(value)
        if not self._later:
            self._flush_later()

    def put_block(self, data: bytes | bytearray) -> None:
        """Take several bytes. Any thread."""
        waiting = self._waiting
        with self._lock:
            taken = data[: max(0, _CAPACITY - len(waiting))]
            self.overruns += len(data) - len(taken)
            waiting += taken
        if len(waiting) >= TX_BATCH or (_NEWLINE in taken and self._pause >= TX_INTERVAL):
            if not self._soon:
                self._flush_soon()
        elif waiting and not self._later:
            self._flush_later()

    @property
    def _pause(self) -> float:
        """Seconds since the last batch left."""
        return monotonic() - self._left_at

    def _flush_later(self) -> None:
        # The loop may have stopped before the vCPUs did; then the last flush() finds the bytes.
        with suppress(Stopped):
            self._later = True
            self._io.call_later(max(TX_DELAY, TX_INTERVAL - self._pause), self._flush_after_delay)

    def _flush_soon(self) -> None:
        with suppress(Stopped):
            self._soon = True  # before the call: the flush may run, and clear it, before the call returns
            self._io.call_soon(self.flush)

    def _flush_after_delay(self) -> None:
        self._later = False
        self.flush()

    def flush(self, *, even_if_held: bool = False) -> None:
        """Give the sink all that waits. Any thread."""
        with self._sink_lock:  # two flushers must not swap their batches
            self._soon = False  # before looking: a byte that comes later queues a flush of its own
            if self._held and not even_if_held:
                return
            with self._lock:
                data = bytes(self._waiting)
                self._waiting.clear()
            size = len(data)
            if not size:
                return
            self.total += size
            self._left_at = monotonic()
            if size >= TX_LIMIT and self._on_room is not None:
                self._on_room()
            self.sink(data)

    def hold(self, held: bool) -> None:
        """Stop (True) or resume (False) giving output to the sink. Any thread, the sink itself too."""
        self._held = held
        if not held and self._waiting:
            self._flush_soon()
