"""Connection tables: which host code hears HvPostMessage and HvSignalEvent on a connection id.

Messages run their handler at once on the posting vCPU's thread (S40). Events
only count up an eventfd: the same whether KVM signals it without an exit
(KVM_HYPERV_EVENTFD) or `signal` does after one, so both paths can be chosen and
tested (S42). The I/O loop watches it, unless it is a caller's own.

Any thread may add and remove. Removal is synchronous: when it returns, the
handler is not running on another thread and will not run again (S39).
Results are 0 or -errno, since guests can cause every one of them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

from hvkvm.abi.hv_synic import HV_CONNECTION_ID_MASK, hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.hyperv.synic.seam import SignalPath
from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.protocols import EdgeWatcher, ReaderHandle

MessageHandler = Callable[[hv_post_message_input], int]
"""Gets a private copy of the guest's input, payload_size in bounds; returns an HvStatus; may not block."""

_SUCCESS = int(HvStatus.SUCCESS)
_INVALID_CONNECTION_ID = int(HvStatus.INVALID_CONNECTION_ID)


class _MessageConnection:
    """One row of the message table, and the threads that run its handler now."""

    __slots__ = ("handler", "running")

    def __init__(self, handler: MessageHandler) -> None:
        self.handler = handler
        self.running: list[int] = []


class _EventConnection:
    """One row of the event table: an eventfd, its reader on the I/O loop if there is one, who signals it."""

    __slots__ = ("eventfd", "in_kernel", "reader")

    def __init__(self, eventfd: EventFd, reader: ReaderHandle | None, in_kernel: bool) -> None:
        self.eventfd = eventfd
        self.reader = reader
        self.in_kernel = in_kernel


class Connections:
    """Both tables of one VM. `signal_path` None means that every HvSignalEvent comes through `signal`.

    `on_slow()` is called once in that case, when the first event connection is added.
    """

    def __init__(
        self,
        io: EdgeWatcher,
        signal_path: SignalPath | None = None,
        on_slow: Callable[[], object] | None = None,
    ) -> None:
        self._io = io
        self._signal_path = signal_path
        self._on_slow = on_slow if signal_path is None else None
        self._messages: dict[int, _MessageConnection] = {}
        self._events: dict[int, _EventConnection] = {}
        self._idle = threading.Condition(threading.Lock())
        self._removers = 0  # how many wait on it
        self._event_lock = threading.Lock()
        self._closed = False

    def add_message(self, conn_id: int, handler: MessageHandler) -> int:
        """Send messages on `conn_id` to `handler`: 0, -EEXIST (the old one stays), -EINVAL (S37, S38).

        -ENODEV behind `close`.
        """
        if not 0 <= conn_id <= HV_CONNECTION_ID_MASK:
            return -errno.EINVAL
        with self._idle:
            if self._closed:
                return -errno.ENODEV
            if conn_id in self._messages:
                return -errno.EEXIST
            self._messages[conn_id] = _MessageConnection(handler)
            return 0

    def remove_message(self, conn_id: int) -> int:
        """Forget `conn_id`: 0 or -ENOENT. Waits for a handler that runs on another thread (S39).

        A handler may remove its own connection. It must not remove one whose
        handler is removing this one: they would wait for each other.
        """
        me = threading.get_ident()
        with self._idle:
            connection = self._messages.pop(conn_id, None)
            if connection is None:
                return -errno.ENOENT
            self._removers += 1
            try:
                while any(thread != me for thread in connection.running):
                    self._idle.wait()
            finally:
                self._removers -= 1
            return 0

    def post(self, message: hv_post_message_input) -> int:
        """Give `message` to its connection's handler; the handler's status, or INVALID_CONNECTION_ID.

        The top 8 bits of the id do not count here (S46). The posting vCPU's thread.
        """
        conn_id = message.connection_id & HV_CONNECTION_ID_MASK
        connection = self._messages.get(conn_id)
        if connection is None:
            return _INVALID_CONNECTION_ID
        # No lock on this path: the GIL orders these steps. A remover takes the row away and then looks at
        # `running`; so either it sees us there, or we see here that the row is gone. Without a GIL the list's
        # own lock, which `append` takes and gives back, is the fence between our store and our look.
        me = threading.get_ident()
        connection.running.append(me)
        try:
            if self._messages.get(conn_id) is not connection:
                return _INVALID_CONNECTION_ID
            return int(connection.handler(message)) & 0xFFFF
        finally:
            connection.running.remove(me)
            # A remover counts itself before it looks: either it sees us gone, or it is told.
            if self._removers:
                with self._idle:
                    self._idle.notify_all()

    def add_event(self, conn_id: int, callback: Callable[[], object]) -> int:
        """Call `callback()` on the I/O loop after signals on `conn_id`: 0 or -errno (S37, S41).

        Signals coalesce: several may come as one call (S54). Raises Stopped
        when the I/O loop is gone, OSError when no eventfd can be made.
        """

        def watched() -> tuple[EventFd, ReaderHandle]:
            eventfd = EventFd()
            try:
                # Edge-triggered: nobody reads it, which spares every event of every channel a system call.
                return eventfd, self._io.add_reader(eventfd.fd, callback, edge=True)
            except BaseException:
                eventfd.close()
                raise

        return self._add_event(conn_id, watched)

    def add_eventfd(self, conn_id: int, fd: int) -> int:
        """Count up the caller's eventfd `fd` for every signal on `conn_id`: 0 or -errno (S37, S41).

        QEMU's hyperv_set_event_flag_handler takes an EventNotifier in the same way, so that
        another thread or process is told without the I/O loop. -EBADF: not open, -EINVAL: no
        eventfd. Make it EFD_NONBLOCK, or a vCPU may wait at a full counter. It is the caller's to
        read and to close, at any time: what is signalled is a duplicate, which goes with
        `remove_event`. Raises OSError when no fd can be had.
        """
        status = _why_no_eventfd(fd)
        return status if status else self._add_event(conn_id, lambda: (EventFd.duplicate(fd), None))

    def _add_event(self, conn_id: int, make: Callable[[], tuple[EventFd, ReaderHandle | None]]) -> int:
        if not 0 <= conn_id <= HV_CONNECTION_ID_MASK:
            return -errno.EINVAL
        with self._event_lock:
            if self._closed:
                return -errno.ENODEV
            if conn_id in self._events:
                return -errno.EEXIST
            on_slow, self._on_slow = self._on_slow, None
            eventfd, reader = make()
            status = 0
            if self._signal_path is not None:
                status = self._signal_path.assign(conn_id, eventfd.fd)
            if status == 0:
                self._events[conn_id] = _EventConnection(eventfd, reader, self._signal_path is not None)
        # Outside the lock: removing waits for a callback, which may be in here already.
        if status:
            _let_go(eventfd, reader)
        if on_slow is not None:
            on_slow()
        return status

    def remove_event(self, conn_id: int) -> int:
        """Forget `conn_id`: 0 or -ENOENT. Afterwards the callback is not running on another thread (S39)."""
        with self._event_lock:
            connection = self._events.pop(conn_id, None)
            if connection is None:
                return -errno.ENOENT
            # KVM holds its own reference to the eventfd: untie first, or signals keep landing (S43).
            if connection.in_kernel and self._signal_path is not None:
                self._signal_path.deassign(conn_id)
        _let_go(connection.eventfd, connection.reader)
        return 0

    def signal(self, conn_id: int) -> int:
        """Signal a connection's event from a hypercall exit: SUCCESS or INVALID_CONNECTION_ID. Any thread."""
        # The lock keeps the eventfd open: written after closing, the number could be another file's.
        with self._event_lock:
            connection = self._events.get(conn_id)
            if connection is None:
                return _INVALID_CONNECTION_ID
            connection.eventfd.signal()
            return _SUCCESS

    def close(self) -> None:
        """Remove everything and refuse more. Idempotent; not from a handler or callback."""
        with self._idle, self._event_lock:
            self._closed = True
            messages, events = list(self._messages), list(self._events)
        for conn_id in messages:
            self.remove_message(conn_id)
        for conn_id in events:
            self.remove_event(conn_id)

    def snapshot(self) -> dict[str, object]:
        """Message connections, whose handlers run, and who signals each event connection. Any thread."""
        with self._idle, self._event_lock:
            return {
                "message": [f"{conn_id:#x}" for conn_id in sorted(self._messages)],
                "running": [f"{conn_id:#x}" for conn_id, c in sorted(self._messages.items()) if c.running],
                "event": {
                    f"{conn_id:#x}": "KVM" if c.in_kernel else "hvkvm"
                    for conn_id, c in sorted(self._events.items())
                },
            }


def _let_go(eventfd: EventFd, reader: ReaderHandle | None) -> None:
    if reader is not None:
        reader.remove()
    eventfd.close()


def _why_no_eventfd(fd: int) -> int:
    """0 for an eventfd, else what KVM_HYPERV_EVENTFD would answer: -EBADF or -EINVAL."""
    try:
        return 0 if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]" else -errno.EINVAL
    except OSError:
        return -errno.EBADF
