"""A DVD drive (MMC-6) that reads ISO images: what Linux's sr and a Windows installer ask of one.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense
from hvkvm.block.disk import Disk
from hvkvm.block.request import Op
from hvkvm.devices.scsi import mmc
from hvkvm.devices.scsi.command import Command, Rejected
from hvkvm.devices.scsi.inquiry import Identity
from hvkvm.devices.scsi.medium import checked, read_or_write
from hvkvm.devices.scsi.mmc import SECTOR
from hvkvm.devices.scsi.mode import ModePages
from hvkvm.devices.scsi.unit import Handler, Unit
from hvkvm.devices.scsi.verify import Comparisons, verify
from hvkvm.errors import StateError
from hvkvm.tuples import NamedTuple

_STANDARDS = (0x00A0, 0x0460, 0x0580)
"""SAM-5, SPC-4, MMC-6, no version claimed."""


MAX_EVENTS = 4


class DvdState(NamedTuple):
    """What a guest sees of a drive beyond its medium."""

    attentions: tuple[Sense, ...]
    tray_open: bool
    locked: bool
    events: tuple[int, ...]


class DvdDrive(Unit):
    """A drive with the medium `disk`, or none."""

    always = Unit.always | {scsi.GET_CONFIGURATION, scsi.GET_EVENT_STATUS_NOTIFICATION}
    """MMC-6: who polls for events does not take the news from who uses the medium."""

    State = DvdState

    def __init__(self, disk: Disk | None, serial: str, product: str = "VIRTUAL-DVD") -> None:
        modes = ModePages(dict(mmc.MODE_PAGES), lambda: 0)
        super().__init__(scsi.TYPE_ROM, Identity(product, serial, "1", _STANDARDS), modes, removable=True)
        self.disk = disk
        self.tray_open = False
        self.locked = False
        """The guest has said that the medium must stay."""
        self.on_eject: Callable[[Disk], object] | None = None
        """Called when the guest opens the tray, with the medium, which is not in the drive any more."""
        self._events: list[int] = []
        self._comparisons = Comparisons()
        on_medium: dict[int, Handler] = {
            scsi.READ_CAPACITY: self._read_capacity,
            scsi.READ_10: self._read,
            scsi.READ_12: self._read,
            scsi.SEEK_10: self._seek,
            scsi.VERIFY: lambda command: verify(command, self._medium(), SECTOR, self._comparisons),
            scsi.READ_TOC: self._read_toc,
            scsi.READ_DISC_INFO: self._read_disc_info,
            scsi.READ_TRACK_INFO: self._read_track_info,
            scsi.READ_DVD_STRUCTURE: self._read_structure,
        }
        for operation, handler in on_medium.items():
            self.handlers[operation] = self._with_medium(handler)
        self.handlers |= {
            scsi.GET_CONFIGURATION: self._get_configuration,
            scsi.GET_EVENT_STATUS_NOTIFICATION: self._get_event,
            scsi.MECHANISM_STATUS: self._mechanism_status,
            scsi.ALLOW_MEDIUM_REMOVAL: self._prevent_removal,
            scsi.START_STOP: self._start_stop,
            scsi.SET_CD_SPEED: lambda command: command.good(),
            scsi.SYNCHRONIZE_CACHE: lambda command: command.good(),
        }

    # From the host.

    def insert(self, disk: Disk) -> None:
        """Put a medium in and close the tray. ValueError if one is in."""
        if self.disk is not None:
            raise ValueError("a medium is in the drive; eject it first")
        self.disk = disk
        self._comparisons = Comparisons()  # none waits for those of another disk
        self.tray_open = False
        self._event(mmc.EVENT_NEW_MEDIA)
        self.attention(scsi.MEDIUM_CHANGED)

    def eject(self, *, force: bool = False) -> Disk | None:
        """Take the medium out, for the caller to close. PermissionError while the guest holds it.

        Then the guest is asked for it, as by the button of the drive; with `force` it is taken.
        """
        if self.disk is not None and self.locked and not force:
            self._event(mmc.EVENT_EJECT_REQUEST)
            raise PermissionError("the guest has locked the medium, and is asked to give it back")
        disk, self.disk = self.disk, None
        self.tray_open = True
        self.locked = False
        if disk is not None:
            self._event(mmc.EVENT_MEDIA_REMOVAL)
        return disk

    # Its state.

    def drain(self, done: Callable[[], object]) -> None:
        if self.disk is None:
            done()
        else:
            self.disk.drain(done)

    def poll(self) -> None:
        if self.disk is not None:
            self.disk.poll()

    def power_on(self) -> None:
        super().power_on()
        self.locked = False
        self._events.clear()

    def save(self) -> DvdState:
        """Its state, but for the medium; only while nothing is in flight."""
        return DvdState(self.saved_attentions(), self.tray_open, self.locked, tuple(self._events))

    def load(self, state: DvdState) -> None:
        """Take a saved state, the medium being in already; only while nothing is in flight. StateError."""
        if len(state.events) > MAX_EVENTS or not all(0 <= event < 16 for event in state.events):
            raise StateError(f"{self.identity.serial}: {state.events} are no events of a drive")
        self.load_attentions(state.attentions)
        self.tray_open = state.tray_open and self.disk is None
        self.locked = state.locked
        self._events[:] = state.events

    def inspect(self) -> dict[str, object]:
        disk = self.disk
        medium = None if disk is None else disk.inspect()
        tray = {"tray_open": self.tray_open, "locked": self.locked}
        return {"kind": "dvd", **super().inspect(), **tray, "medium": medium}

    # What the drive is.

    def check_ready(self) -> None:
        self._medium()

    @property
    def blocks(self) -> int:
        """Sectors of the medium, as far as 32 bits count them; 0 without."""
        return min(self.disk.size // SECTOR, 0xFFFFFFFF) if self.disk is not None else 0

    def _medium(self) -> Disk:
        if self.disk is None:
            raise Rejected(scsi.NO_MEDIUM_TRAY_OPEN if self.tray_open else scsi.NO_MEDIUM)
        return self.disk

    def _with_medium(self, handler: Handler) -> Handler:
        def guarded(command: Command) -> None:
            self.check_ready()
            handler(command)

        return guarded

    def _event(self, event: int) -> None:
        """Only the last few count: a guest that never asks must not make the list grow."""
        self._events[:] = [*self._events, event][-MAX_EVENTS:]

    # The commands.

    def _read(self, command: Command) -> None:
        read_or_write(command, Op.READ, self._medium(), SECTOR)

    def _read_capacity(self, command: Command) -> None:
        command.give(scsi.capacity10.pack(max(self.blocks, 1) - 1, SECTOR), 8)

    def _seek(self, command: Command) -> None:
        transfer = scsi.transfer_of(command.cdb)
        checked(scsi.Transfer(transfer.lba, 1, 0), self._medium(), SECTOR)
        command.good()

    def _read_toc(self, command: Command) -> None:
        cdb = command.cdb
        form = cdb[2] & 0x0F or cdb[9] >> 6
        data = mmc.toc(form, bool(cdb[1] & 2), cdb[6], self.blocks)
        if data is None:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        command.give(data, int.from_bytes(cdb[7:9], "big"))

    def _read_disc_info(self, command: Command) -> None:
        if command.cdb[1] & 7:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        command.give(mmc.disc_information(), int.from_bytes(command.cdb[7:9], "big"))

    def _read_track_info(self, command: Command) -> None:
        cdb = command.cdb
        number = int.from_bytes(cdb[2:6], "big")
        by_lba, by_track = (cdb[1] & 3) == 0, (cdb[1] & 3) == 1
        if not ((by_lba and number < self.blocks) or (by_track and number == 1)):
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        command.give(mmc.track_information(self.blocks), int.from_bytes(cdb[7:9], "big"))

    def _read_structure(self, command: Command) -> None:
        cdb = command.cdb
        if mmc.profile_of(self.blocks) != mmc.PROFILE_DVD_ROM or cdb[1] & 0x0F or cdb[6]:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        data = mmc.dvd_structure(cdb[7], self.blocks)
        if data is None:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        command.give(data, int.from_bytes(cdb[8:10], "big"))

    def _get_configuration(self, command: Command) -> None:
        cdb = command.cdb
        if cdb[1] & 3 == 3:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        profile = mmc.profile_of(self.blocks)
        data = mmc.configuration(profile, cdb[1] & 3, int.from_bytes(cdb[2:4], "big"), locked=self.locked)
        command.give(data, int.from_bytes(cdb[7:9], "big"))

    def _get_event(self, command: Command) -> None:
        cdb = command.cdb
        if not cdb[1] & 1:  # asynchronous answers are obsolete
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        status = (1 if self.tray_open else 0) | (2 if self.disk is not None else 0)
        event = 0
        if cdb[4] & 1 << mmc.CLASS_MEDIA and self._events:
            event = self._events.pop(0)
        command.give(mmc.event_status(cdb[4], event, status), int.from_bytes(cdb[7:9], "big"))

    def _mechanism_status(self, command: Command) -> None:
        data = bytes((0, 0x10 if self.tray_open else 0, 0, 0, 0, 0, 0, 0))
        command.give(data, int.from_bytes(command.cdb[8:10], "big"))

    def _prevent_removal(self, command: Command) -> None:
        self.locked = bool(command.cdb[4] & 1)
        command.good()

    def _start_stop(self, command: Command) -> None:
        what = command.cdb[4]
        if what >> 4 or what & 3 < 2:  # power, or start and stop without a tray
            command.good()
            return
        if what & 1:
            self.tray_open = False
            command.good()
            return
        if self.locked:
            raise Rejected(scsi.REMOVAL_PREVENTED)
        disk = self.eject()
        if disk is not None and self.on_eject is not None:
            self.on_eject(disk)
        command.good()
