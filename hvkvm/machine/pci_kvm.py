"""How devices on PCI reach KVM: ioeventfds for their doorbells, irqfds for their MSIs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvkvm.abi.kvm import KVM_PIT_FLAGS_HPET_LEGACY
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
        """Untie it. On the loop, or when it has ended."""
        self._handle.remove()
        self._ioeventfd.close()


class MsiLine:
    """A route in KVM's table and an eventfd tied to it."""

    def __init__(self, vm: Vm, gsi: GsiTable, address: int, data: int) -> None:
        self._table = gsi
        self._gsi = gsi.add_msi(address, data)
        try:
            self._irqfd = Irqfd(vm, self._gsi)
        except BaseException:
            gsi.release(self._gsi)
            raise
        self.signal = self._irqfd.signal

    def close(self) -> None:
        """Untie the eventfd and give the route back."""
        self._irqfd.deassign()
        self._table.release(self._gsi)
        self._irqfd.close()


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
    """Opens lines on one VM."""

    def __init__(self, vm: Vm, gsi: GsiTable) -> None:
        self._vm = vm
        self._gsi = gsi

    def open(self, address: int, data: int) -> MsiLine:
        """See `msix.MsiRouter.open`."""
        return MsiLine(self._vm, self._gsi, address, data)
