"""Answers on their way to the guest: entries of completion queues, those that wait for room, interrupts.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hvkvm.devices.pci.messages import Messages
from hvkvm.devices.pci.nvme.prp import Memory
from hvkvm.devices.pci.nvme.queue_table import QueueTable
from hvkvm.devices.pci.nvme.queues import MAX_IN_FLIGHT, Completion, Shadow, Submission
from hvkvm.devices.pci.nvme.registers import Registers
from hvkvm.devices.turn import Turn
from hvkvm.memory.atomics import fence
from hvkvm.runtime.guard import Guard
from hvkvm.runtime.protocols import Deferrer

_LOOKS = 4

Entry = tuple[int, int, int, int, int]
"""result, sq_head, sq_id, command_id, status."""


class Answers:
    """Of one controller. `more()` asks for a turn of it, in which it takes commands again."""

    def __init__(
        self,
        memory: Memory,
        queues: QueueTable,
        registers: Registers,
        messages: Messages,
        more: Callable[[], object],
        io: Deferrer,
        guard: Guard,
    ) -> None:
        self.on_intx: Callable[[bool], object] | None = None
        """Drives the INTx of the slot that the controller is in."""
        self.starved = False
        """Whether the controller took no command because too many are unanswered."""
        self._memory = memory
        self._queues = queues
        self._registers = registers
        self._messages = messages
        self._more = more
        self._dirty: set[Completion] = set()
        self._signals = Turn(io, partial(guard.run, self.signal))

    def give(self, queue: Submission, command_id: int, status: int, result: int) -> None:
        """Answer a command that was taken from `queue`."""
        if self._queues.submissions.get(queue.id) is not queue:
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
            self.make_room(completion)
        else:
            self._post(completion, queue, entry)

    def _post(self, completion: Completion, queue: Submission, entry: Entry) -> None:
        completion.post(self._memory, entry)
        if queue.in_flight == MAX_IN_FLIGHT or self.starved:
            self._more()
        queue.in_flight -= 1
        self._dirty.add(completion)
        self._signals.ask()

    def make_room(self, completion: Completion) -> None:
        """See how far the guest has read, and post what waited for that."""
        shadow = completion.shadow
        if shadow is not None:
            head = self._memory.read_u32(shadow.value)
            if completion.waiting or (completion.interrupts and not self._messages.enabled):
                head = self._hear_of_more(shadow, head)
            else:  # nobody needs to hear of it
                self._memory.write_u32(shadow.event, head - 1 & 0xFFFF)
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
            self._memory.write_u32(shadow.event, head & 0xFFFF)
            fence()
            seen, head = head, self._memory.read_u32(shadow.value)
            if seen == head:
                return head
        self._more()  # it reads on all the time: once more in the next turn
        return head

    def signal(self) -> None:
        """One interrupt for each completion queue with something new."""
        dirty, self._dirty = self._dirty, set()
        if self._messages.enabled:
            there, plain = self._queues.completions, self._messages.plain
            for completion in dirty:
                if not completion.interrupts or there.get(completion.id) is not completion:
                    continue
                if plain and self._masked(completion):
                    self._dirty.add(completion)  # until the guest unmasks it
                else:
                    self._messages.raise_vector(completion.vector)
        self.update_line()

    def signal_unseen(self) -> None:
        """Signal once more what the guest has not looked at."""
        self._dirty.update(queue for queue in self._queues.completions.values() if queue.unseen)
        if self._dirty:
            self._signals.ask()

    def forget(self) -> None:
        """The queues are gone."""
        self._dirty.clear()
        self.update_line()

    def settle(self) -> None:
        """The end of a turn: what was masked may be so no more."""
        if self._dirty:
            self._signals.ask()
        self.update_line()

    def _masked(self, completion: Completion) -> bool:
        """By the controller's own masks, which MSI-X has nothing to do with."""
        return bool(self._registers.mask >> min(completion.vector, 31) & 1)

    def update_line(self) -> None:
        """INTx, for a guest without messages; one that switches them on has it no more."""
        if self.on_intx is None:
            return
        wanted = not self._messages.enabled and any(
            queue.interrupts and queue.unseen and not self._masked(queue)
            for queue in self._queues.completions.values()
        )
        self.on_intx(wanted)
