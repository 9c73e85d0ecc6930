"""What a machine is made of: `MachineConfig`, from keywords, TOML or the command line.

Every check that needs no kernel call lives here and names the flag, the reason
and the remedy, whichever way the value came in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hvkvm.abi.guest_command import SERIAL_PORTS
from hvkvm.abi.vmbus import HOST_VERSIONS, version_text
from hvkvm.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30
MIN_MEMORY = 8 * MIB
MAX_MEMORY = 512 * GIB
MAX_CPUS = 254
"""Above 254 an APIC id needs 32-bit destinations (KVM_CAP_X2APIC_API) everywhere."""

KNOWN_DEVICES = ("hyperv-testdev",)
SYNIC_CHOICES = ("auto", "kernel", "user")
SIGNAL_CHOICES = ("auto", "kernel", "user")
VMBUS_CHOICES = ("on", "off")
COMMAND_IO_CHOICES = ("console", "streams", "terminal")
MAX_NAME = 48
"""Characters of a VM's name: its socket's path must stay short."""
VMBUS_VERSIONS = tuple(map(version_text, HOST_VERSIONS))

_UNITS = {"": MIB, "b": 1, "k": 1 << 10, "m": MIB, "g": GIB, "t": 1 << 40}


def parse_size(text: str, flag: str = "--memory") -> int:
    """Bytes in `text`: "512M", "1.5G", "300MiB"; a bare number is MiB. Raises ConfigError naming `flag`."""
    body = text.strip().lower().removesuffix("ib")
    if len(body) > 1 and body[-1] == "b" and not body[-2].isdigit():
        body = body[:-1]
    number, unit = (body[:-1], body[-1]) if body and body[-1] in _UNITS else (body, "")
    try:
        value = float(number) if "." in number else int(number, 10)
        size = value * _UNITS[unit]
        if not 0 <= size < 1 << 63:
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(f"{flag} {text}: not a size; write a number with K, M or G, such as 512M") from None
    return int(size)


class MachineConfig(NamedTuple):
    """A machine's description; immutable, checked by `validate()`.

    `memory` is in bytes, `timeout` in seconds. `hv` takes QEMU's hv-* names
    ("host-model", "passthrough", "none" or a list), `cpu` the features to hide from the guest
    ("host" or "host,-cx16,..."). `command` is run inside
    the guest by an initramfs built for it, with `files` in it: pairs of a guest
    path and a file of this host. `command_io` says where its input and output lead: to
    the console, to streams of their own (`machine.command`) or to a terminal of its own;
    `hvkvm run` chooses that by itself. `vsock` is the Unix socket through which
    host programs reach the guest's AF_VSOCK ports. `control` is "off", "auto" or the
    path of the control socket, `name` what `hvkvm ctl --vm` calls the machine ("":
    hvkvm-PID). `signal_path` chooses who answers HvSignalEvent: KVM_HYPERV_EVENTFD or
    the userspace table. `restore` is the file of a saved machine to go on from, which then
    decides what the guest sees: kernel, cpus, memory, enlightenments and devices.
    """

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    cpus: int = 1
    cpu: str = "host"
    memory: int = 512 * MIB
    hv: str = "host-model"
    synic: Literal["auto", "kernel", "user"] = "auto"
    signal_path: Literal["auto", "kernel", "user"] = "auto"
    devices: tuple[str, ...] = ()
    vmbus: Literal["on", "off"] = "off"
    vmbus_max_version: str = VMBUS_VERSIONS[-1]
    vsock: Path | None = None
    control: str = "off"
    name: str = ""
    acpi: bool = True
    reboot: bool = True
    timeout: float | None = None
    kvm_path: str = "/dev/kvm"
    command: tuple[str, ...] = ()
    command_io: Literal["console", "streams", "terminal"] = "console"
    modules_dir: Path | None = None
    modules: tuple[str, ...] = ()
    busybox: Path | None = None
    files: tuple[tuple[str, Path], ...] = ()
    restore: Path | None = None

    def validate(self) -> MachineConfig:
        """Return self, or raise ConfigError for the first value that cannot work."""
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ConfigError(
                f"--cpus {self.cpus}: a machine has 1 to {MAX_CPUS} vCPUs; choose one in that range"
            )
        if self.cpu != "host":
            from hvkvm.machine.cpu_features import parse_cpu

            parse_cpu(self.cpu)
        if self.memory < MIN_MEMORY:
            raise ConfigError(
                f"--memory {self.memory >> 20}M: too little for any guest; give at least {MIN_MEMORY >> 20}M"
            )
        if self.memory > MAX_MEMORY:
            raise ConfigError(
                f"--memory {self.memory >> 30}G: more than {MAX_MEMORY >> 30}G is not supported"
            )
        if self.memory & 0xFFF:
            raise ConfigError(
                f"--memory {self.memory}B: not a whole number of 4 KiB pages; round it, such as 512M"
            )
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(
                f"--timeout {self.timeout:g}: must be more than 0 seconds; leave it out for no limit"
            )
        if self.synic not in SYNIC_CHOICES:
            raise ConfigError(f"--synic {self.synic}: unknown; choose {', '.join(SYNIC_CHOICES)}")
        if self.signal_path not in SIGNAL_CHOICES:
            raise ConfigError(
                f"--signal-path {self.signal_path}: unknown; choose {', '.join(SIGNAL_CHOICES)}"
            )
        if self.vmbus not in VMBUS_CHOICES:
            raise ConfigError(f"--vmbus {self.vmbus}: unknown; choose {', '.join(VMBUS_CHOICES)}")
        if self.command_io not in COMMAND_IO_CHOICES:
            raise ConfigError(
                f"config key command_io: {self.command_io} unknown; choose {', '.join(COMMAND_IO_CHOICES)}"
            )
        if self.vmbus_max_version not in VMBUS_VERSIONS:
            raise ConfigError(
                f"--vmbus-max-version {self.vmbus_max_version}: unknown; choose {', '.join(VMBUS_VERSIONS)}"
            )
        if self.vsock is not None and self.vmbus == "off" and self.restore is None:
            raise ConfigError(f"--vsock {self.vsock}: needs the VMBus host that carries it; add --vmbus on")
        for device in self.devices:
            if device not in KNOWN_DEVICES:
                raise ConfigError(f"--device {device}: unknown; the devices are {', '.join(KNOWN_DEVICES)}")
        if "\0" in self.append or "\n" in self.append:
            raise ConfigError("--append: a kernel command line cannot hold NUL or newline; remove it")
        self._validate_control()
        self._validate_files()
        return self

    def _validate_control(self) -> None:
        if not self.control:
            raise ConfigError("--control: empty; give auto, off or the path of a socket to make")
        if "\0" in self.control:
            raise ConfigError("--control: a path cannot hold NUL; remove it")
        good = self.name.isascii() and self.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        if self.name and (not good or not self.name[0].isalnum() or len(self.name) > MAX_NAME):
            shown = self.name if self.name.isprintable() else repr(self.name)
            raise ConfigError(
                f"--name {shown}: not a name; use up to {MAX_NAME} letters, digits, dots, - and _"
            )

    def _validate_files(self) -> None:
        if self.restore is not None and (self.command or self.initrd or self.modules or self.files):
            raise ConfigError(
                f"--restore {self.restore}: goes on where it was saved; leave out what only a boot can use"
            )
        for flag, path in (
            ("--restore", self.restore),
            ("--kernel", self.kernel if self.restore is None else None),
            ("--initrd", self.initrd),
            ("--busybox", self.busybox),
            *((f"--file {name}", path) for name, path in self.files),
        ):
            if path is None:
                continue
            if not path.exists():
                raise ConfigError(f"{flag} {path}: no such file; check the path")
            if path.is_dir():
                raise ConfigError(f"{flag} {path}: is a directory; name the file in it")
            _check_readable(flag, path)
        for name, _path in self.files:
            if not name.startswith("/") or name.endswith("/") or ".." in name.split("/"):
                raise ConfigError(
                    f"--file {name}=...: not a guest path; write an absolute one, such as /root/x"
                )
        if self.modules_dir is not None and not self.modules_dir.is_dir():
            raise ConfigError(
                f"--modules-dir {self.modules_dir}: not a directory; name the kernel's lib/modules/VERSION"
            )
        if self.modules and self.modules_dir is None:
            raise ConfigError("--module: needs --modules-dir, the kernel's lib/modules/VERSION folder")

    @property
    def serial_ports(self) -> int:
        """How many serial ports the machine has: COM1, and those that a command's streams may need."""
        return 1 + (SERIAL_PORTS if self.command and self.command_io != "console" else 0)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> MachineConfig:
        """Build from plain values (a TOML table); raises ConfigError for unknown keys or wrong types."""
        known = set(cls._fields)
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"config key {unknown[0]}: unknown; the keys are {', '.join(sorted(known))}")
        if "kernel" not in values:
            raise ConfigError("config key kernel: missing; name the guest kernel's file")
        return cls(**{key: _convert(key, value) for key, value in values.items()}).validate()

    @classmethod
    def from_toml(cls, path: Path, **defaults: Any) -> MachineConfig:
        """Read a TOML file whose top-level keys are this class's fields; relative paths start at the file.

        `defaults` are for keys that the file leaves out.
        """
        import tomllib

        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--config {path}: {error}; give a readable TOML file") from None
        for key in _PATH_KEYS & set(values):
            if isinstance(values[key], str):
                values[key] = str(path.parent / values[key])
        if isinstance(files := values.get("files"), dict):
            values["files"] = {k: str(path.parent / v) if isinstance(v, str) else v for k, v in files.items()}
        return cls.from_mapping({**defaults, **values})


def _check_readable(flag: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; make it readable for this user") from None


_PATH_KEYS = frozenset({"kernel", "initrd", "modules_dir", "busybox", "vsock", "restore"})
_TUPLE_KEYS = frozenset({"devices", "command", "modules"})
_INT_KEYS = frozenset({"cpus"})
_BOOL_KEYS = frozenset({"acpi", "reboot"})


def _convert(key: str, value: Any) -> Any:
    if key in _PATH_KEYS and isinstance(value, str | Path):
        return Path(value)
    if (
        key in _TUPLE_KEYS
        and isinstance(value, list | tuple)
        and all(isinstance(item, str) for item in value)
    ):
        return tuple(value)
    if (
        key == "files"
        and isinstance(value, Mapping)
        and all(isinstance(item, str | Path) for item in value.values())
    ):
        return tuple((str(name), Path(file)) for name, file in value.items())
    if key == "memory":
        return parse_size(str(value), "config key memory")
    if key == "timeout" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if key in _BOOL_KEYS:
        expected: type = bool
    else:
        expected = int if key in _INT_KEYS else str
    wrong = not isinstance(value, expected) or (expected is int and isinstance(value, bool))
    if wrong or key in _PATH_KEYS | _TUPLE_KEYS | {"timeout", "files"}:
        raise ConfigError(
            f"config key {key}: {value!r} has the wrong type; see MachineConfig for what it takes"
        )
    return value
