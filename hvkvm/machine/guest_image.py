"""What is loaded into guest RAM: a kernel, and an initial RAM disk made as the configuration asks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvkvm import __version__, given_file
from hvkvm.abi import board
from hvkvm.errors import BootError, ConfigError, HvkvmError
from hvkvm.machine import boot_again
from hvkvm.machine.config import MachineConfig

if TYPE_CHECKING:
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.memory.guest import GuestMemory
    from hvkvm.state.manifest import SavedBoot


class GuestImage:
    """What is loaded into guest RAM, at start and again at every reset, of the machine called `name`.

    `boot` is what the file of a saved machine says was booted, for one that goes on from it. A copy of a
    warm guest that is reset boots for its command, like a guest that was never warm.
    """

    def __init__(self, config: MachineConfig, name: str, boot: SavedBoot | None = None) -> None:
        self._name = name
        self._boot = boot
        self._config = config if boot is None else boot_again.configuration(config, boot)
        self._again = boot_again.handed_command(config, self._config)
        self._handed_files = config.warm is not None and bool(config.files)
        # One that goes on from a file needs it at its first reset, if at all.
        self._made = config.saved is None
        self._initrd = initial_ramdisk(config) if self._made else None
        self.shadow = b""
        """What firmware is seen of below 1 MiB when a CPU starts; `Firmware` sets it."""

    def initrd(self) -> bytes | Path | None:
        """The initial RAM disk, made now if it was not needed before. ConfigError."""
        if not self._made:
            self._initrd, self._made = initial_ramdisk(self._again), True
        return self._initrd

    def recipe(self) -> SavedBoot | None:
        """What a file of the machine says of it; None where a reset ends the run. OSError."""
        if self._config.saved is None and self._boot is None:
            self._boot = boot_again.recipe(self._config, self._initrd)
        return None if self._handed_files else self._boot

    def why_not_again(self) -> str:
        """Why a reset cannot boot it; "" where it can. It reads files for a machine that was saved."""
        if self._config.saved is None or self._boot is None:
            return ""
        try:
            why = boot_again.why_no_kernel(self._boot, self._config.memory)
            if not (why or self._made):
                booted = initial_ramdisk(self._config)
                why = boot_again.why_no_ramdisk(self._boot, booted)
                if not why and self._again is self._config:
                    self._initrd, self._made = booted, True
                elif not why:
                    self.initrd()
            return why
        except (OSError, ValueError, HvkvmError) as error:
            return str(error)

    def load(self, memory: GuestMemory, vcpus: Sequence[Vcpu]) -> str:
        """Write it and set the registers of the boot vCPU, the first; returns what was loaded. BootError.

        Memory is left as it is: a reset does not clear RAM. With firmware the vCPU starts in the ROM as it
        is at power-on, and finds its end below 1 MiB, too: a BIOS jumps there by its first instruction.
        """
        if self._config.firmware is not None or self._config.kernel is None:
            if self.shadow:
                memory.write(board.FIRMWARE_SHADOW_END - len(self.shadow), self.shadow)
            return "firmware"
        from hvkvm.boot.entry import make_memory_cacheable
        from hvkvm.boot.image import load
        from hvkvm.boot.linux import default_cmdline
        from hvkvm.boot.smbios import placed

        entry = load(
            memory,
            self._config.kernel,
            initrd=self.initrd(),
            cmdline=self._config.append,
            defaults=default_cmdline(self._config.serial_ports),
            cpus=self._config.cpus,
            acpi=self._config.acpi,
            vmbus=self._config.vmbus == "on",
            serial_ports=self._config.serial_ports,
            pci=self._config.has_pci,
            hpet=self._config.hpet == "on",
            smbios=placed(self._name, self._config.cpus, self._config.memory, __version__),
        )
        entry.apply(vcpus[0])
        for vcpu in vcpus:
            make_memory_cacheable(vcpu)
        return entry.what


def initial_ramdisk(config: MachineConfig) -> bytes | Path | None:
    """The user's initrd with an archive behind it that runs the command; a shell where there is neither.

    Without a command the init of an initrd, or of the root file system that the kernel was told, keeps
    its place: files are added to an initrd, and nothing would load modules. ConfigError.
    """
    if config.kernel is None:
        if config.command or config.modules or config.files or config.initrd is not None:
            raise ConfigError(
                "--initrd, --module, --file and a command need --kernel; give one, or leave them out"
            )
        return None
    from hvkvm.boot.image import is_linux
    from hvkvm.boot.linux import parameter

    told_root = bool(parameter(config.append, "root"))
    if told_root and is_linux(config.kernel) and (archive := _root_ramdisk(config)) is not None:
        return archive
    added = bool(config.command or config.awaits or config.modules or config.files)
    if not added and (config.initrd is not None or told_root):
        return config.initrd
    if not is_linux(config.kernel):
        if config.awaits:
            what = "takes no initramfs, which waits for the command"
            raise ConfigError(f"--kernel {config.kernel}: {what}; name a Linux kernel")
        if config.command or config.files:
            raise ConfigError(
                f"--kernel {config.kernel}: takes no initramfs for a command or files; leave them out"
            )
        return config.initrd
    from hvkvm.boot import initramfs
    from hvkvm.boot.command_files import pack_files

    if not (config.command or config.awaits) and (config.initrd is not None or told_root):
        _check_needs_no_command(config)
        archive = pack_files(dict(config.files))
    else:
        archive = initramfs.build(
            config.command or None,
            busybox=config.busybox or find_busybox(),
            modules=config.modules,
            kernel_modules_dir=config.modules_dir,
            files=dict(config.files),
            command_io=config.command_io,
            vsock=config.vmbus == "on",
            terminal_type=os.environ.get("TERM"),
            awaits=config.awaits,
        )
    if config.initrd is None:
        return archive
    # The kernel unpacks archives one behind the other; later files win. cpio pads to 512.
    first = read_initrd(config.initrd)
    return first + bytes(-len(first) % 512) + archive


def _root_ramdisk(config: MachineConfig) -> bytes | None:
    """The initramfs that mounts the root where the kernel cannot do so by itself. ConfigError."""
    from hvkvm.machine.root import told

    root = told(config)
    if root is None:
        return None
    if config.files:
        raise ConfigError(
            "--file: the file system of root= has its own init; add a command, such as `-- sh`: our init"
            " then takes its place"
        )
    from hvkvm.boot import initramfs

    drivers = {"nvme": ("nvme",), "virtio": ("virtio_pci", "virtio_blk")}
    buses = dict.fromkeys(config.bus_of(disk) for disk in config.disks)
    needed = [name for bus in buses for name in drivers.get(bus, ())]
    return initramfs.build_root(
        root,
        busybox=config.busybox or find_busybox(),
        modules=(*needed, *config.modules),
        kernel_modules_dir=config.modules_dir,
    )


def _check_needs_no_command(config: MachineConfig) -> None:
    """ConfigError for what only a command's init would make use of."""
    if config.initrd is None:
        flag, why = ("--module" if config.modules else "--file"), "the file system of root= has its own init"
    elif config.modules:
        flag, why = "--module", f"the init of --initrd {config.initrd} loads none of ours"
    else:
        return
    raise ConfigError(f"{flag}: {why}; add a command, such as `-- sh`: our init then takes its place")


def find_busybox() -> Path:
    """A static busybox on this host. ConfigError when there is none."""
    for name in ("busybox-static", "busybox"):
        for folder in os.get_exec_path():
            found = os.path.join(folder, name)
            # As shutil.which, which imports compressors.
            if os.path.isfile(found) and os.access(found, os.X_OK):
                return Path(found)
    raise ConfigError("--busybox: no busybox in PATH; install the busybox-static package or name one")


def read_initrd(path: Path) -> bytes:
    """The user's own. BootError."""
    try:
        return given_file.read(path)
    except OSError as error:
        raise BootError(f"--initrd {path}: {error.strerror}; check the path") from None
