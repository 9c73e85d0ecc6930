"""Submission and completion queues as rings in guest memory, and where each of them is.

They hold positions only; the controller decides when to take and when to post. I/O loop, but for
`written`, which the vCPU that rings a doorbell sets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hvkvm.abi.nvme import CQE_SIZE, SQE_SIZE
from hvkvm.devices.pci.nvme.prp import Memory
from hvkvm.tuples import NamedTuple

MAX_IN_FLIGHT = 256
"""Commands of one queue that may be unanswered, or wait for room in their completion queue."""


class Shadow(NamedTuple):
    """Where a doorbell's value and its event index are in guest memory (Doorbell Buffer Config)."""

    value: int
    event: int


class SubmissionState(NamedTuple):
    """A submission queue."""

    id: int
    base: int
    size: int
    completion: int
    head: int
    tail: int


class CompletionState(NamedTuple):
    """A completion queue, with the entries that wait for room.

    An entry is (result, sq_head, sq_id, command_id, status).
    """

    id: int
    base: int
    size: int
    vector: int
    interrupts: bool
    head: int
    tail: int
    phase: int
    waiting: tuple[tuple[int, int, int, int, int], ...]


class Submission:
    """Where the guest puts commands. `size` is in entries."""

    def __init__(self, qid: int, base: int, size: int, completion: Completion) -> None:
        self.id = qid
        self.base = base
        self.size = size
        self.completion = completion
        self.head = 0
        self.tail = 0
        self.in_flight = 0
        self.deleting = False
        self.on_empty: Callable[[], object] | None = None
        """Called when the last command of a queue that is deleted was answered."""
        self.shadow: Shadow | None = None
        completion.users += 1

    def take(self, memory: Memory) -> bytes | None:
        """A copy of the next command; None if there is none, or too many are unanswered. GuestMemoryError."""
        if self.head == self.tail or self.in_flight >= MAX_IN_FLIGHT or self.deleting:
            return None
        raw = memory.read(self.base + SQE_SIZE * self.head, SQE_SIZE)
        self.head = (self.head + 1) % self.size
        self.in_flight += 1
        return raw

    def described(self, memory: Memory) -> str:
        """Both ends' positions, here and in its completion queue. Any thread."""
        at = f"head {self.head}, tail {self.tail}"
        if self.shadow is not None:
            at += f", the guest's {memory.read_u32(self.shadow.value)}"
        answers = self.completion
        room = f", {len(answers.waiting)} wait for room" if answers.waiting else ""
        ends = f"completions to {answers.id}: head {answers.head}, tail {answers.tail} of {answers.size}"
        return f"{self.size} entries, {at}, {self.in_flight} in flight; {ends}{room}"

    def save(self) -> SubmissionState:
        """Its place and positions; nothing is in flight."""
        return SubmissionState(self.id, self.base, self.size, self.completion.id, self.head, self.tail)


class Completion:
    """Where the guest finds answers."""

    def __init__(self, qid: int, base: int, size: int, vector: int, *, interrupts: bool) -> None:
        self.id = qid
        self.base = base
        self.size = size
        self.vector = vector
        self.interrupts = interrupts
        self.head = 0
        self.tail = 0
        self.phase = 1
        self.users = 0
        self.waiting: deque[tuple[Submission, tuple[int, int, int, int, int]]] = deque()
        """Answers without room. Bounded: each counts as in flight for its submission queue."""
        self.shadow: Shadow | None = None
        self._words: memoryview | None = None  # the entries, once one was posted

    @property
    def full(self) -> bool:
        """Whether there is no room for another entry."""
        return (self.tail + 1) % self.size == self.head

    @property
    def unseen(self) -> bool:
        """Whether the guest has entries to look at."""
        return self.head != self.tail

    def post(self, memory: Memory, entry: tuple[int, int, int, int, int]) -> None:
        """Write one entry; its last 8 bytes have the phase, and come last. GuestMemoryError."""
        result, sq_head, sq_id, command_id, status = entry
        words = self._words
        if words is None:
            words = self._words = memory.view(self.base, CQE_SIZE * self.size).cast("Q")
        at = CQE_SIZE // 8 * self.tail
        words[at] = result
        words[at + 1] = sq_head | sq_id << 16 | command_id << 32 | (status << 1 | self.phase) << 48
        self.tail += 1
        if self.tail == self.size:
            self.tail = 0
            self.phase ^= 1

    def save(self) -> CompletionState:
        """Its place, positions and what waits."""
        waiting = tuple(entry for _queue, entry in self.waiting)
        return CompletionState(
            self.id,
            self.base,
            self.size,
            self.vector,
            self.interrupts,
            self.head,
            self.tail,
            self.phase,
            waiting,
        )
