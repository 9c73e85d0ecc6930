"""The NVMe controller: its registers, its doorbells, and the turns in which it takes and answers commands.

vCPU threads write registers and doorbells; what they wrote is noted, and one turn is asked of the I/O
loop, which owns everything else. So a guest that writes as fast as it can makes one pending turn, and
no queue of work. A turn takes BUDGET commands at most, in rotation over the queues.

A guest that knows Doorbell Buffer Config (Linux does) writes its doorbells' values to memory, and rings by
an ioeventfd only when we sleep; for others each ring is an exit.

A controller reset waits until no worker uses guest memory any more, and says so by CSTS.RDY only then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from hvkvm.abi import nvme
from hvkvm.block.request import Op, Request, Result
from hvkvm.devices.pci import msi, msix
from hvkvm.devices.pci.bell import BellMaker
from hvkvm.devices.pci.function import Bar
from hvkvm.devices.pci.messages import Messages
from hvkvm.devices.pci.nvme.admin import Admin
from hvkvm.devices.pci.nvme.answers import Answers
from hvkvm.devices.pci.nvme.bells import Bells
from hvkvm.devices.pci.nvme.function import MSIX_TABLE, VECTORS, nvme_function
from hvkvm.devices.pci.nvme.intake import Intake
from hvkvm.devices.pci.nvme.io_commands import BlockDisk, Command, Namespace
from hvkvm.devices.pci.nvme.prp import Memory
from hvkvm.devices.pci.nvme.queue_table import QueueTable
from hvkvm.devices.pci.nvme.queues import Completion, Submission
from hvkvm.devices.pci.nvme.registers import Registers
from hvkvm.devices.pci.nvme.saved import ControllerState, queues_of
from hvkvm.devices.pci.nvme.self_test import SelfTest
from hvkvm.devices.turn import Turn
from hvkvm.runtime.guard import Guard, call_all
from hvkvm.runtime.protocols import Deferrer

BUDGET = 64
"""Commands taken in one turn."""
MAX_COMMANDS = 1024
"""Of all queues together that may be unanswered: each may hold views of 257 guest pages."""


class Disk(BlockDisk, Protocol):
    """What a controller needs of `block.disk.Disk`."""

    def poll(self) -> None: ...
    def drain(self, done: Callable[[], object]) -> None: ...
    def inspect(self) -> dict[str, object]: ...
    @property
    def counters(self) -> Any: ...


class Controller:
    """One controller with `disk` as namespace 1. Made before the vCPUs run; it is stopped then."""

    reads_when_failed = -1
    """CSTS of all ones: Linux then looks whether the function is there."""

    def __init__(
        self,
        memory: Memory,
        disk: Disk,
        io: Deferrer,
        router: msix.MsiRouter,
        *,
        make_bell: BellMaker | None = None,
        name: str = "nvme",
        serial: str = "hvkvm-0",
        sector_size: int = 512,
        read_only: bool = False,
    ) -> None:
        self.name = name
        self.guard = Guard()
        self.serial = serial
        self.memory = memory
        self.read_only = read_only
        self.vectors = VECTORS
        self.function = nvme_function()
        self.msix = msix.Msix(self.function, VECTORS, router)
        self.messages = Messages(self.msix, msi.Msi(self.function, router))
        self.function.on_write = lambda _offset, _size: self._control_written()
        turn = partial(self.guard.run, self._turn)
        self._turns = Turn(io, turn)
        self._registers = Registers()
        self._bells = Bells(make_bell, turn)
        self.queues = QueueTable(memory, self._bells)
        self._answers = Answers(
            memory, self.queues, self._registers, self.messages, self._turns.ask, io, self.guard
        )
        self.intake = Intake(memory, self.queues, self._perform)
        self.admin = Admin(self)
        self.namespace = Namespace(disk, sector_size, memory)
        self.self_test = SelfTest(disk, sector_size)
        self.disk = disk
        self._base: int | None = None
        self._moved_before = (0, 0, 0, 0)  # what a saved machine had moved, as in its state
        # The loop's own.
        self._csts = 0
        self._stopped = True
        self._draining = False
        self._shutting = False
        self._open = False

    @property
    def on_intx(self) -> Callable[[bool], object] | None:
        """Drives the INTx of the slot that it is in."""
        return self._answers.on_intx

    @on_intx.setter
    def on_intx(self, drive: Callable[[bool], object]) -> None:
        self._answers.on_intx = drive

    # What a vCPU does.

    def region(self, _bar: Bar) -> Controller:
        """See `PciDevice.region`: there is one BAR."""
        return self

    def read(self, offset: int, size: int) -> int:
        """Registers; doorbells read as 0."""
        if offset < nvme.REGISTERS_SIZE:
            return self._registers.read(offset, size, self._csts)
        if offset >= MSIX_TABLE and offset - MSIX_TABLE < msix.BAR_SIZE:
            return self.msix.read(offset - MSIX_TABLE, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Note it, and ask for a turn."""
        if offset < nvme.REGISTERS_SIZE:
            if self._registers.write(offset, size, value):
                self._turns.ask()
        elif nvme.NVME_REG_DBS <= offset < MSIX_TABLE:
            if self._registers.ring(offset, size, value):
                self._turns.ask()
        elif offset >= MSIX_TABLE and offset - MSIX_TABLE < msix.BAR_SIZE:
            self.msix.write(offset - MSIX_TABLE, size, value)

    def _control_written(self) -> None:
        self.messages.control_written()
        self._turns.ask()  # what INTx has said goes by messages now, or the other way

    def moved(self, _bar: Bar, gpa: int | None) -> None:
        """See `PciDevice.moved`: the loop moves the bells."""
        self._base = gpa
        self._turns.ask()

    # The loop's turn.

    def _turn(self) -> None:
        if self._stopped:
            return
        self._take_writes()
        if not self._csts & nvme.NVME_CSTS_RDY or self._draining or not self.function.is_master:
            return
        for completion in list(self.queues.completions.values()):
            self._answers.make_room(completion)
        room = MAX_COMMANDS - self.queues.in_flight
        self._answers.starved = room < BUDGET
        before = self.intake.taken
        if self.intake.take(min(BUDGET, room)) and room > 0:
            self._turns.ask()
        if self.intake.taken != before:
            self.disk.poll()
        self._answers.settle()

    def _take_writes(self) -> None:
        """Act on what vCPUs have written since."""
        doorbells, reset = self._registers.take()
        if reset and not self._draining:
            self._begin_reset()
        if not self._draining and not self._csts and self._registers.cc & nvme.NVME_CC_ENABLE:
            self._enable()
        is_up = self._csts & nvme.NVME_CSTS_RDY and not self._draining
        if is_up and self._registers.cc & nvme.NVME_CC_SHN_MASK and not self._shutting:
            self._shut_down()
        self.intake.rung(doorbells)
        self.queues.move_bells(self._base)

    def _perform(self, queue: Submission, command: Command) -> None:
        answer = partial(self._answers.give, queue, command.id)
        if queue.id == 0:
            self._open = False
            self.admin.perform(command, answer)
            if self._open:  # it stays unanswered, and counts for nothing
                queue.in_flight -= 1
        else:
            self.namespace.perform(command, answer)

    def keep_open(self) -> None:
        """The command just being performed gets no answer now: an asynchronous event request."""
        self._open = True

    # Enable, reset, shut down.

    def _enable(self) -> None:
        registers, memory = self._registers, self.memory
        sizes = registers.admin_sizes
        good = (
            registers.is_possible
            and memory.contains(registers.asq, sizes[0] * nvme.SQE_SIZE)
            and memory.contains(registers.acq, sizes[1] * nvme.CQE_SIZE)
        )
        if not good:
            self._csts = nvme.NVME_CSTS_CFS
            return
        completion = Completion(0, registers.acq, sizes[1], 0, interrupts=True)
        self.queues.add_completion(completion)
        self.queues.add_submission(Submission(0, registers.asq, sizes[0], completion))
        self._csts = nvme.NVME_CSTS_RDY

    def _forget(self) -> None:
        """Drop queues and features: what is in flight is answered to nobody."""
        self.queues.forget()
        self._shutting = False
        self.admin.reset()
        self.self_test.reset()
        self._answers.forget()

    def _begin_reset(self) -> None:
        self._forget()
        self._draining = True
        self.disk.drain(partial(self.guard.run, self._reset_done))

    def _reset_done(self) -> None:
        if self._draining:
            self._draining = False
            self._csts = 0
            self._turns.ask()

    def _shut_down(self) -> None:
        """Make everything stable, then say so."""
        self._shutting = True

        def done(_result: Result) -> None:
            if self._shutting:
                self._csts |= nvme.NVME_CSTS_SHST_CMPLT

        self.disk.submit(Request(Op.FLUSH, 0, (), done))

    # The machine.

    def start(self) -> None:
        """Go on; interrupts that may have been lost in a save come again."""
        self._stopped = False
        self._answers.signal_unseen()
        self._turns.ask()

    def stop(self, done: Callable[[], object]) -> None:
        """Take no more; `done()` when everything taken is answered and no worker has guest memory."""
        if not self._stopped:
            self._take_writes()
            self._stopped = True

        def rested() -> None:
            self.guard.run(self._answers.signal)
            done()

        self.disk.drain(rested)

    def drain(self, done: Callable[[], object]) -> None:
        """`done()` when no worker has guest memory: all that can be asked of a device that has failed."""
        self.disk.drain(done)

    def reset(self) -> None:
        """Power-on state. Only while stopped."""
        self._forget()
        self.messages.reset()
        self._draining = False
        self._csts = 0
        self._registers.reset()
        self._base = self._bells.base = None

    def close(self) -> None:
        """Give back every bell and route. Nothing runs any more."""
        call_all([self._bells.drop_all, self.messages.close])

    def counters(self) -> tuple[int, int, int, int]:
        """Units read and written (thousands of 512 bytes), reads and writes: for the SMART log."""
        read, written, reads, writes = self._moved
        return -(-read // 512_000), -(-written // 512_000), reads, writes

    @property
    def _moved(self) -> tuple[int, int, int, int]:
        read, written = self.disk.counters[Op.READ], self.disk.counters[Op.WRITE]
        here = read.bytes, written.bytes, read.requests, written.requests
        first, second, third, fourth = (
            now + before & (1 << 64) - 1 for now, before in zip(here, self._moved_before, strict=True)
        )
        return first, second, third, fourth

    def save(self) -> ControllerState:
        """All that the guest could tell apart. Only while stopped."""
        registers = self._registers
        return ControllerState(
            registers.cc,
            self._csts,
            registers.aqa,
            registers.asq,
            registers.acq,
            registers.mask,
            tuple(queue.save() for queue in self.queues.submissions.values()),
            tuple(queue.save() for queue in self.queues.completions.values()),
            dict(self.admin.features),
            tuple(self.admin.events),
            () if self.queues.shadow is None else tuple(self.queues.shadow),
            self.msix.save(),
            tuple(self.self_test.results),
            self.messages.msi.save(),
            self._moved,
        )

    def load(self, state: ControllerState) -> None:
        """Take it, behind the function's registers. ValueError for what cannot be."""
        queues = queues_of(state, self.memory, VECTORS)
        self._registers.load(state.cc, state.aqa, state.asq, state.acq, state.interrupt_mask)
        self._csts = state.csts & 0x3F
        if not self._csts & nvme.NVME_CSTS_RDY:  # only one that is up can have been shut down
            self._csts &= ~nvme.NVME_CSTS_SHST_MASK
        self._shutting = bool(self._csts & nvme.NVME_CSTS_SHST_CMPLT)
        self.queues.load(*queues)
        for which, value in state.features.items():
            if which in self.admin.features:
                self.admin.features[which] = value & 0xFFFFFFFF
        self.admin.events[:] = [one & 0xFFFF for one in state.events[:4]]
        self.self_test.load(state.self_tests)
        self.msix.load(state.msix)
        self.messages.msi.load(state.msi)
        self._moved_before = state.moved

    def inspect(self) -> dict[str, object]:
        """Registers, queues and the disk."""
        return {
            "csts": f"{self._csts:#x}",
            "queues": self.queues.described(),
            "bells": len(self._bells),
            "commands": self.intake.taken,
            "disk": self.disk.inspect(),
        }
