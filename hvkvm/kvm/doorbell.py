"""Guest writes that cost no exit: ioeventfds, which signal an eventfd while the guest runs on.

Owner: the thread that opened them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.abi.kvm import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
)
from hvkvm.kvm.irqfd import EventFd

if TYPE_CHECKING:
    from types import TracebackType

    from hvkvm.kvm.vm import Vm


class IoEventFd:
    """A write of `size` bytes (0: any size) at `address` signals `eventfd`; with `datamatch` only that value.

    Needs no irqchip. `pio` takes a port instead of a guest physical address.
    """

    __slots__ = ("_argument", "_assigned", "_vm", "eventfd")

    def __init__(
        self, vm: Vm, address: int, size: int, datamatch: int | None = None, pio: bool = False
    ) -> None:
        """Raises KvmIoctlError (EEXIST: taken; EINVAL: a size KVM has no match for); no fd is left behind."""
        flags = KVM_IOEVENTFD_FLAG_PIO if pio else 0
        if datamatch is not None:
            flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
        self._vm = vm
        self._argument = (address, size, flags, datamatch or 0)
        self._assigned = False
        self.eventfd = EventFd()
        try:
            vm.ioeventfd(address, size, self.eventfd.fd, flags, datamatch or 0)
            self._assigned = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Deassign, then close the eventfd; again does nothing. Stop watching the eventfd first."""
        try:
            if self._assigned and not self._vm.closed:
                address, size, flags, datamatch = self._argument
                self._vm.ioeventfd(
                    address, size, self.eventfd.fd, flags | KVM_IOEVENTFD_FLAG_DEASSIGN, datamatch
                )
        finally:
            self._assigned = False
            self.eventfd.close()

    def __enter__(self) -> IoEventFd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
