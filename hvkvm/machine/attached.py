"""A disk or DVD drive that the guest can find: what it was asked for by, and the unit that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.block.disk import Disk
from hvkvm.devices.scsi.disk import ScsiDisk
from hvkvm.devices.scsi.dvd import DvdDrive
from hvkvm.machine.disk_spec import CdromSpec, DiskSpec
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.pci.nvme.controller import Controller
    from hvkvm.devices.pci.virtio.transport import Transport

Spec = DiskSpec | CdromSpec


class Attached(NamedTuple):
    """A unit that the guest can find."""

    name: str
    """"disk0", "cdrom0", ..."""
    spec: Spec
    controller: int
    lun: int
    unit: ScsiDisk | DvdDrive | Controller | Transport
    bus: str = "vmbus"
    """"vmbus", or "nvme" or "virtio": then `controller` is its PCI slot, and `plugged` holds its data."""
    plugged: Disk | None = None

    @property
    def disk(self) -> Disk | None:
        """What holds its data; None for a drive without a medium."""
        return self.unit.disk if isinstance(self.unit, ScsiDisk | DvdDrive) else self.plugged

    @property
    def file(self) -> str:
        """Its image; "" for a drive without a medium, which host or guest may have taken out."""
        return "" if self.disk is None else self.spec.file

    @property
    def option(self) -> str:
        """The flag that asks for one like it."""
        return "--disk" if isinstance(self.spec, DiskSpec) else "--cdrom"
