"""KVM's own SINT lines and event signals: HV_SINT routes, irqfds, KVM_HYPERV_EVENTFD.

`synic.kernel` makes these; the layers above know them as `seam.SintLine` and
`seam.SignalPath`. A line may be opened, pulsed and closed from any thread; acks
arrive on the I/O loop.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from hvkvm.errors import KvmIoctlError
from hvkvm.kvm.irqfd import EventFd, Irqfd
from hvkvm.runtime.protocols import EdgeWatcher, ReaderHandle

if TYPE_CHECKING:
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.vm import Vm


class KernelLine:
    """A GSI of type KVM_IRQ_ROUTING_HV_SINT and the irqfd that raises it.

    The resample eventfd of the irqfd counts the guest's EOMs and EOIs. It is
    read by the I/O loop only while somebody waits: the guest acknowledges every
    interrupt of the SINT, and each would wake the loop for nothing.
    """

    def __init__(
        self, vm: Vm, gsi: GsiTable, io: EdgeWatcher, vp_index: int, sint: int, *, acks: bool
    ) -> None:
        self._vm = vm
        self._table = gsi
        self._io = io
        self._vp_index = vp_index
        self._sint = sint
        self._acks = acks
        # Guards the irqfd against being closed under a writer: its number may be another file's by then.
        self._lock = threading.Lock()
        self._gsi: int | None = None
        self._irqfd: Irqfd | None = None
        self._signal: Callable[[], object] | None = None  # the irqfd's, at hand for every pulse
        self._closed = False
        self._resamplefd: EventFd | None = None
        # Guards the next two; never held while a waiter runs.
        self._ack_lock = threading.Lock()
        self._waiters: list[Callable[[], None]] = []
        self._reader: ReaderHandle | None = None

    def bind(self) -> None:
        """Make the GSI and its irqfd; the SynIC is active. Raises OSError, HvkvmError; nothing stays then."""
        with self._lock:
            if self._closed or self._irqfd is not None:
                return
            # Committed before KVM_IRQFD: an irqfd on a GSI without a route does nothing, silently (S15).
            gsi = self._table.add_hv_sint(self._vp_index, self._sint)
            try:
                irqfd = Irqfd(self._vm, gsi, resample=self._acks)
            except BaseException:
                self._table.release(gsi)
                raise
            self._gsi = gsi
            self._use(irqfd)

    def _use(self, irqfd: Irqfd) -> None:
        self._irqfd, self._resamplefd = irqfd, irqfd.resamplefd
        # EventFd.signal() written out: this runs for every event of every channel.
        self._signal = partial(os.eventfd_write, irqfd.eventfd.fd, 1)

    def pulse(self) -> int:
        """See `seam.SintLine.pulse`."""
        with self._lock:
            signal = self._signal
            if signal is None:
                return -errno.ENXIO
            try:
                signal()
            except BlockingIOError:
                return 0  # a full counter is as good as signalled
            except OSError as error:
                return -(error.errno or errno.EIO)
            return 0

    def enable_acks(self) -> None:
        """See `seam.SintLine.enable_acks`: a second irqfd on the same GSI takes over, then the first goes."""
        with self._lock:
            if self._acks or self._closed:
                return
            if self._irqfd is not None and self._gsi is not None:
                plain = self._irqfd
                self._use(Irqfd(self._vm, self._gsi, resample=True))
                plain.close()
            self._acks = True

    def arm_ack(self, waiter: Callable[[], None]) -> None:
        """See `seam.SintLine.arm_ack`. An ack that came before counts: the eventfd remembers it."""
        with self._ack_lock:
            if self._reader is None and self._resamplefd is not None:
                self._reader = self._io.add_reader(self._resamplefd.fd, self._acked)
            self._waiters.append(waiter)

    def disarm_ack(self, waiter: Callable[[], None]) -> None:
        """See `seam.SintLine.disarm_ack`. The reader stays for the next ack to remove: it may be running."""
        with self._ack_lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _acked(self) -> None:
        """The guest wrote EOM or EOI. I/O loop."""
        with self._ack_lock:
            if self._resamplefd is not None:
                self._resamplefd.drain()
            waiters, self._waiters = self._waiters, []
            if self._reader is not None:
                # Within the lock, so that nobody watches the fd again before it is let go. On the loop this
                # does not wait.
                self._reader.remove()
                self._reader = None
        for waiter in waiters:
            waiter()

    def close(self) -> None:
        """See `seam.SintLine.close`. In S18's order; an error stops nothing else. Raises KvmIoctlError."""
        with self._lock:
            self._closed = True
            irqfd, self._irqfd, self._signal = self._irqfd, None, None
            gsi, self._gsi = self._gsi, None
        with ExitStack() as last_to_first:
            if irqfd is not None:
                last_to_first.callback(irqfd.close)
            last_to_first.callback(self._stop_acks)
            if gsi is not None:
                last_to_first.callback(self._table.release, gsi)
            if irqfd is not None:
                irqfd.deassign()

    def _stop_acks(self) -> None:
        with self._ack_lock:
            self._waiters.clear()
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.remove()  # waits for `_acked` on another thread, so not under a lock


class KernelSignalPath:
    """KVM_HYPERV_EVENTFD: KVM answers HvSignalEvent itself."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def assign(self, conn_id: int, fd: int) -> int:
        """See `seam.SignalPath.assign`."""
        return self._do(conn_id, fd, deassign=False)

    def deassign(self, conn_id: int) -> int:
        """See `seam.SignalPath.deassign`; KVM ignores the fd."""
        return self._do(conn_id, -1, deassign=True)

    def _do(self, conn_id: int, fd: int, *, deassign: bool) -> int:
        try:
            self._vm.hyperv_eventfd(conn_id, fd, deassign)
        except KvmIoctlError as error:
            return -(error.errno or errno.EIO)
        return 0
