"""How devices on PCI reach KVM: ioeventfds for their doorbells, irqfds for their MSIs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_PIT_FLAGS_HPET_LEGACY
from hvkvm.errors import KvmIoctlError
from hvkvm.kvm.doorbell import IoEventFd
from hvkvm.kvm.irqfd import Irqfd

if TYPE_CHECKING:
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.vm import Vm
    from hvkvm.runtime.io_loop import IoLoop


class Bell:
    """An ioeventfd for writes of `size` bytes at `gpa`, watched by the I/O loop. OSError."""

    def __init__(self, vm: Vm, io: IoLoop, gpa: int, size: int, rang: Callable[[], object]) -> None:
        self._ioeventfd = IoEventFd(vm, gpa, size)
        try:
            self._handle = io.add_reader(self._ioeventfd.eventfd.fd, rang, edge=True)
        except BaseException:
            self._ioeventfd.close()
            raise

    def close(self) -> None:
        """Untie it. On the loop, or when it has ended.

        KvmIoctlError where KVM keeps it tied: then it swallows what a guest writes there, and the device
        cannot go on.
        """
        self._handle.remove()
        self._ioeventfd.close()


class MsiLine:
    """An eventfd tied to a GSI that leads to an MSI. OSError, HvkvmError."""

    def __init__(self, vm: Vm, gsi: int, release: Callable[[int], object]) -> None:
        self._gsi = gsi
        self._release = release
        self._irqfd = Irqfd(vm, gsi)
        self.signal = self._irqfd.signal

    def close(self) -> None:
        """Untie the eventfd and give the route back."""
        with suppress(KvmIoctlError):
            self._irqfd.deassign()
        self._release(self._gsi)
        with suppress(KvmIoctlError):
            self._irqfd.close()  # which unties it in any case


class PitPlace:
    """Has KVM's PIT give up IRQ 0, which an HPET has then, and take it again."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def give_up(self, given_up: bool) -> None:
        """Any thread. What counts goes on counting."""
        state = self._vm.get_pit2()
        wanted = state.flags & ~KVM_PIT_FLAGS_HPET_LEGACY | (KVM_PIT_FLAGS_HPET_LEGACY if given_up else 0)
        if state.flags != wanted:
            state.flags = wanted
            self._vm.set_pit2(state)


class MsiRoutes:
    """Opens lines on one VM; a `msix.MsiRouter`."""

    def __init__(self, vm: Vm, gsi: GsiTable, io: IoLoop) -> None:
        self._vm = vm
        self._gsi = gsi
        self._lock = threading.Lock()
        self._kept: list[int] = []  # routes that KVM had no memory to go without
        self.call_later = io.call_later

    def open(self, address: int, data: int) -> MsiLine:
        """See `msix.MsiRouter.open`."""
        gsi = self._route(address, data)
        try:
            return MsiLine(self._vm, gsi, self._release)
        except BaseException:
            self._release(gsi)
            raise

    def _route(self, address: int, data: int) -> int:
        with self._lock:
            if not self._kept:
                return self._gsi.add_msi(address, data)
            self._gsi.update_msi(self._kept[-1], address, data)
            return self._kept.pop()

    def _release(self, gsi: int) -> None:
        """Any thread. One that cannot be given back leads nowhere, and is the next one's."""
        with self._lock:
            try:
                self._gsi.release(gsi)
            except KvmIoctlError:
                self._kept.append(gsi)
