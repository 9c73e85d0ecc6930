"""A logical unit: what every SCSI device answers, and the table of what this one does.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvkvm.abi import scsi
from hvkvm.abi.scsi import Sense
from hvkvm.block.request import Request
from hvkvm.devices.scsi.command import Command, Rejected, Reply
from hvkvm.devices.scsi.inquiry import Identity, standard_inquiry, vpd_page
from hvkvm.devices.scsi.mode import ModePages
from hvkvm.devices.scsi.plain import Plain
from hvkvm.errors import StateError

MAX_ATTENTIONS = 8

Handler = Callable[[Command], None]

_ALWAYS = frozenset((scsi.INQUIRY, scsi.REPORT_LUNS, scsi.REQUEST_SENSE))
"""What is answered as usual while a unit attention waits (SAM-5 5.14.1)."""


class Unit:
    """A unit of `device_type`; subclasses add to `handlers`, and have `modes`."""

    always: frozenset[int] = _ALWAYS
    """Commands that are answered as usual while a unit attention waits, which stays."""

    State: type[Any]
    """A NamedTuple that `state.codec` can write; it stands beside the subclass."""

    def __init__(self, device_type: int, identity: Identity, modes: ModePages, *, removable: bool) -> None:
        self.device_type = device_type
        self.identity = identity
        self.modes = modes
        self._removable = removable
        self._attentions: list[Sense] = [scsi.POWER_ON]
        self._resetting = False
        self.luns: Callable[[], list[int]] = lambda: [0]
        """The LUNs of the target that this unit is at; whoever puts it on a bus sets it."""
        self.handlers: dict[int, Handler] = {
            scsi.TEST_UNIT_READY: self._test_unit_ready,
            scsi.REQUEST_SENSE: self._request_sense,
            scsi.INQUIRY: self._inquiry,
            scsi.MODE_SENSE: self._mode_sense,
            scsi.MODE_SENSE_10: self._mode_sense,
            scsi.MODE_SELECT: self._mode_select,
            scsi.MODE_SELECT_10: self._mode_select,
            scsi.SEND_DIAGNOSTIC: self._send_diagnostic,
            scsi.REPORT_LUNS: self._report_luns,
        }

    def execute(self, command: Command) -> None:
        """Do it, or say why not. `command.done` is called once, here or later; nothing is raised."""
        cdb = command.cdb
        handler = self.handlers.get(cdb[0]) if cdb else None
        if self._resetting:
            command.done(Reply(scsi.BUSY))
            return
        try:
            if self._attentions and (not cdb or cdb[0] not in self.always):
                raise Rejected(self._attentions.pop(0))
            if handler is None:
                raise Rejected(scsi.INVALID_OPCODE)
            length = scsi.GROUP_BYTES[cdb[0] >> 5]
            if len(cdb) < length or cdb[length - 1] & scsi.NACA:
                raise Rejected(scsi.INVALID_FIELD_IN_CDB)
            handler(command)
        except Rejected as why:
            command.fail(why.sense, lba=why.lba)

    def begin(self, cdb: bytes, request: Request) -> bool:
        """Begin a READ or WRITE if it is a plain one that can be done; False, and `execute` says why not.

        `request` has its buffers, all that the guest sent or wants, and its `done`; the rest is set here.
        """
        return False

    def plain(self) -> Plain | None:
        """What it does at once just now; None if every command is to go by `begin` or `execute`."""
        return None

    def attention(self, sense: Sense) -> None:
        """Tell the guest with its next command."""
        if sense.asc == scsi.POWER_ON.asc:
            self._attentions.clear()  # a reset is news of everything
        if sense not in self._attentions and len(self._attentions) < MAX_ATTENTIONS:
            self._attentions.append(sense)

    @property
    def disturbed(self) -> bool:
        """Whether the next command is answered with something else than what it asks."""
        return self._resetting or bool(self._attentions)

    def reset(self, done: Callable[[], object]) -> None:
        """Complete what is in flight, then be as after power-on, with a unit attention; `done()` then.

        Commands that come before that are answered BUSY.
        """

        def drained() -> None:
            self._resetting = False
            self.power_on()
            self._attentions[:] = [scsi.DEVICE_RESET]
            done()

        self._resetting = True
        self.drain(drained)

    def power_on(self) -> None:
        """Take the power-on state, its medium as it is."""
        self._attentions[:] = [scsi.POWER_ON]

    def save(self) -> Any:
        """Its `State`; only while nothing is in flight."""
        raise NotImplementedError

    def load(self, state: Any) -> None:
        """Take a saved state; only while nothing is in flight. StateError."""
        raise NotImplementedError

    def saved_attentions(self) -> tuple[Sense, ...]:
        """For the state of a subclass."""
        return tuple(self._attentions)

    def load_attentions(self, attentions: tuple[Sense, ...]) -> None:
        """From the state of a subclass. StateError for what no unit has."""
        for sense in attentions:
            if sense.key != scsi.UNIT_ATTENTION or not 0 <= sense.asc < 256 or not 0 <= sense.ascq < 256:
                raise StateError(f"{self.identity.serial}: {sense} is no unit attention")
        if len(attentions) > MAX_ATTENTIONS:
            raise StateError(f"{self.identity.serial}: {len(attentions)} unit attentions are too many")
        self._attentions[:] = attentions

    def poll(self) -> None:
        """Answer now the commands that need not wait: whoever executed a batch may ask for it."""

    def inspect(self) -> dict[str, object]:
        """What it is, and what it is at. Any thread."""
        return {"product": self.identity.product, "serial": self.identity.serial}

    # What a subclass says of itself.

    def drain(self, done: Callable[[], object]) -> None:
        """`done()` once nothing is in flight."""
        done()

    def release(self) -> None:
        """Answer what is held back on purpose: the guest's driver goes, or the machine comes to rest."""

    def check_ready(self) -> None:
        """Rejected if commands on the medium cannot be done now."""

    def vpd(self, page: int) -> bytes | None:
        """The body of a vital product data page beyond the common ones; None for one that is not there."""
        return None

    def vpd_pages(self) -> tuple[int, ...]:
        """Their numbers."""
        return ()

    # The commands.

    def _test_unit_ready(self, command: Command) -> None:
        self.check_ready()
        command.good()

    def _request_sense(self, command: Command) -> None:
        sense = self._attentions.pop(0) if self._attentions else scsi.NOTHING
        if sense is scsi.NOTHING:
            try:
                self.check_ready()
            except Rejected as why:
                sense = why.sense
        data = sense.descriptor() if command.cdb[1] & 1 else sense.fixed()
        command.give(data, command.cdb[4])

    def _inquiry(self, command: Command) -> None:
        cdb = command.cdb
        allocation = int.from_bytes(cdb[3:5], "big")
        if cdb[1] & ~scsi.EVPD or (cdb[2] and not cdb[1] & scsi.EVPD):
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        if not cdb[1] & scsi.EVPD:
            command.give(standard_inquiry(self.device_type, self.identity, self._removable), allocation)
            return
        body = vpd_page(cdb[2], self.identity, self.vpd_pages())
        if body is None:
            body = self.vpd(cdb[2])
        if body is None:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        head = bytes((self.device_type, cdb[2])) + len(body).to_bytes(2, "big")
        command.give(head + body, allocation)

    def _mode_sense(self, command: Command) -> None:
        cdb = command.cdb
        ten = cdb[0] == scsi.MODE_SENSE_10
        allocation = int.from_bytes(cdb[7:9], "big") if ten else cdb[4]
        answer = self.modes.sense(
            page=cdb[2] & 0x3F,
            subpage=cdb[3],
            control=cdb[2] >> 6,
            descriptor=not cdb[1] & 0x08,
            long_lba=bool(ten and cdb[1] & 0x10),
            ten=ten,
        )
        if isinstance(answer, Sense):
            raise Rejected(answer)
        command.give(answer, allocation)

    def _mode_select(self, command: Command) -> None:
        cdb = command.cdb
        ten = cdb[0] == scsi.MODE_SELECT_10
        length = int.from_bytes(cdb[7:9], "big") if ten else cdb[4]
        if not cdb[1] & 0x10 or cdb[1] & 0x01:  # PF must be set, and nothing can be saved
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        if length:
            data = command.take(length)
            if data is None:
                raise Rejected(scsi.PARAMETER_LIST_LENGTH)
            sense = self.modes.select(data, ten=ten)
            if sense is not None:
                raise Rejected(sense)
        command.good(length)

    def _send_diagnostic(self, command: Command) -> None:
        if not command.cdb[1] & 0x04 or int.from_bytes(command.cdb[3:5], "big"):
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)  # only the default self-test
        command.good()

    def _report_luns(self, command: Command) -> None:
        allocation = int.from_bytes(command.cdb[6:10], "big")
        select = command.cdb[2]
        if select > 2 or allocation < 16:
            raise Rejected(scsi.INVALID_FIELD_IN_CDB)
        command.give(report_luns([] if select == 1 else self.luns()), allocation)


def report_luns(luns: list[int]) -> bytes:
    """REPORT LUNS data: peripheral device addressing up to 255, flat space addressing beyond."""
    entries = b"".join(
        (lun if lun < 256 else 0x4000 | lun).to_bytes(2, "big") + bytes(6)
        for lun in sorted(luns)
        if lun < 0x4000
    )
    return len(entries).to_bytes(4, "big") + bytes(4) + entries
