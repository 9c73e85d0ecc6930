"""The machine's disks on PCI: as those on the VMBus, but plugged in before it starts, and there to stay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hvkvm.abi.pci import NVME_DEVICE_ID, PCI_VENDOR_ID_MICROSOFT
from hvkvm.block.image import Image
from hvkvm.errors import ConfigError
from hvkvm.machine.attached import Attached, Spec
from hvkvm.machine.disks import Disks

if TYPE_CHECKING:
    from hvkvm.block.disk import Disk
    from hvkvm.devices.faulty_requests import FaultyRequests
    from hvkvm.devices.scsi.fault_rules import Plan
    from hvkvm.machine.pci import Pci
    from hvkvm.machine.platform import Platform
    from hvkvm.state.manifest import SavedDisk


class PciDisks(Disks):
    """ConfigError, ImageError among them, for what the configuration asks for and cannot be had."""

    def __init__(
        self, platform: Platform, pci: Pci, stack: ExitStack, saved: Sequence[SavedDisk] = ()
    ) -> None:
        self._pci = pci
        super().__init__(platform, None, stack, saved)

    def asked(self) -> list[Spec]:
        """See `Disks.asked`."""
        config = self._platform.config
        return [one for one in config.media if config.bus_of(one) != "vmbus"]

    def attach(self, spec: Spec, image: Image | None, plan: Plan | None = None, name: str = "") -> Attached:
        """Plug the disk in. ConfigError, and then the image is closed."""
        bus = self._platform.config.bus_of(spec)
        number = sum(one.bus == bus for one in self.attached.values())
        name, disk = name or f"{bus}{number}", None
        try:
            if image is None:
                raise ConfigError("--cdrom none: PCI has no drives, only media as disks; leave out bus=")
            disk = self.disk_of(name, image)
            add = self._pci.add_nvme if bus == "nvme" else self._pci.add_virtio_blk
            behind = disk if plan is None else self._faulty(spec, disk, plan)
            slot, unit = add(behind, image, name=name, serial=spec.serial or f"hvkvm-{name}")
            disk.on_fault = behind.on_fault = unit.guard.fail
        except BaseException:
            self._drop(disk, image)
            raise
        self.attached[name] = Attached(name, spec, slot, 0, unit, bus, disk)
        return self.attached[name]

    def _faulty(self, spec: Spec, disk: Disk, plan: Plan) -> FaultyRequests:
        from hvkvm.devices.faulty_requests import FaultyRequests
        from hvkvm.devices.scsi.fault_rules import Action

        if any(rule.action is Action.RESCIND for rule in plan.rules):
            raise ConfigError(
                f'--disk {spec.file}: do = "rescind" takes a controller of the VMBus away, none of PCI\'s;'
                " use bus=vmbus, or another fault"
            )
        return FaultyRequests(disk, plan, disk.image.sector_size, self._platform.io.call_later)

    def boot_order(self) -> list[str]:
        """The disks as firmware names them, in the order in which they were asked for."""
        identity = f"pci{PCI_VENDOR_ID_MICROSOFT:x},{NVME_DEVICE_ID:x}"
        names = {"nvme": (identity, "namespace@1,0"), "virtio": ("scsi", "disk@0,0")}
        return [
            f"/pci@i0cf8/{names[one.bus][0]}@{one.controller:x}/{names[one.bus][1]}"
            for one in self.attached.values()
        ]
