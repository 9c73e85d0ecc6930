"""A SCSI disk that fails on purpose: between the controller and the disk stands a tester's plan.

The guest's data is what a disk without faults would have, save where a write was torn. Nothing is held back
from a guest whose driver goes, or from a machine that comes to rest: see `release`.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from hvkvm.abi import scsi
from hvkvm.block.buffers import Cutter, size_of
from hvkvm.block.disk import Disk
from hvkvm.block.request import Request
from hvkvm.devices.scsi.command import Command, Reply
from hvkvm.devices.scsi.disk import ScsiDisk
from hvkvm.devices.scsi.fault_rules import Action, Plan, Rule, range_of

MAX_HELD = 4096
"""Commands that are held back at once; what meets a fault beyond is done as if it had met none."""


class Timer(Protocol):
    """Something that was to happen later."""

    def cancel(self) -> object: ...


Later = Callable[..., Timer]
"""`call_later` of the I/O loop: seconds, function, arguments."""


class FaultyDisk(ScsiDisk):
    """`disk` as a logical unit on which `plan` works. `rescind()` takes its controller from the guest."""

    def __init__(
        self, disk: Disk, serial: str, plan: Plan, call_later: Later, rescind: Callable[[], object]
    ) -> None:
        super().__init__(disk, serial)
        self.plan = plan
        """May be exchanged for another at any time, on the I/O loop."""
        self._call_later = call_later
        self._rescind = rescind
        self._held: dict[Command, Timer | None] = {}
        """Commands that are held back: with what will do them, or None for dropped ones."""

    def begin(self, cdb: bytes, request: Request) -> bool:
        return False  # the plan is asked of every command

    def plain(self) -> None:
        return None

    def execute(self, command: Command) -> None:
        """As a disk does, or as the plan says."""
        rule = None if len(self._held) >= MAX_HELD else self.plan.choose(command.cdb)
        if rule is None:
            super().execute(command)
            return
        action = rule.action
        if action is Action.DELAY:
            self._held[command] = None
            self._held[command] = self._call_later(rule.seconds, self._do_late, command)
        elif action is Action.ERROR:
            found = range_of(command.cdb)
            command.fail(rule.sense, lba=None if found is None else max(found[0], rule.first or 0))
        elif action is Action.BUSY:
            command.done(Reply(scsi.BUSY))
        elif action is Action.DROP:
            self._held[command] = None
        elif action is Action.TORN:
            super().execute(self._torn(command, rule))
        else:
            super().execute(command)
            self._call_later(0, self._rescind)

    def reset(self, done: Callable[[], object]) -> None:
        """What is held back ends with the reset: it has not been done."""
        self.release()
        super().reset(done)

    def drain(self, done: Callable[[], object]) -> None:
        """Who waits for all that is in flight does not wait for what is held back."""
        self.release()
        super().drain(done)

    def release(self) -> None:
        """Answer all that is held back, as not done."""
        held, self._held = self._held, {}
        for command, timer in held.items():
            if timer is not None:
                timer.cancel()
            command.fail(scsi.COMMAND_CLEARED)

    def inspect(self) -> dict[str, object]:
        return super().inspect() | {"held": len(self._held), "faults": self.plan.inspect()}

    def _do_late(self, command: Command) -> None:
        if self._held.pop(command, self) is not self:
            super().execute(command)

    def _torn(self, command: Command, rule: Rule) -> Command:
        """A command for the part that is written; its answer is that of the whole."""
        found = range_of(command.cdb)
        sector = self.disk.image.sector_size
        if found is None or found[1] <= rule.sectors:
            return command  # it is not torn that far
        lba, blocks = found
        cdb = scsi.cdb16.pack(scsi.WRITE_16, 0, lba, rule.sectors, 0, 0)

        def answered(whole: Command, reply: Reply) -> None:
            if reply.status != scsi.GOOD:
                whole.done(reply)
            elif rule.good:
                whole.good(min(blocks * sector, size_of(whole.buffers)))
            else:
                whole.fail(rule.sense, lba=lba + rule.sectors)

        buffers = Cutter(command.buffers).take(rule.sectors * sector)
        return Command(cdb, buffers, partial(answered, command))
