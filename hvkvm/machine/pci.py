"""The machine's PCI bus: the board's own functions, and how the devices on it reach guest and KVM.

A `part.Part`. Made by `Machine` before the vCPUs run, on machines that have PCI. Configuration space and
BARs are written by vCPU threads; the devices have their queues on the I/O loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from hvkvm.abi import board as numbers
from hvkvm.abi import pci
from hvkvm.abi.hpet import HPET_SIZE
from hvkvm.devices.hpet_timer import HpetState
from hvkvm.devices.mmio_bus import MmioBus
from hvkvm.devices.pci.board_functions import PowerManagement, host_bridge, isa_bridge
from hvkvm.devices.pci.bus import BusState, PciBus
from hvkvm.devices.pci.config_ports import Mechanism1
from hvkvm.devices.pci.nvme.saved import ControllerState
from hvkvm.devices.pci.power import PmBlocks
from hvkvm.devices.pci.virtio.saved import VirtioState
from hvkvm.errors import StateError, Stopped
from hvkvm.events import Warned
from hvkvm.machine.pci_kvm import Bell, MsiRoutes
from hvkvm.runtime.guard import fault_text
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.block.image import Image
    from hvkvm.devices.faulty_requests import Disk
    from hvkvm.devices.hpet import Hpet
    from hvkvm.devices.pci.nvme.controller import Controller
    from hvkvm.devices.pci.virtio.transport import Transport
    from hvkvm.machine.board import Board
    from hvkvm.machine.platform import Platform

MAX_VIRTIO_QUEUES = 4
"""Of one device: a queue for each vCPU, and so an interrupt there, up to this many."""


class PciState(NamedTuple):
    """The configuration address, every function's registers, the PM timer, and each device by its slot."""

    address: int
    bus: BusState
    pm_timer: int
    nvme: dict[int, ControllerState]
    virtio: dict[int, VirtioState] = {}
    hpet: HpetState | None = None


class Pci:
    """The bus. ConfigError where a device finds no slot."""

    name = "PCI"
    State = PciState

    def __init__(
        self, platform: Platform, board: Board, stack: ExitStack, *, cloud_firmware: bool = False
    ) -> None:
        """`cloud_firmware`: the kernel is OVMF for cloud-hypervisor, which looks for signs of that board."""
        vm = platform.vm
        if not isinstance(board.mmio, MmioBus) or not isinstance(board.pci_ports, Mechanism1):
            raise TypeError("a board made without PCI")
        self.mmio = board.mmio
        self.bus = PciBus(self.mmio, lambda gsi, level: vm.irq_line(gsi, int(level)))
        self._ports = board.pci_ports
        self._ports.bus = self.bus
        self.routes = MsiRoutes(vm, platform.gsi, platform.io)
        self.blocks = PmBlocks(board.ports, board.power, board.sleep)
        with_firmware = platform.config.firmware is not None
        self._pm = PowerManagement(
            self.blocks.move, power_on_base=None if with_firmware else numbers.PM1A_EVT_PORT
        )
        self._board = board
        self._be_board(cloud=cloud_firmware)
        self.bus.add_function(pci.ISA_BRIDGE_SLOT, 0, isa_bridge())
        self.bus.add_function(pci.ISA_BRIDGE_SLOT, pci.PM_FUNCTION, self._pm)
        self.blocks.move(self._pm.base)
        self._platform = platform
        self._stack = stack
        self._failing = threading.Lock()
        self.controllers: dict[int, Controller] = {}
        """NVMe controllers by slot."""
        self.virtio: dict[int, Transport] = {}
        """virtio devices by slot."""
        self.failed: dict[int, str] = {}
        """By slot: what the code of its device raised. Nobody answers there any more."""
        self.hpet: Hpet | None = None
        if platform.config.hpet == "on":
            self.hpet = self._add_hpet(board)

    def _be_board(self, *, cloud: bool) -> None:
        """Look, and go off, as cloud-hypervisor's board does, or as a PC. No vCPU runs."""
        bridge = host_bridge(pci.PCI_DEVICE_ID_CLOUDHV) if cloud else host_bridge()
        self.bus.set_function(pci.HOST_BRIDGE_SLOT, 0, bridge)
        self._board.power.on_sleep = self._board.sleep.on_power_off if cloud else None

    def _add_hpet(self, board: Board) -> Hpet:
        """It stands outside of PCI, but only on machines that are PCs as far as that."""
        from hvkvm.devices.hpet import Hpet
        from hvkvm.machine.pci_kvm import PitPlace

        platform, rtc = self._platform, board.rtc
        pit = PitPlace(platform.vm)

        def on_legacy(on: bool) -> None:
            pit.give_up(on)
            if rtc is not None:
                rtc.replaced = on

        hpet = Hpet(platform.io, lambda gsi, level: platform.vm.irq_line(gsi, int(level)), on_legacy)
        self.mmio.add(numbers.HPET_ADDRESS, HPET_SIZE, hpet)
        return hpet

    def add_nvme(self, disk: Disk, image: Image, *, name: str, serial: str) -> tuple[int, Controller]:
        """Plug in an NVMe controller with `disk` before the machine starts: its slot, and it. ConfigError."""
        from hvkvm.devices.pci.nvme.controller import Controller

        platform = self._platform
        controller = Controller(
            platform.memory,
            disk,
            platform.io,
            self.routes,
            make_bell=self._bell,
            name=name,
            serial=serial,
            sector_size=image.sector_size,
            read_only=image.read_only,
        )
        slot = self._plug(controller)
        self.controllers[slot] = controller
        return slot, controller

    def add_virtio_blk(self, disk: Disk, image: Image, *, name: str, serial: str) -> tuple[int, Transport]:
        """Plug in a virtio block device, likewise. ConfigError."""
        from hvkvm.devices.pci.virtio.blk import VirtioBlk
        from hvkvm.devices.pci.virtio.transport import Transport

        platform = self._platform
        device = VirtioBlk(
            disk,
            serial=serial,
            queues=min(platform.config.cpus, MAX_VIRTIO_QUEUES),
            sector_size=image.sector_size,
            read_only=image.read_only,
        )
        made = Transport(platform.memory, device, platform.io, self.routes, make_bell=self._bell, name=name)
        slot = self._plug(made)
        self.virtio[slot] = made
        return slot, made

    def _bell(self, gpa: int, size: int, rang: Callable[[], object]) -> Bell:
        return Bell(self._platform.vm, self._platform.io, gpa, size, rang)

    def _plug(self, device: Controller | Transport) -> int:
        slot = self.bus.plug(device)
        device.guard.attach(partial(self._fail, slot, device))
        device.on_intx = lambda level: self.bus.set_intx(slot, level)
        self._stack.callback(device.close)
        return slot

    def _fail(self, slot: int, device: Controller | Transport, error: Exception) -> None:
        """A device's code raised: its slot is empty for the rest of the run, and says why. Any thread."""
        with self._failing:
            if slot in self.failed:
                return
            self.failed[slot] = reason = fault_text(error)
        self.bus.end(slot)
        text = f"{device.name}, in PCI slot {slot:02x}: {reason}; the guest finds that slot empty from now on"
        self._platform.observer.event(Warned("PCI device failed", text))

        def give_back() -> None:
            with suppress(Exception):  # told already
                device.close()

        with suppress(Stopped):
            self._platform.io.call_soon(give_back)

    @property
    def _devices(self) -> list[Controller | Transport]:
        return [*self.controllers.values(), *self.virtio.values()]

    @property
    def pm_base(self) -> int:
        """Where the ACPI blocks are, or were to be if nobody has moved them."""
        return numbers.PM1A_EVT_PORT if self.blocks.base is None else self.blocks.base

    def start(self) -> None:
        """See `Part.start`."""
        for device in self._devices:
            device.guard.run(device.start)
        if self.hpet is not None:
            self.hpet.start()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`: every device has answered what it took."""
        if self.hpet is not None:
            self.hpet.stop()
        busy = list(self._devices)
        if not busy:
            done()
            return

        def stopped(device: Controller | Transport) -> None:
            if device in busy:  # one that fails in its `stop` may say so twice
                busy.remove(device)
                if not busy:
                    done()

        for device in self._devices:
            device.guard.run(device.stop, partial(stopped, device))
            if device.guard.failed:
                device.drain(partial(stopped, device))

    def reset(self) -> None:
        """See `Part.reset`."""
        self._ports.address = 0
        for device in self._devices:
            device.guard.run(device.reset)
        self.bus.reset()
        if self.hpet is not None:
            self.hpet.reset()
        self.blocks.move(self._pm.base)

    def save(self) -> PciState:
        """See `Part.save`. StateError where a device has failed: it would be there again when restored."""
        if self.failed:
            slot, reason = next(iter(self.failed.items()))
            raise StateError(f"{self.name}: the device in slot {slot:02x} has failed: {reason}")
        controllers = {slot: one.save() for slot, one in self.controllers.items()}
        virtio = {slot: one.save() for slot, one in self.virtio.items()}
        hpet = None if self.hpet is None else self.hpet.save()
        timer = self.blocks.timer.count
        return PciState(self._ports.address, self.bus.save(), timer, controllers, virtio, hpet)

    def load(self, state: PciState) -> None:
        """See `Part.load`."""
        try:
            if set(state.nvme) != set(self.controllers) or set(state.virtio) != set(self.virtio):
                raise ValueError("other disks were there when it was saved")
            if (self.hpet is None) != (state.hpet is None):
                raise ValueError("--hpet must be as it was when it was saved")
            # Not as the kernel's file would have it, which may be gone or another by now.
            bridge = state.bus.device_id(pci.HOST_BRIDGE_SLOT, 0)
            self._be_board(cloud=bridge == pci.PCI_DEVICE_ID_CLOUDHV)
            self.bus.load(state.bus)
            for slot, controller in self.controllers.items():
                controller.load(state.nvme[slot])
            for slot, device in self.virtio.items():
                device.load(state.virtio[slot])
            if self.hpet is not None and state.hpet is not None:
                self.hpet.load(state.hpet)
        except ValueError as error:
            raise StateError(f"{self.name}: {error}") from None
        self._ports.address = state.address
        self.blocks.timer.count = state.pm_timer
        self.blocks.move(self._pm.base)

    def inspect(self) -> dict[str, object]:
        """What sits where, and each device."""
        nvme = {f"{slot:02x}": one.inspect() for slot, one in self.controllers.items()}
        virtio = {f"{slot:02x}": one.inspect() for slot, one in self.virtio.items()}
        found: dict[str, object] = {"functions": self.bus.inspect(), "nvme": nvme, "virtio": virtio}
        found["failed"] = {f"{slot:02x}": reason for slot, reason in list(self.failed.items())}
        if self.hpet is not None:
            found["hpet"] = self.hpet.inspect()
        return found
