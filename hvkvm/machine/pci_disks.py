"""The machine's disks on PCI: as those on the VMBus, but plugged in before it starts, and there to stay."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm.abi.pci import NVME_DEVICE_ID, PCI_VENDOR_ID_MICROSOFT
from hvkvm.block.image import Image
from hvkvm.errors import ConfigError
from hvkvm.machine.attached import Attached, Spec
from hvkvm.machine.disks import Disks

if TYPE_CHECKING:
    from hvkvm.devices.scsi.fault_rules import Plan
    from hvkvm.machine.pci import Pci
    from hvkvm.machine.platform import Platform


class PciDisks(Disks):
    """ConfigError, ImageError among them, for what the configuration asks for and cannot be had."""

    def __init__(self, platform: Platform, pci: Pci, stack: ExitStack) -> None:
        self._pci = pci
        super().__init__(platform, None, stack)

    def asked(self) -> list[Spec]:
        """See `Disks.asked`."""
        config = self._platform.config
        return [one for one in config.media if config.bus_of(one) != "vmbus"]

    def attach(self, spec: Spec, image: Image | None, plan: Plan | None = None) -> Attached:
        """Plug the disk in. ConfigError, and then the image is closed."""
        name, disk = f"nvme{len(self.attached)}", None
        try:
            if image is None:
                raise ConfigError("--cdrom none: PCI has no drives, only media as disks; leave out bus=")
            if plan is not None:
                raise ConfigError(f"--disk {spec.file}: bus=nvme fails never on purpose; use bus=vmbus")
            disk = self.disk_of(name, image)
            slot, unit = self._pci.add_nvme(disk, name=name, serial=spec.serial or f"hvkvm-{name}")
        except BaseException:
            self._drop(disk, image)
            raise
        self.attached[name] = Attached(name, spec, slot, 0, unit, "nvme", disk)
        return self.attached[name]

    def boot_order(self) -> list[str]:
        """The disks as firmware names them, in the order in which they were asked for."""
        identity = f"pci{PCI_VENDOR_ID_MICROSOFT:x},{NVME_DEVICE_ID:x}"
        return [f"/pci@i0cf8/{identity}@{one.controller:x}/namespace@1,0" for one in self.attached.values()]
