"""The machine's disks and DVD drives: images opened, units on SCSI controllers of the VMBus, workers for all.

Images are opened when the machine is made, and locked from then on. At the end of the
run, before its parts stop, each is flushed and closed. What a guest has of them is in
the state of the controllers; a saved machine names the images, which must be there
again, each as large as it was.

Owner: the I/O loop; whoever makes the machine before that. `inspect` any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from hvkvm.block.disk import Disk
from hvkvm.block.image import Image
from hvkvm.block.open_image import open_image
from hvkvm.block.request import Op, PeerGone, Request, Result, Status
from hvkvm.devices.scsi.disk import ScsiDisk
from hvkvm.devices.scsi.dvd import DvdDrive
from hvkvm.devices.synth.storvsp import Storvsp
from hvkvm.errors import ConfigError, HvkvmError, ImageError, StateError
from hvkvm.events import Warned
from hvkvm.machine.attached import Attached, Spec
from hvkvm.machine.disk_spec import MAX_LUNS, CdromSpec, DiskSpec
from hvkvm.machine.saved_disks import changed_at, saved_disk
from hvkvm.runtime.workers import Workers
from hvkvm.state.manifest import SavedDisk
from hvkvm.vmbus.pending import Pending

if TYPE_CHECKING:
    from hvkvm.devices.scsi.fault_rules import Plan
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.platform import Platform


class Disks:
    """ConfigError, ImageError among them, for what the configuration asks for and cannot be had."""

    def __init__(
        self, platform: Platform, bus: Bus | None, stack: ExitStack, saved: Sequence[SavedDisk] = ()
    ) -> None:
        """`saved`: those of the machine that this one goes on from, in their order."""
        self._platform = platform
        self._bus = bus
        self._workers = Workers(platform.io, name="disk")
        self._open: list[Disk] = []
        self._closing = Pending()
        self.attached: dict[str, Attached] = {}
        """By name, in the order in which they were added."""
        stack.callback(self.close)
        asked = self.asked()
        # One that was removed left a gap, which its user may know.
        names = [one.name for one in saved] or [""] * len(asked)
        for spec, name in zip(asked, names, strict=True):
            plan = self.plan(spec)
            self.attach(spec, self.open(spec), plan, name)

    @property
    def _vmbus(self) -> Bus:
        if self._bus is None:
            raise ConfigError("this VM has no VMBus for disks; start it with --vmbus on")
        return self._bus

    def asked(self) -> list[Spec]:
        """What the configuration wants of this kind."""
        config = self._platform.config
        return [one for one in config.media if config.bus_of(one) == "vmbus"]

    # Adding and removing.

    def open(self, spec: Spec) -> Image | None:
        """The image, opened and locked; None for a drive without a medium. ConfigError. May block.

        Any thread; `attach` follows on the loop, or the caller closes it.
        """
        if not spec.file:
            return None
        try:
            image = open_image(spec.file, spec.options)
        except PeerGone as error:
            raise PeerGone(f"{'--disk' if isinstance(spec, DiskSpec) else '--cdrom'} {error}") from None
        except OSError as error:
            raise ImageError(f"{spec.file}: {error.strerror or error}; check the image") from None
        if isinstance(spec, DiskSpec) and not image.size:
            # No guest can be told of it: SCSI and NVMe name a disk's size by its last sector.
            image.close()
            raise ImageError(f"--disk {spec.file}: it has no bytes; truncate -s SIZE makes it a disk")
        return image

    def plan(self, spec: Spec) -> Plan | None:
        """The faults that were asked of it. ConfigError. May block; any thread."""
        if isinstance(spec, CdromSpec) or spec.faults is None:
            return None
        from hvkvm.machine.fault_file import read_plan

        return read_plan(spec.faults)

    def attach(self, spec: Spec, image: Image | None, plan: Plan | None = None, name: str = "") -> Attached:
        """Give the guest the unit, by the first free name, or as `name` says.

        ConfigError if its place is taken, and then the image is closed.
        """
        option = "--disk" if isinstance(spec, DiskSpec) else "--cdrom"
        disk = None
        try:
            if spec.bus not in ("", "vmbus"):
                raise ConfigError(f"{option} {spec.file}: bus={spec.bus} takes no disk while the VM runs")
            controller = self.controller(spec.controller)
            lun = spec.lun if spec.lun >= 0 else self._free_lun(controller)
            kind = "disk" if isinstance(spec, DiskSpec) else "cdrom"
            number = next(n for n in range(len(self.attached) + 1) if f"{kind}{n}" not in self.attached)
            name = name or f"{kind}{number}"
            disk = None if image is None else self.disk_of(name, image)
            serial = spec.serial or f"hvkvm-{spec.controller}-{lun}"
            unit: ScsiDisk | DvdDrive
            if isinstance(spec, CdromSpec):
                unit = DvdDrive(disk, serial)
                unit.on_eject = self.let_go
            elif disk is not None:
                unit = self._scsi_disk(disk, serial, plan, spec.controller)
            else:
                raise ConfigError(f"{option}: no image; name one")
            controller.attach(0, lun, unit)
        except ValueError as error:
            self._drop(disk, image)
            place = f"controller={spec.controller}" + (f",lun={spec.lun}" if spec.lun >= 0 else "")
            what = f"{option} {spec.file or 'none'}: {place}"
            raise ConfigError(f"{what}: {error}; choose another place") from None
        except BaseException:
            self._drop(disk, image)
            raise
        self.attached[name] = Attached(name, spec, spec.controller, lun, unit)
        return self.attached[name]

    def _scsi_disk(self, disk: Disk, serial: str, plan: Plan | None, controller: int) -> ScsiDisk:
        if plan is None:
            return ScsiDisk(disk, serial)
        from hvkvm.devices.scsi.faulty import FaultyDisk

        return FaultyDisk(disk, serial, plan, self._platform.io.call_later, partial(self.rescind, controller))

    def disk_of(self, name: str, image: Image) -> Disk:
        """A queue of requests in front of `image`; `let_go` ends it."""
        disk = Disk(image, self._workers, self._platform.io, name=name, observer=self._platform.observer)
        self._open.append(disk)
        return disk

    def let_go(self, disk: Disk, done: Callable[[Result], object] = lambda _result: None) -> None:
        """Flush and close a disk that no unit uses any more; `done(result)` on the loop.

        A failure is a warning, too: whoever asked may have given up by then, and for what a guest
        ejected nobody asked.
        """
        if disk not in self._open:
            return
        self._open.remove(disk)
        closed = self._closing.begin(lambda: None)

        def ended(result: Result) -> None:
            if result.status is not Status.OK:
                text = f"{disk.name}: what the guest had not flushed may be lost: {result}"
                self._platform.observer.event(Warned(f"disk {disk.name}", text))
            try:
                done(result)
            finally:
                closed()

        disk.close(ended)

    def remove(self, name: str, done: Callable[[Result], object] = lambda _result: None) -> None:
        """Take the unit from the guest; KeyError. `done(result)` when its image is flushed and closed."""
        gone = self.attached.pop(name)

        def detached(_unit: object) -> None:
            if gone.disk is None:
                done(Result(Status.OK))
            else:
                self.let_go(gone.disk, done)

        self.controller(gone.controller).detach(0, gone.lun, detached)

    def rescind(self, controller: int) -> None:
        """Take a controller and its units from the guest at once, with all that is in flight."""
        name = f"scsi{controller}"
        if name not in self._vmbus.devices:
            return
        gone = [one for one in self.attached.values() if one.controller == controller]
        for one in gone:
            del self.attached[one.name]

        def removed() -> None:
            for one in gone:
                if one.disk is not None:
                    self.let_go(one.disk)

        self._vmbus.remove(name, removed)

    def resize(self, name: str, size: int, done: Callable[[Result], object]) -> None:
        """Make a disk `size` bytes and tell the guest; KeyError, ValueError for a drive. `done(result)`."""
        one = self.attached[name]
        if isinstance(one.unit, DvdDrive):
            raise ValueError(f"{name} is a DVD drive; eject its medium and insert another")

        def resized(result: Result) -> None:
            if result.status is Status.OK and self.attached.get(name) is one:
                self.controller(one.controller).rescan()
            done(result)

        if one.disk is not None:
            one.disk.resize(size, resized)

    def eject(self, name: str, done: Callable[[Result], object], *, force: bool = False) -> None:
        """Take the medium out of a drive; `done(result)` when its image is closed.

        KeyError, ValueError for a disk; PermissionError while the guest holds the medium, and it is asked.
        """
        disk = self._drive(name).eject(force=force)
        if disk is None:
            done(Result(Status.OK))
        else:
            self.let_go(disk, done)

    def insert(self, name: str, file: str, image: Image) -> None:
        """Put a medium into an empty drive. KeyError, ValueError; then the image is the caller's to close."""
        drive, one = self._drive(name), self.attached[name]
        if drive.disk is not None:
            raise ValueError(f"{name} has a medium; eject it first")
        drive.insert(self.disk_of(name, image))
        self.attached[name] = one._replace(spec=one.spec._replace(file=file))

    def _drive(self, name: str) -> DvdDrive:
        unit = self.attached[name].unit
        if not isinstance(unit, DvdDrive):
            raise ValueError(f"{name} is a disk; only a DVD drive has a medium to change")
        return unit

    def controller(self, index: int) -> Storvsp:
        """The controller of this index, made if it is not there."""
        name = f"scsi{index}"
        found = self._vmbus.devices.get(name)
        if found is not None and isinstance(found.device, Storvsp):
            return found.device
        config = self._platform.config
        return self._vmbus.add(name, Storvsp(index, self._platform.memory, config.cpus))

    def _free_lun(self, controller: Storvsp) -> int:
        taken = controller.units.luns(0)
        free = next((lun for lun in range(MAX_LUNS) if lun not in taken), None)
        if free is None:
            raise ValueError(f"all of its {MAX_LUNS} LUNs are taken")
        return free

    def _drop(self, disk: Disk | None, image: Image | None) -> None:
        if disk is not None:
            self._open.remove(disk)
        if image is not None:
            image.close()

    # Saved machines.

    def why_not_saved(self) -> str:
        """Why no saved machine could go on with these disks; empty if one could."""
        from hvkvm.block.overlay import OverlayImage

        for one in self.attached.values():
            image = None if one.disk is None else one.disk.image
            if one.disk is not None and (hung := one.disk.hung):
                return f"{one.name}: the host has not answered a {hung}, and the VM cannot rest before that"
            if isinstance(image, OverlayImage) and image.changed:
                return f"{one.name} has snapshot=on: what the guest wrote to it would not be in the file"
        return ""

    def flush(self, done: Callable[[str], object]) -> None:
        """Make all stable, so that whoever opens the images next has it; `done(why_not)` on the loop.

        What is under way on an image, such as a resize, has ended then.
        """
        pending, failed = Pending(), []

        def flushed(name: str, answered: Callable[[], object], result: Result) -> None:
            if result.status is not Status.OK:
                failed.append(f"{name}: {result}")
            answered()

        def drained(disk: Disk, answered: Callable[[], object]) -> None:
            if disk.image.read_only:
                answered()
            else:
                disk.submit(Request(Op.FLUSH, 0, (), partial(flushed, disk.name, answered)))

        for disk in list(self._open):
            disk.drain(partial(drained, disk, pending.begin(lambda: None)))
        pending.when_none(lambda: done("; ".join(failed)))

    def saved(self) -> tuple[SavedDisk, ...]:
        """What a machine must have to go on with this one's guest: disks, then drives."""
        return tuple(sorted(map(saved_disk, self.attached.values()), key=lambda one: one.kind != "disk"))

    def check(self, saved: Sequence[SavedDisk]) -> None:
        """Compare the images with what they were. StateError."""
        for one, before in zip(self.attached.values(), saved, strict=True):
            size = 0 if one.disk is None else one.disk.size
            if size != before.size:
                raise StateError(
                    f"{before.file}: {size} bytes, and {before.size} when the VM was saved;"
                    " put the image back that it was saved with"
                )
            if before.changed and (changed := changed_at(before.file)) and changed != before.changed:
                text = f"{before.file} was written to since the VM was saved; its guest may find it damaged"
                self._platform.observer.event(Warned("disk changed", text))

    # Ends.

    def end(self, done: Callable[[], object]) -> None:
        """The run ends, the vCPUs have stopped: flush and close all. A server that hangs is given up.

        One that was let go before, and is not closed yet, is waited for as well.
        """
        for disk in list(self._open):
            self.let_go(disk)
        self._closing.when_none(done)

    def close(self) -> None:
        """Let go of whatever `end` has not: the loop has ended, or never ran. Idempotent."""
        with suppress(HvkvmError):  # Stuck: a job hangs, and its thread with it
            self._workers.close()
        while self._open:
            self._open.pop().image.close()

    def inspect(self) -> dict[str, object]:
        """Each unit with its place."""
        return {
            one.name: {
                "controller": one.controller,
                "lun": one.lun,
                "file": one.file,
                **one.unit.inspect(),
            }
            for one in list(self.attached.values())
        }
