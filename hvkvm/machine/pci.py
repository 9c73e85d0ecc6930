"""The machine's PCI bus: the board's own functions, and how the devices on it reach guest and KVM.

A `part.Part`. Made by `Machine` before the vCPUs run, on machines that have PCI. Configuration space and
BARs are written by vCPU threads; the devices have their queues on the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from hvkvm.abi import board as numbers
from hvkvm.abi import pci
from hvkvm.devices.mmio_bus import MmioBus
from hvkvm.devices.pci.board_functions import PowerManagement, host_bridge, isa_bridge
from hvkvm.devices.pci.bus import BusState, PciBus
from hvkvm.devices.pci.config_ports import Mechanism1
from hvkvm.devices.pci.power import PmBlocks
from hvkvm.errors import StateError
from hvkvm.kvm.irqfd import Irqfd

if TYPE_CHECKING:
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.vm import Vm
    from hvkvm.machine.board import Board
    from hvkvm.machine.platform import Platform


class PciState(NamedTuple):
    """The configuration address, every function's registers, and the PM timer."""

    address: int
    bus: BusState
    pm_timer: int


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


class MsiRoutes:
    """Opens lines on one VM."""

    def __init__(self, vm: Vm, gsi: GsiTable) -> None:
        self._vm = vm
        self._gsi = gsi

    def open(self, address: int, data: int) -> MsiLine:
        """See `msix.MsiRouter.open`."""
        return MsiLine(self._vm, self._gsi, address, data)


class Pci:
    """The bus. ConfigError where a device finds no slot."""

    name = "PCI"
    State = PciState

    def __init__(self, platform: Platform, board: Board, stack: ExitStack) -> None:
        vm = platform.vm
        if not isinstance(board.mmio, MmioBus) or not isinstance(board.pci_ports, Mechanism1):
            raise TypeError("a board made without PCI")
        self.mmio = board.mmio
        self.bus = PciBus(self.mmio, lambda gsi, level: vm.irq_line(gsi, int(level)))
        self._ports = board.pci_ports
        self._ports.bus = self.bus
        self.routes = MsiRoutes(vm, platform.gsi)
        self.blocks = PmBlocks(board.ports, board.power, board.sleep)
        with_firmware = platform.config.firmware is not None
        self._pm = PowerManagement(
            self.blocks.move, power_on_base=None if with_firmware else numbers.PM1A_EVT_PORT
        )
        self.bus.add_function(pci.HOST_BRIDGE_SLOT, 0, host_bridge())
        self.bus.add_function(pci.ISA_BRIDGE_SLOT, 0, isa_bridge())
        self.bus.add_function(pci.ISA_BRIDGE_SLOT, pci.PM_FUNCTION, self._pm)
        self.blocks.move(self._pm.base)

    @property
    def pm_base(self) -> int:
        """Where the ACPI blocks are, or were to be if nobody has moved them."""
        return numbers.PM1A_EVT_PORT if self.blocks.base is None else self.blocks.base

    def start(self) -> None:
        """See `Part.start`."""

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`."""
        done()

    def reset(self) -> None:
        """See `Part.reset`."""
        self._ports.address = 0
        self.bus.reset()
        self.blocks.move(self._pm.base)

    def save(self) -> PciState:
        """See `Part.save`."""
        return PciState(self._ports.address, self.bus.save(), self.blocks.timer.count)

    def load(self, state: PciState) -> None:
        """See `Part.load`."""
        try:
            self.bus.load(state.bus)
        except ValueError as error:
            raise StateError(f"{self.name}: {error}") from None
        self._ports.address = state.address
        self.blocks.timer.count = state.pm_timer
        self.blocks.move(self._pm.base)
