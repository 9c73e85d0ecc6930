"""Which command comes next: the submission queues of one controller, in rotation. Owner: the I/O loop."""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.devices.pci.nvme.admin import command_of
from hvkvm.devices.pci.nvme.io_commands import Command
from hvkvm.devices.pci.nvme.prp import Memory
from hvkvm.devices.pci.nvme.queue_table import QueueTable
from hvkvm.devices.pci.nvme.queues import MAX_IN_FLIGHT, Completion, Submission
from hvkvm.memory.atomics import fence


class Intake:
    """Of one controller. `perform(queue, command)` is called for each command taken."""

    def __init__(
        self, memory: Memory, queues: QueueTable, perform: Callable[[Submission, Command], object]
    ) -> None:
        self.taken = 0
        """Commands taken so far."""
        self._memory = memory
        self._queues = queues
        self._perform = perform
        self._first = 0

    def rung(self, doorbells: dict[int, int]) -> None:
        """Take what was written to doorbells: tails of submission queues, heads of completion queues."""
        for index, value in doorbells.items():
            queue: Submission | Completion | None
            if index & 1:
                queue = self._queues.completions.get(index >> 1)
                if queue is not None and value < queue.size:
                    queue.head = value
            else:
                queue = self._queues.submissions.get(index >> 1)
                if queue is not None and value < queue.size:
                    queue.tail = value

    def take(self, budget: int) -> bool:
        """Take up to `budget` commands; whether there are more."""
        queues = list(self._queues.submissions.values())
        self._first += 1
        more = False
        for at in range(len(queues)):
            queue = queues[(self._first + at) % len(queues)]
            while self._has_more(queue):
                raw = queue.take(self._memory) if budget else None
                if raw is None:
                    # One at its limit goes on when an answer was posted.
                    more = more or (queue.in_flight < MAX_IN_FLIGHT and not queue.deleting)
                    break
                budget -= 1
                self.taken += 1
                self._perform(queue, command_of(raw))
                if self._queues.submissions.get(queue.id) is not queue:
                    break
        return more

    def _has_more(self, queue: Submission) -> bool:
        if queue.head != queue.tail:
            return True
        shadow = queue.shadow
        if shadow is None:
            return False
        # Say up to where we have looked, then look once more: who rings does it in the other order.
        self._memory.write_u32(shadow.event, queue.tail)
        fence()
        tail = self._memory.read_u32(shadow.value)
        if tail < queue.size:
            queue.tail = tail
        return queue.head != queue.tail
