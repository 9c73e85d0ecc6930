"""What a `MachineConfig` cannot be: values that no machine could have, and values that do not go together.

Each check raises ConfigError: the flag, the reason, the remedy. None needs a kernel call beyond
looking at a file. A `MachineConfig` is `Any` here, since its table names these checks.
"""

from __future__ import annotations

from os.path import isdir
from pathlib import Path
from typing import Any

from hvkvm.errors import ConfigError
from hvkvm.machine.config_fields import fields_of
from hvkvm.machine.config_kinds import GIB, MIB, check_file

MIN_MEMORY = 8 * MIB
MAX_MEMORY = 512 * GIB
MAX_CPUS = 254
"""Above 254 an APIC id needs 32-bit destinations (KVM_CAP_X2APIC_API) everywhere."""
MAX_NAME = 48
"""Characters of a VM's name: its socket's path must stay short."""
KNOWN_DEVICES = ("hyperv-testdev",)


def cpus(flag: str, value: int) -> None:
    if not 1 <= value <= MAX_CPUS:
        raise ConfigError(f"{flag} {value}: a machine has 1 to {MAX_CPUS} vCPUs; choose one in that range")


def cpu(flag: str, value: str) -> None:
    if value != "host":
        from hvkvm.machine.cpu_features import parse_cpu

        parse_cpu(value)


def memory(flag: str, value: int) -> None:
    if value < MIN_MEMORY:
        raise ConfigError(
            f"{flag} {value >> 20}M: too little for any guest; give at least {MIN_MEMORY >> 20}M"
        )
    if value > MAX_MEMORY:
        raise ConfigError(f"{flag} {value >> 30}G: more than {MAX_MEMORY >> 30}G is not supported")
    if value & 0xFFF:
        raise ConfigError(f"{flag} {value}B: not a whole number of 4 KiB pages; round it, such as 512M")


def timeout(flag: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{flag} {value:g}: must be more than 0 seconds; leave it out for no limit")


def devices(flag: str, value: tuple[str, ...]) -> None:
    for device in value:
        if device not in KNOWN_DEVICES:
            raise ConfigError(f"{flag} {device}: unknown; the devices are {', '.join(KNOWN_DEVICES)}")


def timeline(flag: str, value: Path | None) -> None:
    if value is not None and value.suffix not in (".svg", ".json"):
        raise ConfigError(f"{flag} {value}: neither .svg nor .json; name a file that ends so")


def append(flag: str, value: str) -> None:
    if "\0" in value or "\n" in value:
        raise ConfigError(f"{flag}: a kernel command line cannot hold NUL or newline; remove it")


def firmware_vars(flag: str, value: Path | None) -> None:
    if value is not None and isdir(value):
        raise ConfigError(f"{flag} {value}: is a directory; name a file in it")


def apic_bus_ns(flag: str, value: int) -> None:
    if not 0 <= value <= 1000:
        raise ConfigError(f"{flag}: {value}: not between 0 and 1000 ns; 0 leaves it to KVM")


def control(flag: str, value: str) -> None:
    if not value:
        raise ConfigError(f"{flag}: empty; give auto, off or the path of a socket to make")
    if "\0" in value:
        raise ConfigError(f"{flag}: a path cannot hold NUL; remove it")


def name(flag: str, value: str) -> None:
    good = value.isascii() and value.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if value and (not good or not value[0].isalnum() or len(value) > MAX_NAME):
        shown = value if value.isprintable() else repr(value)
        raise ConfigError(f"{flag} {shown}: not a name; use up to {MAX_NAME} letters, digits, dots, - and _")


def modules_dir(flag: str, value: Path | None) -> None:
    if value is not None and not isdir(value):
        raise ConfigError(f"{flag} {value}: not a directory; name the kernel's lib/modules/VERSION")


def together(config: Any) -> None:
    """Raise ConfigError for values that cannot work beside one another."""
    if config.restore is not None and config.warm is not None:
        raise ConfigError(f"--from {config.warm}: goes on from one file, and so does --restore; give one")
    if config.awaits and config.command and config.warm is None:
        raise ConfigError("--: a warm guest waits for its command; give it to `hvkvm run --from FILE`")
    if config.saved is not None:
        _needs_no_boot(config)
    elif config.kernel is not None:
        check_file("--kernel", config.kernel)
    elif not config.starts_firmware:
        raise ConfigError("--kernel: missing; name the guest kernel's file, or give --firmware auto")
    if config.saved is None and config.vsock is not None and config.vmbus == "off":
        raise ConfigError(f"--vsock {config.vsock}: needs the VMBus host that carries it; add --vmbus on")
    if config.saved is None and config.nets and config.vmbus == "off":
        what = f"--net {config.nets[0].text}"
        raise ConfigError(f"{what}: needs the VMBus host that carries it; add --vmbus on")
    if config.cloud_init is not None and not config.starts_firmware and config.vmbus == "off":
        what = f"--cloud-init {config.cloud_init}"
        raise ConfigError(f"{what}: needs the VMBus host that carries its drive; add --vmbus on")
    for flag, media in (("--disk", config.disks), ("--cdrom", config.cdroms)):
        wanted = [one for one in media if config.bus_of(one) == "vmbus"]
        if wanted and config.vmbus == "off":
            what = f"{flag} {wanted[0].file}"
            raise ConfigError(f"{what}: needs the VMBus host that carries it; add --vmbus on")
    _images_once(config)
    if config.restore is None and config.firmware_vars is not None and not config.starts_firmware:
        raise ConfigError(f"--firmware-vars {config.firmware_vars}: nobody to have them; add --firmware auto")
    if config.saved is None and config.display == "ramfb" and not config.starts_firmware:
        raise ConfigError("--display ramfb: firmware sets a framebuffer up; add --firmware auto")
    if config.modules and config.modules_dir is None:
        raise ConfigError("--module: needs --modules-dir, the kernel's lib/modules/VERSION folder")
    if config.record or config.timeline is not None or config.nets:
        from hvkvm.machine.own_files import check_written

        check_written(config)


def _images_once(config: Any) -> None:
    """Of two disks on one image none may be written: its lock would say that another program uses it."""
    named = [(flag, one) for flag in ("--disk", "--cdrom") for one in getattr(config, f"{flag[2:]}s")]
    if len(named) < 2:
        return
    from hvkvm.machine.disk_spec import image_of, writes

    written: dict[tuple[int, int], bool] = {}
    for flag, one in named:
        image = image_of(one)
        if image is None:
            continue
        if image in written and (writes(one) or written[image]):
            remedy = "leave one out, or give each readonly=on or snapshot=on"
            raise ConfigError(f"{flag} {one.file}: given twice; {remedy}")
        written[image] = writes(one)


def _needs_no_boot(config: Any) -> None:
    handed = ("command", "files") if config.warm is not None else ()
    for key, field in fields_of(type(config)).items():
        if field.boot_only and key not in handed and getattr(config, key) != config._field_defaults[key]:
            flag = field.flag or "-- command"
            raise ConfigError(
                f"--restore {config.restore}: goes on where it was saved; leave out what only a boot"
                f" can use: {flag}"
                if config.warm is None
                else f"--from {config.warm}: has booted; leave {flag} out, or give it to `hvkvm warm`"
            )
