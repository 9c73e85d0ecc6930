"""`MachineConfig`: what a machine is made of, and the one table of its fields.

The command line (`cli/run.py`), TOML files and the checks all come from this table; `config_fields`
says what a row has. Every check that needs no kernel call is made by `validate()`, and names the
flag, the reason and the remedy, whichever way the value came in.
"""

# No `from __future__ import annotations`: the annotations are the table, and read at run time.

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from hvkvm.abi.guest_command import SERIAL_PORTS, CommandIo
from hvkvm.abi.vmbus import HOST_VERSIONS, version_text
from hvkvm.errors import ConfigError
from hvkvm.machine import config_checks as checks
from hvkvm.machine.config_fields import Field, check_values, fields_of, read_table
from hvkvm.machine.config_kinds import (
    MIB,
    AutoFile,
    Choice,
    File,
    GuestFiles,
    Kind,
    Number,
    OnOff,
    PathName,
    PathText,
    Seconds,
    Size,
    Words,
)
from hvkvm.machine.config_words import Structured
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.machine.disk_spec import CdromSpec, DiskSpec
    from hvkvm.machine.nic_spec import NicSpec
    from hvkvm.machine.record_spec import RecordSpec

Who = Literal["auto", "kernel", "user"]
WHO = get_args(Who)
VMBUS_VERSIONS = tuple(map(version_text, HOST_VERSIONS))


class MachineConfig(NamedTuple):
    """A machine's description; immutable, checked by `validate()`.

    `memory` is in bytes, `timeout` in seconds. `hv` takes QEMU's hv-* names
    ("host-model", "windows", "passthrough", "none" or a list), `cpu` the features to hide from the guest
    ("host" or "host,-cx16,..."). `command` is run inside
    the guest by an initramfs built for it, with `files` in it: pairs of a guest
    path and a file of this host. `command_io` says where its input and output lead: to
    the console, to streams of their own (`machine.command`) or to a terminal of its own;
    `hvkvm run` chooses that by itself. `vsock` is the Unix socket through which
    host programs reach the guest's AF_VSOCK ports. `control` is "off", "auto" or the
    path of the control socket, `name` what `hvkvm ctl --vm` calls the machine ("":
    hvkvm-PID). `signal_path` chooses who answers HvSignalEvent: KVM_HYPERV_EVENTFD or
    the userspace table. `restore` is the file of a saved machine to go on from, which then
    decides what the guest sees: kernel, cpus, memory, enlightenments and devices. `warm` is such a
    file, of a guest that waits for a command (`hvkvm.warm`), and which `command` runs in. `awaits` makes
    a guest such a one: it boots, loads its modules and waits.
    `firmware` ("auto" or a file) takes the kernel's place as what the machine starts; where both are left
    out and a disk can be booted, it is "auto". `pci` gives it a PCI
    bus even if no device needs one. `apic_bus_ns` makes the local APICs' timers count that many
    nanoseconds a tick, not 1 (KVM_CAP_X86_APIC_BUS_CYCLES_NS; 0: KVM's own): only a nested lab needs that.
    """

    kernel: Annotated[
        Path | None,
        Field(PathName(), "--kernel FILE", "bzImage, vmlinux, PVH ELF or multiboot image", in_saved=True),
    ] = None
    initrd: Annotated[
        Path | None,
        Field(File(), "--initrd FILE", "initial RAM disk; `-- command` is added to it", boot_only=True),
    ] = None
    append: Annotated[
        str,
        Field(
            Kind(),
            "--append TEXT",
            "kernel command line, behind hvkvm's own defaults",
            checks.append,
            in_saved=True,
        ),
    ] = ""
    cpus: Annotated[int, Field(Number(2), "--cpus N", "vCPUs (1)", checks.cpus, in_saved=True)] = 1
    cpu: Annotated[
        str,
        Field(
            Kind(),
            "--cpu host,-NAME",
            "hide CPU features, by /proc/cpuinfo's names: host,-cx16 (host)",
            checks.cpu,
            in_saved=True,
        ),
    ] = "host"
    memory: Annotated[
        int,
        Field(
            Size(),
            "--memory SIZE",
            "guest RAM: 512M, 2G, 0.5G; a bare number is MiB (512M)",
            checks.memory,
            in_saved=True,
        ),
    ] = 512 * MIB
    hv: Annotated[
        str,
        Field(
            Kind(),
            "--hv LIST",
            "host-model, windows, passthrough, none, or QEMU's hv-* names (host-model)",
            in_saved=True,
        ),
    ] = "host-model"
    synic: Annotated[
        Who,
        Field(
            Choice(WHO),
            "--synic auto|kernel|user",
            "who emulates Hyper-V: KVM, or hvkvm in user space on any KVM (auto: KVM where it can)",
            in_saved=True,
        ),
    ] = "auto"
    signal_path: Annotated[
        Who,
        Field(
            Choice(WHO),
            "--signal-path auto|kernel|user",
            "who answers HvSignalEvent: KVM_HYPERV_EVENTFD or the userspace table (auto)",
        ),
    ] = "auto"
    devices: Annotated[
        tuple[str, ...],
        Field(
            Words(),
            "--device NAME",
            f"add a device: {', '.join(checks.KNOWN_DEVICES)}",
            checks.devices,
            in_saved=True,
        ),
    ] = ()
    vmbus: Annotated[
        Literal["on", "off"],
        Field(
            Choice(("on", "off")),
            "--vmbus on|off",
            "a VMBus host with heartbeat, shutdown and time (off)",
            in_saved=True,
        ),
    ] = "off"
    vmbus_max_version: Annotated[
        str,
        Field(
            Choice(VMBUS_VERSIONS),
            "--vmbus-max-version X.Y",
            f"the newest VMBus version the host speaks ({VMBUS_VERSIONS[-1]})",
            in_saved=True,
        ),
    ] = VMBUS_VERSIONS[-1]
    nets: Annotated[
        tuple["NicSpec", ...],
        Field(
            Structured("hvkvm.machine.nic_spec", "NicSpec"),
            "--net WIRE,key=value,...",
            "a NIC on hv_netvsc that leads to user, create, tap=NAME, fd=N, socket=PATH or listen=PATH",
        ),
    ] = ()
    disks: Annotated[
        tuple["DiskSpec", ...],
        Field(
            Structured("hvkvm.machine.disk_spec", "DiskSpec"),
            "--disk FILE,key=value,...",
            "a disk on hv_storvsc or NVMe: raw, VHDX or nbd:...",
            in_saved=True,
        ),
    ] = ()
    cdroms: Annotated[
        tuple["CdromSpec", ...],
        Field(
            Structured("hvkvm.machine.disk_spec", "CdromSpec"),
            "--cdrom ISO,key=value,...",
            "a DVD drive with this medium, or none",
            in_saved=True,
        ),
    ] = ()
    cloud_init: Annotated[
        Path | None,
        Field(
            PathName(),
            "--cloud-init DIR",
            "a medium with DIR's user-data and meta-data, for an image that runs cloud-init",
            boot_only=True,
        ),
    ] = None
    vsock: Annotated[
        Path | None,
        Field(
            PathName(),
            "--vsock PATH",
            "Unix socket that leads to the guest's AF_VSOCK ports; PATH_PORT takes what the guest connects",
        ),
    ] = None
    control: Annotated[
        str,
        Field(
            PathText("auto", "off"),
            "--control PATH|auto|off",
            "the socket by which `hvkvm ctl` reaches this VM (auto)",
            checks.control,
        ),
    ] = "off"
    name: Annotated[
        str, Field(Kind(), "--name NAME", "what `hvkvm ctl --vm` calls this VM (hvkvm-PID)", checks.name)
    ] = ""
    acpi: Annotated[
        bool, Field(OnOff(False), "--no-acpi", "give the guest no ACPI tables", in_saved=True)
    ] = True
    reboot: Annotated[
        bool, Field(OnOff(False), "--no-reboot", "a guest reset ends the run with status 0")
    ] = True
    timeout: Annotated[
        float | None,
        Field(
            Seconds(30), "--timeout SECONDS", "end the run after this long, with status 124", checks.timeout
        ),
    ] = None
    kvm_path: Annotated[str, Field(PathText(), "--kvm PATH", "the KVM device (/dev/kvm)")] = "/dev/kvm"
    command: Annotated[tuple[str, ...], Field(Words(), boot_only=True)] = ()
    command_io: Annotated[CommandIo, Field(Choice(get_args(CommandIo)))] = "console"
    modules_dir: Annotated[
        Path | None,
        Field(
            PathName(),
            "--modules-dir DIR",
            "the guest kernel's lib/modules/VERSION folder",
            checks.modules_dir,
        ),
    ] = None
    modules: Annotated[
        tuple[str, ...], Field(Words(), "--module NAME", "load this module at start", boot_only=True)
    ] = ()
    busybox: Annotated[
        Path | None, Field(File(), "--busybox FILE", "a static busybox for the guest (found in PATH)")
    ] = None
    files: Annotated[
        tuple[tuple[str, Path], ...],
        Field(GuestFiles(), "--file GUEST=HOST", "put a file of this host into the guest", boot_only=True),
    ] = ()
    firmware: Annotated[
        "str | Path | None",
        Field(
            AutoFile(),
            "--firmware auto|FILE",
            "boot by UEFI firmware: the ovmf package's (auto), or an image that ends at 4 GiB",
            in_saved=True,
        ),
    ] = None
    firmware_vars: Annotated[
        Path | None,
        Field(
            PathName(),
            "--firmware-vars FILE",
            "keep the firmware's variables in this file, which is made if it is not there",
            checks.firmware_vars,
        ),
    ] = None
    display: Annotated[
        Literal["auto", "ramfb", "none"],
        Field(
            Choice(("auto", "ramfb", "none")),
            "--display auto|ramfb|none",
            "a framebuffer, which `hvkvm ctl screenshot` shows (auto: with --hv windows)",
            in_saved=True,
        ),
    ] = "auto"
    hpet: Annotated[
        Literal["on", "off"],
        Field(
            Choice(("on", "off")),
            "--hpet on|off",
            "a High Precision Event Timer, on a machine with PCI (off)",
            in_saved=True,
        ),
    ] = "off"
    pci: Annotated[bool, Field(OnOff())] = False
    apic_bus_ns: Annotated[int, Field(Number(20), check=checks.apic_bus_ns, in_saved=True)] = 0
    record: Annotated[
        "tuple[RecordSpec, ...]",
        Field(
            Structured("hvkvm.machine.record_spec", "RecordSpec"),
            "--record FILE[,depth=D]",
            "record the VMBus as pcapng, for `hvkvm explain` and Wireshark",
        ),
    ] = ()
    timeline: Annotated[
        Path | None,
        Field(
            PathName(),
            "--timeline FILE.svg|FILE.json",
            "draw the run: phases of the boot, exits, channels; JSON is for Perfetto",
            checks.timeline,
        ),
    ] = None
    restore: Annotated[
        Path | None, Field(File(), "--restore FILE", "go on from a saved VM; see `hvkvm ctl save`")
    ] = None
    warm: Annotated[
        Path | None, Field(File(), "--from FILE", "run the command in a copy of a warm guest: `hvkvm warm`")
    ] = None
    awaits: Annotated[bool, Field(OnOff())] = False

    def validate(self) -> "MachineConfig":
        """Return self, or raise ConfigError for the first value that cannot work."""
        check_values(self)
        checks.together(self)
        return self

    @property
    def saved(self) -> Path | None:
        """The file of a saved machine that this one goes on from."""
        return self.warm or self.restore

    @property
    def has_streams(self) -> bool:
        """Whether its command has streams or a terminal of its own, which lead to this run."""
        return bool(self.command) and self.command_io != "console"

    @property
    def serial_ports(self) -> int:
        """How many serial ports the machine has: COM1, and those that a command's streams may need."""
        return 1 + (SERIAL_PORTS if self.awaits or self.has_streams else 0)

    @property
    def has_pci(self) -> bool:
        """Whether the machine has a PCI bus."""
        asked = self.pci or self.hpet == "on" or self.firmware is not None
        return asked or any(self.bus_of(one) != "vmbus" for one in self.media)

    @property
    def has_display(self) -> bool:
        """Whether there is a framebuffer: on demand, and for Windows, which does not run without."""
        wanted = self.display == "ramfb" or (self.display == "auto" and "windows" in self.hv.split(","))
        return wanted and self.firmware is not None

    @property
    def starts_firmware(self) -> bool:
        """Whether it starts in firmware: because it was told so, or since there are disks and no kernel.

        Then `machine.boot_choice` has still to look at the disks.
        """
        if self.firmware is not None:
            return True
        media = bool(self.disks) or any(drive.file for drive in self.cdroms)
        return media and not (self.kernel or self.saved or self.awaits or self.command)

    @property
    def media(self) -> "list[DiskSpec | CdromSpec]":
        """All disks and drives."""
        return [*self.disks, *self.cdroms]

    def bus_of(self, one: "DiskSpec | CdromSpec") -> str:
        """Where the guest finds a disk: as it says, or where what boots can read it.

        A drive without a medium is on the VMBus, where a medium can come.
        """
        return one.bus or ("nvme" if self.starts_firmware and one.file else "vmbus")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], folder: Path | None = None) -> "MachineConfig":
        """Build from plain values (a TOML table); relative paths start at `folder`.

        Raises ConfigError for unknown keys or wrong types, and as `validate` does.
        """
        read = read_table(cls, values, folder)
        if (file := read.get("restore") or read.get("warm")) is not None:
            if key := cls.decided_by_file(read):
                by = "restore" if "restore" in read else "warm"
                raise ConfigError(f"config key {by}: {file}: the file decides {key}; leave it out")
            read.setdefault("kernel", file)
        if not read.keys() & {"kernel", "firmware", "disks", "cdroms"}:
            raise ConfigError("config key kernel: missing; name the guest kernel's file, or give firmware")
        return cls(**read).validate()

    @classmethod
    def from_toml(cls, path: Path) -> "MachineConfig":
        """Read a TOML file whose top-level keys are this class's fields; relative paths start at the file."""
        from hvkvm.machine.toml_file import read_toml

        return cls.from_mapping(read_toml(path, f"--config {path}"), path.parent)

    @classmethod
    def read_toml(cls, path: Path) -> dict[str, Any]:
        """The fields that a TOML file gives, not checked beside one another; otherwise as `from_toml`."""
        from hvkvm.machine.toml_file import read_toml

        return read_table(cls, read_toml(path, f"--config {path}"), path.parent)

    @classmethod
    def decided_by_file(cls, given: Mapping[str, Any]) -> str:
        """The first key of `given` that a saved machine has already; "" where none is.

        A kernel may be named: the same table may be that of the machine that is booted.
        """
        decided = (key for key, field in fields_of(cls).items() if field.in_saved and key != "kernel")
        return next((key for key in decided if key in given), "")
