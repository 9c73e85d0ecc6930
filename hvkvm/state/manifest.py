"""What the file of a saved machine says of it, as JSON can carry it: all but RAM and each part's state.

`file` writes and reads it, through `codec`: a reader insists on every field and on its type.
Plain data: any thread.
"""

from __future__ import annotations

from hvkvm.tuples import NamedTuple


class Extent(NamedTuple):
    """A piece of RAM that is in the file; what lies between extents is zero. Bytes, in pages."""

    offset: int
    size: int
    checksum: int
    stored: int
    """How many bytes of the file it takes: less than `size` where it is compressed."""


class SavedDisk(NamedTuple):
    """A disk or DVD drive: what it was asked for with, where the guest has it, and the size of its image."""

    kind: str
    """"disk" or "cdrom"."""
    file: str
    """Empty for a drive without a medium."""
    format: str
    readonly: bool
    snapshot: bool
    cache: str
    serial: str
    discard: bool
    sector: int
    controller: int
    lun: int
    size: int
    changed: int
    """When the file was last written to, in ns since the epoch; 0 where that does not matter."""
    bus: str = "vmbus"
    name: str = ""
    """By which its user knows it: disk0, cdrom0, nvme0, ..."""


class SavedBoot(NamedTuple):
    """What was booted, by names and marks, for a reset of a machine that goes on from the file."""

    kernel: str
    kernel_size: int
    """Bytes."""
    kernel_changed: int
    """When it was last written to, in ns since the epoch."""
    initrd: str
    command: tuple[str, ...]
    modules_dir: str
    modules: tuple[str, ...]
    busybox: str
    files: tuple[tuple[str, str], ...]
    """Pairs of a path in the guest and a file of the host."""
    ramdisk: bytes
    """Checksum of the initial RAM disk that was made of it; empty for none."""


class SavedConfig(NamedTuple):
    """What a machine must have to go on from a file; all else is the new run's own."""

    kernel: str
    append: str
    cpus: int
    memory: int
    hv: str
    synic: str
    devices: tuple[str, ...]
    vmbus: str
    vmbus_max_version: str
    acpi: bool
    firmware: str = ""
    pci: bool = False
    disks: tuple[SavedDisk, ...] = ()
    awaits: bool = False
    """Whether its init takes its command from the host."""
    waits: bool = False
    """Whether it does so now: a warm guest."""
    boot: SavedBoot | None = None
    """None where a reset ends the run."""
    display: str = "none"
    command: tuple[str, ...] = ()
    """What runs in it, or was handed to it: its streams, or its terminal, are then the next run's."""
    command_io: str = "console"
    hpet: str = "off"
    apic_bus_ns: int = 0


class Manifest(NamedTuple):
    """All of a saved machine but its RAM."""

    hvkvm: str
    """The version that wrote it."""
    saved_at: float
    """Seconds since the epoch."""
    name: str
    config: SavedConfig
    extents: tuple[Extent, ...]
