"""The machine's firmware: its image below 4 GiB, and what it is told by fw_cfg.

A `part.Part`. Made by `Machine` before the vCPUs run, on machines that start in firmware. The ACPI tables are
made when firmware asks for them: by then it has said at which ports it wants the ACPI blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from hvkvm.abi import board as numbers
from hvkvm.abi.kvm import KVM_CAP_READONLY_MEM
from hvkvm.boot import acpi, table_loader
from hvkvm.boot import firmware as images
from hvkvm.boot.acpi_pci import host_bridge
from hvkvm.devices.port.fw_cfg import FirmwareFwCfg
from hvkvm.errors import CapabilityMissing, StateError
from hvkvm.memory.rom import Rom

if TYPE_CHECKING:
    from hvkvm.machine.board import Board
    from hvkvm.machine.build import GuestImage
    from hvkvm.machine.pci import Pci
    from hvkvm.machine.platform import Platform


class FirmwareState(NamedTuple):
    """Which image it was: the guest still runs code out of it."""

    sha256: bytes


class Firmware:
    """The ROM and fw_cfg's files. BootError for an image that is none, CapabilityMissing."""

    name = "firmware"
    State = FirmwareState

    def __init__(
        self, platform: Platform, board: Board, pci: Pci, image: GuestImage, stack: ExitStack
    ) -> None:
        config = platform.config
        if config.firmware is None or not isinstance(board.fw_cfg, FirmwareFwCfg):
            raise TypeError("a board made without firmware")
        if not platform.vm.check_extension(KVM_CAP_READONLY_MEM):
            raise CapabilityMissing(
                "--firmware: this kernel's KVM has no read-only memory (KVM_CAP_READONLY_MEM)"
            )
        self.path = images.find(config.firmware)
        content = images.read(self.path)
        self._sha256 = hashlib.sha256(content).digest()
        self.rom = Rom(platform.memory, numbers.FIRMWARE_END - len(content), content)
        stack.callback(self.rom.close)
        self._platform = platform
        self._pci = pci
        self._add_files(board.fw_cfg)

    def _add_files(self, fw_cfg: FirmwareFwCfg) -> None:
        config = self._platform.config
        fw_cfg.add_file("etc/e820", images.e820(config.memory))
        if not config.acpi:
            return
        made = self._tables()
        fw_cfg.add_file(table_loader.RSDP_FILE, lambda: self._tables().rsdp, len(made.rsdp))
        fw_cfg.add_file(table_loader.TABLES_FILE, lambda: self._tables().tables, len(made.tables))
        fw_cfg.add_file(table_loader.LOADER_FILE, made.loader)

    def _tables(self) -> table_loader.LoaderFiles:
        config = self._platform.config
        fixed = acpi.FixedHardware(self._pci.pm_base, pm_timer=True)

        def build(address: int) -> acpi.AcpiTables:
            return acpi.build(
                config.cpus,
                config.memory,
                serial_ports=config.serial_ports,
                devices=[host_bridge(config.memory)],
                fixed=fixed,
                address=address,
            )

        return table_loader.split(build)

    def start(self) -> None:
        """See `Part.start`."""

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`."""
        done()

    def reset(self) -> None:
        """See `Part.reset`: a ROM does not change."""

    def save(self) -> FirmwareState:
        """See `Part.save`."""
        return FirmwareState(self._sha256)

    def load(self, state: FirmwareState) -> None:
        """See `Part.load`."""
        if state.sha256 != self._sha256:
            raise StateError(f"--firmware {self.path}: not the image that the machine was saved with")
