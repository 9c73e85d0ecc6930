"""The machine's firmware: its image below 4 GiB, and what it is told by fw_cfg.

A `part.Part`. Made by `Machine` before the vCPUs run, on machines that start in firmware. The ACPI tables are
made when firmware asks for them: by then it has said at which ports it wants the ACPI blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hvkvm import __version__
from hvkvm.abi import board as numbers
from hvkvm.abi import fw_cfg as keys
from hvkvm.abi.kvm import KVM_CAP_READONLY_MEM
from hvkvm.boot import acpi, acpi_pci, smbios, table_loader
from hvkvm.boot import firmware as images
from hvkvm.boot.linux import default_cmdline
from hvkvm.boot.variables_file import VariablesFile
from hvkvm.devices.flash import Flash, FlashState, WriteProtected
from hvkvm.devices.port.fw_cfg import FirmwareFwCfg
from hvkvm.errors import CapabilityMissing, StateError
from hvkvm.machine.firmware_vars import KeptVariables
from hvkvm.memory.rom import Rom
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.ramfb import Ramfb
    from hvkvm.machine.board import Board
    from hvkvm.machine.disk_shelf import DiskShelf
    from hvkvm.machine.guest_image import GuestImage
    from hvkvm.machine.pci import Pci
    from hvkvm.machine.platform import Platform


class FirmwareState(NamedTuple):
    """Which code it was, as the guest still runs it, and the flash with the variables if there is one."""

    sha256: bytes
    flash: FlashState | None
    display: bytes | None = None
    """What the guest has said of its framebuffer; None where it can have none."""


class Firmware:
    """The ROM and fw_cfg's files. BootError for an image that is none, CapabilityMissing."""

    name = "firmware"
    State = FirmwareState

    def __init__(
        self,
        platform: Platform,
        board: Board,
        pci: Pci,
        shelf: DiskShelf | None,
        image: GuestImage,
        machine_name: str,
        stack: ExitStack,
    ) -> None:
        config = platform.config
        if config.firmware is None or not isinstance(board.fw_cfg, FirmwareFwCfg):
            raise TypeError("a board made without firmware")
        if not platform.vm.check_extension(KVM_CAP_READONLY_MEM):
            raise CapabilityMissing("--firmware: this kernel's KVM lacks KVM_CAP_READONLY_MEM; use Linux 3.7")
        self._platform = platform
        self._pci = pci
        self.path = images.find(config.firmware)
        code = images.read(self.path)
        self.flash: Flash | None = None
        self.variables: KeptVariables | None = None
        if config.firmware_vars is not None:
            code, template = images.split(self.path, code)
            file = VariablesFile(config.firmware_vars, template)
            stack.callback(file.close)
            self.flash = flash = self._add_flash(file.content, numbers.FIRMWARE_END - len(code), stack)
            self.variables = KeptVariables(file, flash, platform.io, platform.observer)
            flash.on_change = self.variables.changed
            stack.callback(self.variables.close)
        elif self._writes_would_hurt() and images.variables_size(code):
            code, template = images.split(self.path, code)
            self.flash = self._add_flash(template, numbers.FIRMWARE_END - len(code), stack)
        self._sha256 = hashlib.sha256(code).digest()
        self.rom = Rom(platform.memory, numbers.FIRMWARE_END - len(code), code)
        stack.callback(self.rom.close)
        image.shadow = code[-numbers.FIRMWARE_SHADOW_SIZE :]
        pci.mmio.add(self.rom.gpa, self.rom.size, WriteProtected())
        self.display: Ramfb | None = None
        if config.has_display:
            self._add_display(board.fw_cfg)
        self._add_files(board.fw_cfg, shelf, machine_name)
        if config.kernel is not None:
            self._add_kernel(board.fw_cfg, config.kernel, image)

    def _writes_would_hurt(self) -> bool:
        """Whether there is a medium that OVMF cannot boot from once it has tried to write to it.

        Without a flash OVMF keeps variables in a file on the first FAT file system. It takes NVMe for
        writable always, and its FAT driver opens nothing more after a write that failed.
        """
        config = self._platform.config
        return any(one.options.read_only and config.bus_of(one) == "nvme" for one in config.media)

    def _add_flash(self, content: bytes, end: int, stack: ExitStack) -> Flash:
        rom = Rom(self._platform.memory, end - len(content), content)
        stack.callback(rom.close)
        flash = Flash(rom)
        self._pci.mmio.add(rom.gpa, rom.size, flash)
        return flash

    def _add_display(self, fw_cfg: FirmwareFwCfg) -> None:
        from hvkvm.devices.ramfb import Ramfb

        self.display = display = Ramfb()
        size = len(display.content)
        fw_cfg.add_writable(keys.RAMFB_FILE, size, lambda: display.content, display.write)

    def _add_files(self, fw_cfg: FirmwareFwCfg, shelf: DiskShelf | None, machine_name: str) -> None:
        config = self._platform.config
        fw_cfg.add_file("etc/e820", images.e820(config.memory))
        made = smbios.build(machine_name, config.cpus, config.memory, __version__)
        fw_cfg.add_file(smbios.ANCHOR_FILE, made.anchor)
        fw_cfg.add_file(smbios.TABLES_FILE, made.tables)
        if shelf is not None and shelf.pci_disks is not None:
            order = shelf.pci_disks.boot_order()
            fw_cfg.add_file("bootorder", "\n".join(order).encode() + b"\0")
        if not config.acpi:
            return
        tables = self._tables()
        fw_cfg.add_file(table_loader.RSDP_FILE, lambda: self._tables().rsdp, len(tables.rsdp))
        fw_cfg.add_file(table_loader.TABLES_FILE, lambda: self._tables().tables, len(tables.tables))
        fw_cfg.add_file(table_loader.LOADER_FILE, tables.loader)

    def _add_kernel(self, fw_cfg: FirmwareFwCfg, kernel: Path, image: GuestImage) -> None:
        """Have firmware start a kernel: it reads it, its initrd and its command line by fw_cfg."""
        from hvkvm.machine.guest_image import read_initrd

        config = self._platform.config
        parts = images.kernel_parts(kernel)
        initrd = image.initrd() or b""
        if isinstance(initrd, Path):
            initrd = read_initrd(initrd)
        line = f"{default_cmdline(config.serial_ports)} {config.append}".strip()
        cmdline = line.encode("utf-8", "surrogateescape") + b"\0"
        for size_key, data_key, content in (
            (keys.FW_CFG_SETUP_SIZE, keys.FW_CFG_SETUP_DATA, parts.setup),
            (keys.FW_CFG_KERNEL_SIZE, keys.FW_CFG_KERNEL_DATA, parts.kernel),
            (keys.FW_CFG_INITRD_SIZE, keys.FW_CFG_INITRD_DATA, initrd),
            (keys.FW_CFG_CMDLINE_SIZE, keys.FW_CFG_CMDLINE_DATA, cmdline),
        ):
            fw_cfg.add_item(size_key, len(content).to_bytes(4, "little"))
            fw_cfg.add_item(data_key, bytes(content))

    def _tables(self) -> table_loader.LoaderFiles:
        config = self._platform.config
        hpet = config.hpet == "on"
        fixed = acpi.FixedHardware(self._pci.pm_base, is_pc=True, has_hpet=hpet)

        def build(address: int) -> acpi.AcpiTables:
            return acpi.build(
                config.cpus,
                config.memory,
                serial_ports=config.serial_ports,
                devices=acpi_pci.devices(config.memory, hpet=hpet),
                fixed=fixed,
                address=address,
                generation=False,  # its page is the firmware's own here
            )

        return table_loader.split(build)

    @property
    def unkept(self) -> str:
        """Why variables that the guest has changed are in no file; empty where they are, or need not be."""
        return "" if self.variables is None else self.variables.unkept

    def start(self) -> None:
        """See `Part.start`."""

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`."""
        done()

    def reset(self) -> None:
        """See `Part.reset`: code and variables stay as they are."""
        if self.flash is not None:
            self.flash.reset()
        if self.display is not None:
            self.display.reset()

    def save(self) -> FirmwareState:
        """See `Part.save`."""
        flash = None if self.flash is None else self.flash.save()
        return FirmwareState(self._sha256, flash, None if self.display is None else self.display.content)

    def load(self, state: FirmwareState) -> None:
        """See `Part.load`."""
        # First: an image whose variables are apart is another one.
        if (self.flash is None) != (state.flash is None):
            raise StateError(f"{self.name}: --firmware-vars must be given as it was when saved")
        if state.sha256 != self._sha256:
            raise StateError(f"--firmware {self.path}: not the image that the machine was saved with")
        if (self.display is None) != (state.display is None):
            raise StateError(f"{self.name}: a framebuffer on one side only")
        try:
            if self.flash is not None and state.flash is not None:
                self.flash.load(state.flash)
            if self.display is not None and state.display is not None:
                self.display.load(state.display)
        except ValueError as error:
            raise StateError(f"{self.name}: {error}") from None
        if self.variables is not None:
            self.variables.changed()

    def end(self, done: Callable[[], object]) -> None:
        """The run ends: keep the variables."""
        if self.variables is None:
            done()
        else:
            self.variables.keep(done)
