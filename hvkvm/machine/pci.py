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
from hvkvm.devices.pci.nvme.controller import ControllerState
from hvkvm.devices.pci.power import PmBlocks
from hvkvm.errors import StateError
from hvkvm.kvm.doorbell import IoEventFd
from hvkvm.kvm.irqfd import Irqfd

if TYPE_CHECKING:
    from hvkvm.block.disk import Disk
    from hvkvm.devices.pci.nvme.controller import Controller
    from hvkvm.kvm.gsi import GsiTable
    from hvkvm.kvm.vm import Vm
    from hvkvm.machine.board import Board
    from hvkvm.machine.platform import Platform
    from hvkvm.runtime.io_loop import IoLoop


class PciState(NamedTuple):
    """The configuration address, every function's registers, the PM timer, and each device by its slot."""

    address: int
    bus: BusState
    pm_timer: int
    nvme: dict[int, ControllerState]


class Bell:
    """An ioeventfd for 4-byte writes, watched by the I/O loop."""

    def __init__(self, vm: Vm, io: IoLoop, gpa: int, rang: Callable[[], object]) -> None:
        self._ioeventfd = IoEventFd(vm, gpa, 4)
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
        self._platform = platform
        self._stack = stack
        self.controllers: dict[int, Controller] = {}
        """NVMe controllers by slot."""

    def add_nvme(self, disk: Disk, *, name: str, serial: str = "") -> tuple[int, Controller]:
        """Plug in an NVMe controller with `disk` before the machine starts: its slot, and it. ConfigError."""
        from hvkvm.devices.pci.nvme.controller import Controller

        platform = self._platform

        def make_bell(gpa: int, rang: Callable[[], object]) -> Bell:
            return Bell(platform.vm, platform.io, gpa, rang)

        controller = Controller(
            platform.memory,
            disk,
            platform.io,
            self.routes,
            make_bell=make_bell,
            name=name,
            serial=serial or name,
            sector_size=disk.image.sector_size,
            read_only=disk.image.read_only,
        )
        slot = self.bus.plug(controller)
        controller.on_intx = lambda level: self.bus.set_intx(slot, level)
        self.controllers[slot] = controller
        self._stack.callback(controller.close)
        return slot, controller

    @property
    def pm_base(self) -> int:
        """Where the ACPI blocks are, or were to be if nobody has moved them."""
        return numbers.PM1A_EVT_PORT if self.blocks.base is None else self.blocks.base

    def start(self) -> None:
        """See `Part.start`."""
        for controller in self.controllers.values():
            controller.start()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`: every device has answered what it took."""
        left = len(self.controllers)
        if not left:
            done()
            return

        def one_stopped() -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for controller in self.controllers.values():
            controller.stop(one_stopped)

    def reset(self) -> None:
        """See `Part.reset`."""
        self._ports.address = 0
        for controller in self.controllers.values():
            controller.reset()
        self.bus.reset()
        self.blocks.move(self._pm.base)

    def save(self) -> PciState:
        """See `Part.save`."""
        controllers = {slot: one.save() for slot, one in self.controllers.items()}
        return PciState(self._ports.address, self.bus.save(), self.blocks.timer.count, controllers)

    def load(self, state: PciState) -> None:
        """See `Part.load`."""
        try:
            if set(state.nvme) != set(self.controllers):
                raise ValueError("other NVMe disks were there when it was saved")
            self.bus.load(state.bus)
            for slot, controller in self.controllers.items():
                controller.load(state.nvme[slot])
        except ValueError as error:
            raise StateError(f"{self.name}: {error}") from None
        self._ports.address = state.address
        self.blocks.timer.count = state.pm_timer
        self.blocks.move(self._pm.base)

    def inspect(self) -> dict[str, object]:
        """What sits where, and each device."""
        devices = {f"{slot:02x}": one.inspect() for slot, one in self.controllers.items()}
        return {"functions": self.bus.inspect(), "nvme": devices}
