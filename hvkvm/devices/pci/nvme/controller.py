"""The NVMe controller: its registers, its doorbells, and the turns in which it takes and answers commands.

vCPU threads write registers and doorbells; what they wrote is noted, and one turn is asked of the I/O
loop, which owns everything else. So a guest that writes as fast as it can makes one pending turn, and
no queue of work. A turn takes BUDGET commands at most, in rotation over the queues.

A guest that knows Doorbell Buffer Config (Linux does) writes its doorbells' values to memory, and rings by
an ioeventfd only when we sleep; for others each ring is an exit.

A controller reset waits until no worker uses guest memory any more, and says so by CSTS.RDY only then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from hvkvm.abi import nvme, pci
from hvkvm.block.request import Op, Request, Result
from hvkvm.devices.pci import msix
from hvkvm.devices.pci.function import Bar, Function, Identity
from hvkvm.devices.pci.nvme.admin import MAX_IO_QUEUES, Admin, command_of
from hvkvm.devices.pci.nvme.bells import BellMaker, Bells
from hvkvm.devices.pci.nvme.io_commands import BlockDisk, Command, Namespace
from hvkvm.devices.pci.nvme.prp import Memory
from hvkvm.devices.pci.nvme.queues import MAX_IN_FLIGHT, Completion, Shadow, Submission
from hvkvm.devices.pci.nvme.registers import Registers
from hvkvm.devices.pci.nvme.saved import ControllerState, queues_of
from hvkvm.errors import Stopped
from hvkvm.memory.atomics import fence
from hvkvm.runtime.protocols import Deferrer

BUDGET = 64
"""Commands taken in one turn."""
MAX_COMMANDS = 1024
"""Of all queues together that may be unanswered: each may hold views of 257 guest pages."""
VECTORS = MAX_IO_QUEUES + 1
_BAR = Bar(0, 0x4000)
_LOOKS = 4
_MSIX_TABLE = 0x2000


class Disk(BlockDisk, Protocol):
    """What a controller needs of `block.disk.Disk`."""

    def poll(self) -> None: ...
    def drain(self, done: Callable[[], object]) -> None: ...
    def inspect(self) -> dict[str, object]: ...
    @property
    def counters(self) -> Any: ...


class Controller:
    """One controller with `disk` as namespace 1. Made before the vCPUs run; it is stopped then."""

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
        self.serial = serial
        self.memory = memory
        self.read_only = read_only
        self.vectors = VECTORS
        self.function = Function(
            Identity(
                pci.PCI_VENDOR_ID_MICROSOFT,
                pci.NVME_DEVICE_ID,
                pci.PCI_CLASS_STORAGE_EXPRESS,
                subsystem_vendor=pci.PCI_VENDOR_ID_MICROSOFT,
                subsystem=pci.NVME_DEVICE_ID,
                pin=1,
            ),
            bars=[_BAR],
            capabilities=[msix.capability(VECTORS, 0, _MSIX_TABLE, _MSIX_TABLE + msix.PBA_OFFSET)],
        )
        self.msix = msix.Msix(self.function, VECTORS, router)
        self.function.on_write = lambda _offset, _size: self.msix.control_written()
        self.on_intx: Callable[[bool], object] | None = None
        """Drives the INTx of the slot that it is in."""
        self.submissions: dict[int, Submission] = {}
        self.completions: dict[int, Completion] = {}
        self.admin = Admin(self)
        self.namespace = Namespace(disk, sector_size, memory)
        self.disk = disk
        self._io = io
        self._registers = Registers()
        self._lock = threading.Lock()
        self._turn_asked = False
        self._base: int | None = None
        # The loop's own.
        self._csts = 0
        self._stopped = True
        self._draining = False
        self._shutting = False
        self._shadow: Shadow | None = None
        self._bells = Bells(make_bell, self._turn)
        self._dirty: set[Completion] = set()
        self._signal_asked = False
        self._first = 0
        self._starved = False
        self._open = False
        self.taken = 0
        """Commands taken so far."""

    # What a vCPU does.

    def region(self, _bar: Bar) -> Controller:
        """See `PciDevice.region`: there is one BAR."""
        return self

    def read(self, offset: int, size: int) -> int:
        """Registers; doorbells read as 0."""
        if offset < nvme.REGISTERS_SIZE:
            return self._registers.read(offset, size, self._csts)
        if offset >= _MSIX_TABLE and offset - _MSIX_TABLE < msix.BAR_SIZE:
            return self.msix.read(offset - _MSIX_TABLE, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Note it, and ask for a turn."""
        if offset < nvme.REGISTERS_SIZE:
            if self._registers.write(offset, size, value):
                self._ask()
        elif nvme.NVME_REG_DBS <= offset < _MSIX_TABLE:
            if self._registers.ring(offset, size, value):
                self._ask()
        elif offset >= _MSIX_TABLE and offset - _MSIX_TABLE < msix.BAR_SIZE:
            self.msix.write(offset - _MSIX_TABLE, size, value)

    def moved(self, _bar: Bar, gpa: int | None) -> None:
        """See `PciDevice.moved`: the loop moves the bells."""
        self._base = gpa
        self._ask()

    def _ask(self) -> None:
        """Have one turn come. Any thread."""
        with self._lock:
            if self._turn_asked:
                return
            self._turn_asked = True
        with suppress(Stopped):
            self._io.call_soon(self._turn)

    # The loop's turn.

    def _turn(self) -> None:
        with self._lock:
            self._turn_asked = False
        if self._stopped:
            return
        self._take_writes()
        if not self._csts & nvme.NVME_CSTS_RDY or self._draining or not self.function.is_master:
            return
        for completion in list(self.completions.values()):
            self._make_room(completion)
        room = MAX_COMMANDS - sum(queue.in_flight for queue in self.submissions.values())
        self._starved = room < BUDGET
        before = self.taken
        if self._take_commands(min(BUDGET, room)) and room > 0:
            self._ask()
        if self.taken != before:
            self.disk.poll()
        self._update_intx()

    def _take_writes(self) -> None:
        """Act on what vCPUs have written since."""
        doorbells, reset = self._registers.take()
        if reset and not self._draining:
            self._begin_reset()
        if not self._draining and not self._csts and self._registers.cc & nvme.NVME_CC_ENABLE:
            self._enable()
        if self._registers.cc & nvme.NVME_CC_SHN_MASK and not self._shutting:
            self._shut_down()
        for index, value in doorbells.items():
            self._rung(index, value)
        if self._bells.base != self._base:
            with_shadow = [queue.id for queue in self.submissions.values() if queue.shadow is not None]
            self._bells.move(self._base, with_shadow)

    def _rung(self, index: int, value: int) -> None:
        queue: Submission | Completion | None
        if index & 1:
            queue = self.completions.get(index >> 1)
            if queue is not None and value < queue.size:
                queue.head = value
        else:
            queue = self.submissions.get(index >> 1)
            if queue is not None and value < queue.size:
                queue.tail = value

    def _take_commands(self, budget: int) -> bool:
        """Take up to `budget` commands; whether there are more."""
        queues = list(self.submissions.values())
        self._first += 1
        more = False
        for at in range(len(queues)):
            queue = queues[(self._first + at) % len(queues)]
            while self._has_more(queue):
                raw = queue.take(self.memory) if budget else None
                if raw is None:
                    # One at its limit goes on when an answer was posted.
                    more = more or (queue.in_flight < MAX_IN_FLIGHT and not queue.deleting)
                    break
                budget -= 1
                self.taken += 1
                self._perform(queue, command_of(raw))
                if self.submissions.get(queue.id) is not queue:
                    break
        return more

    def _has_more(self, queue: Submission) -> bool:
        if queue.head != queue.tail:
            return True
        shadow = queue.shadow
        if shadow is None:
            return False
        # Say up to where we have looked, then look once more: who rings does it in the other order.
        self.memory.write_u32(shadow.event, queue.tail)
        fence()
        tail = self.memory.read_u32(shadow.value)
        if tail < queue.size:
            queue.tail = tail
        return queue.head != queue.tail

    def _perform(self, queue: Submission, command: Command) -> None:
        answer = partial(self._answer, queue, command.id)
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

    # Answers.

    def _answer(self, queue: Submission, command_id: int, status: int, result: int) -> None:
        if self.submissions.get(queue.id) is not queue:
            return  # of a life before a reset
        if queue.deleting:
            queue.in_flight -= 1
            if not queue.in_flight and queue.on_empty is not None:
                queue.on_empty()
            return
        completion = queue.completion
        entry = result, queue.head, queue.id, command_id, status
        if completion.waiting or completion.full:
            completion.waiting.append((queue, entry))
            self._make_room(completion)
        else:
            self._post(completion, queue, entry)

    def _post(self, completion: Completion, queue: Submission, entry: tuple[int, int, int, int, int]) -> None:
        completion.post(self.memory, entry)
        if queue.in_flight == MAX_IN_FLIGHT or self._starved:
            self._ask()
        queue.in_flight -= 1
        self._dirty.add(completion)
        if not self._signal_asked:
            self._signal_asked = True
            self._io.call_soon(self._signal)

    def _make_room(self, completion: Completion) -> None:
        """See how far the guest has read, and post what waited for that."""
        shadow = completion.shadow
        if shadow is not None:
            head = self.memory.read_u32(shadow.value)
            if completion.waiting or (completion.interrupts and not self.msix.enabled):
                head = self._hear_of_more(shadow, head)
            else:  # nobody needs to hear of it
                self.memory.write_u32(shadow.event, head - 1 & 0xFFFF)
            if head < completion.size:
                completion.head = head
        while completion.waiting and not completion.full:
            queue, entry = completion.waiting.popleft()
            self._post(completion, queue, entry)

    def _hear_of_more(self, shadow: Shadow, head: int) -> int:
        """Have the guest ring when it has read further: an answer waits for room, or INTx for its end.

        It writes its head first and looks at our event index second, so who has written that looks once more.
        """
        for _ in range(_LOOKS):
            self.memory.write_u32(shadow.event, head & 0xFFFF)
            fence()
            seen, head = head, self.memory.read_u32(shadow.value)
            if seen == head:
                return head
        self._ask()  # it reads on all the time: once more in the next turn
        return head

    def _signal(self) -> None:
        """One interrupt for each completion queue with something new."""
        self._signal_asked = False
        dirty, self._dirty = self._dirty, set()
        if self.msix.enabled:
            for completion in dirty:
                if completion.interrupts:
                    self.msix.raise_vector(completion.vector)
        self._update_intx()

    def _update_intx(self) -> None:
        if self.on_intx is None or self.msix.enabled:
            return
        wanted = any(
            queue.interrupts and queue.unseen and not self._registers.mask >> min(queue.vector, 31) & 1
            for queue in self.completions.values()
        )
        self.on_intx(wanted)

    # Queues come and go.

    def add_completion(self, queue: Completion) -> None:
        """A completion queue that the guest has made."""
        queue.shadow = self._shadow_of(2 * queue.id + 1)
        self.completions[queue.id] = queue
        self._start_shadow(queue.shadow)

    def add_submission(self, queue: Submission) -> None:
        """A submission queue that the guest has made."""
        queue.shadow = self._shadow_of(2 * queue.id)
        self.submissions[queue.id] = queue
        self._start_shadow(queue.shadow)
        if queue.shadow is not None:
            self._bells.add(queue.id)

    def delete_submission(self, queue: Submission, done: Callable[[], object]) -> None:
        """Take nothing more from it; `done()` when all that was taken is done with."""
        queue.deleting = True
        completion = queue.completion
        kept = [one for one in completion.waiting if one[0] is not queue]
        queue.in_flight -= len(completion.waiting) - len(kept)
        completion.waiting.clear()
        completion.waiting.extend(kept)

        def finish() -> None:
            completion.users -= 1
            del self.submissions[queue.id]
            self._bells.drop(queue.id)
            done()

        if queue.in_flight:
            queue.on_empty = finish
        else:
            finish()

    def delete_completion(self, queue: Completion) -> None:
        """Forget a completion queue that nobody uses."""
        del self.completions[queue.id]
        self._dirty.discard(queue)

    def use_shadow(self, pages: Shadow) -> None:
        """Doorbell Buffer Config: every I/O queue's doorbells are in these pages from now on."""
        self._shadow = pages
        for submission in self.submissions.values():
            submission.shadow = self._shadow_of(2 * submission.id)
            if submission.shadow is not None:
                self.memory.write_u32(submission.shadow.value, submission.tail)
                self._bells.add(submission.id)
        for completion in self.completions.values():
            completion.shadow = self._shadow_of(2 * completion.id + 1)
            if completion.shadow is not None:
                self.memory.write_u32(completion.shadow.value, completion.head)

    def _shadow_of(self, index: int) -> Shadow | None:
        if self._shadow is None or index < 2:  # the admin queues ring as ever
            return None
        return Shadow(self._shadow.value + 4 * index, self._shadow.event + 4 * index)

    def _start_shadow(self, shadow: Shadow | None) -> None:
        if shadow is not None:
            self.memory.write_u32(shadow.value, 0)
            self.memory.write_u32(shadow.event, 0)

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
        self.completions[0] = completion
        self.submissions[0] = Submission(0, registers.asq, sizes[0], completion)
        self._csts = nvme.NVME_CSTS_RDY

    def _forget(self) -> None:
        """Drop queues and features: what is in flight is answered to nobody."""
        self.submissions.clear()
        self.completions.clear()
        self._dirty.clear()
        self._shadow = None
        self._shutting = False
        self.admin.reset()
        self._bells.drop_all()
        self._update_intx()

    def _begin_reset(self) -> None:
        self._forget()
        self._draining = True
        self.disk.drain(self._reset_done)

    def _reset_done(self) -> None:
        if self._draining:
            self._draining = False
            self._csts = 0
            self._ask()

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
        self._dirty.update(queue for queue in self.completions.values() if queue.unseen)
        if self._dirty and not self._signal_asked:
            self._signal_asked = True
            self._io.call_soon(self._signal)
        self._ask()

    def stop(self, done: Callable[[], object]) -> None:
        """Take no more; `done()` when everything taken is answered and no worker has guest memory."""
        if not self._stopped:
            self._take_writes()
            self._stopped = True

        def rested() -> None:
            self._signal()
            done()

        self.disk.drain(rested)

    def reset(self) -> None:
        """Power-on state. Only while stopped."""
        self._forget()
        self.msix.reset()
        self._draining = False
        self._csts = 0
        self._registers.reset()
        self._base = self._bells.base = None

    def close(self) -> None:
        """Give back every bell and route. Nothing runs any more."""
        self._bells.drop_all()
        self.msix.close()

    def counters(self) -> tuple[int, int, int, int]:
        """Units read and written (thousands of 512 bytes), reads and writes: for the SMART log."""
        read, written = self.disk.counters[Op.READ], self.disk.counters[Op.WRITE]
        units = [-(-one.bytes // 512_000) for one in (read, written)]
        return units[0], units[1], read.requests, written.requests

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
            tuple(queue.save() for queue in self.submissions.values()),
            tuple(queue.save() for queue in self.completions.values()),
            dict(self.admin.features),
            tuple(self.admin.events),
            () if self._shadow is None else tuple(self._shadow),
            self.msix.save(),
        )

    def load(self, state: ControllerState) -> None:
        """Take it, behind the function's registers. ValueError for what cannot be."""
        completions, submissions, shadow = queues_of(state, self.memory, VECTORS)
        self._registers.load(state.cc, state.aqa, state.asq, state.acq, state.interrupt_mask)
        self._csts = state.csts & 0x3F
        self._shutting = bool(self._csts & nvme.NVME_CSTS_SHST_CMPLT)
        self._shadow = shadow
        self.completions, self.submissions = completions, submissions
        for submission in submissions.values():
            submission.shadow = self._shadow_of(2 * submission.id)
        for completion in completions.values():
            completion.shadow = self._shadow_of(2 * completion.id + 1)
        for which, value in state.features.items():
            if which in self.admin.features:
                self.admin.features[which] = value & 0xFFFFFFFF
        self.admin.events[:] = [one & 0xFFFF for one in state.events[:4]]
        self.msix.load(state.msix)

    def inspect(self) -> dict[str, object]:
        """Registers, queues and the disk."""
        return {
            "csts": f"{self._csts:#x}",
            "queues": {
                str(queue.id): f"{queue.size} entries, {queue.in_flight} in flight"
                for queue in list(self.submissions.values())
            },
            "bells": len(self._bells),
            "commands": self.taken,
            "disk": self.disk.inspect(),
        }
