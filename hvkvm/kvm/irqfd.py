"""Eventfds, and eventfds that are a guest's interrupt line.

`Irqfd` keeps the two orders that matter. Making: the GSI has its route first
(`GsiTable`), then eventfds, then KVM_IRQFD (S15). Ending (S18): `deassign`, then
the owner releases the GSI and stops watching `resamplefd`, then `close` closes the
fds; `close` alone does both ends where nobody watches.

`signal` may be called from any thread; the rest belongs to the thread that opened it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Protocol

from hvkvm.abi.kvm import KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE

if TYPE_CHECKING:
    from types import TracebackType


class IrqfdOwner(Protocol):
    """What an `Irqfd` needs of its VM."""

    @property
    def closed(self) -> bool: ...

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None: ...


class EventFd:
    """A non-blocking, close-on-exec eventfd. `fd` is -1 once closed."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @classmethod
    def duplicate(cls, fd: int) -> EventFd:
        """Another fd of somebody's eventfd, which counts the same. OSError."""
        new = cls.__new__(cls)
        new.fd = os.dup(fd)
        return new

    def fileno(self) -> int:
        return self.fd

    def signal(self, n: int = 1) -> None:
        """Add n. A full counter is as good as signalled. Any thread; OSError (EBADF) once closed."""
        try:
            os.eventfd_write(self.fd, n)
        except BlockingIOError:
            return
        except ValueError as error:  # what Python makes of fd -1
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from error

    def drain(self) -> int:
        """Take the count and leave 0; returns 0 if there was nothing. OSError (EBADF) once closed."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0
        except ValueError as error:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from error

    def close(self) -> None:
        """Close the fd; again does nothing. Deassign it in KVM first: KVM keeps its own reference (S43)."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> EventFd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EventFd {'closed' if self.fd < 0 else self.fd}>"


class Irqfd:
    """An eventfd that KVM turns into one edge on `gsi`.

    With `resample`, `resamplefd` becomes readable when the guest ends the
    interrupt (EOI), or for a SINT route its message (EOM, S29); that needs the
    full irqchip.
    """

    __slots__ = ("_assigned", "_vm", "eventfd", "gsi", "resamplefd")

    def __init__(self, vm: IrqfdOwner, gsi: int, resample: bool = False) -> None:
        """Raises KvmIoctlError or OSError (out of fds), and then no fd is left behind (S14)."""
        self._vm = vm
        self.gsi = gsi
        self._assigned = False
        self.resamplefd: EventFd | None = None
        self.eventfd = EventFd()
        try:
            if resample:
                self.resamplefd = EventFd()
                vm.irqfd(self.eventfd.fd, gsi, KVM_IRQFD_FLAG_RESAMPLE, self.resamplefd.fd)
            else:
                vm.irqfd(self.eventfd.fd, gsi)
            self._assigned = True
        except BaseException:
            self.close()
            raise

    def signal(self) -> None:
        """Raise the interrupt once. Any thread; OSError (EBADF) once closed."""
        self.eventfd.signal()

    pulse = signal  # an edge, as port devices call it

    def deassign(self) -> None:
        """Untie eventfd and GSI; KVM has let go of both eventfds when this returns. Again does nothing."""
        if self._assigned and not self._vm.closed:  # a closed VM takes its irqfds along
            self._vm.irqfd(self.eventfd.fd, self.gsi, KVM_IRQFD_FLAG_DEASSIGN)
        self._assigned = False

    def close(self) -> None:
        """Deassign if that is still to do, then close the ack fd, then the set fd (S18). Again does nothing.

        Raises KvmIoctlError if KVM refuses to deassign; the fds are closed nevertheless.
        """
        try:
            self.deassign()
        finally:
            if self.resamplefd is not None:
                self.resamplefd.close()
            self.eventfd.close()

    def __enter__(self) -> Irqfd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Irqfd GSI {self.gsi} {'assigned' if self._assigned else 'off'}>"
