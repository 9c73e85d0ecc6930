"""What a saved controller is, and its queues built anew, with nothing of the file believed."""

from __future__ import annotations

from hvkvm.abi import nvme
from hvkvm.devices.pci import msix
from hvkvm.devices.pci.nvme.admin import MAX_ENTRIES, MAX_IO_QUEUES
from hvkvm.devices.pci.nvme.prp import PAGE, Memory
from hvkvm.devices.pci.nvme.queues import (
    MAX_IN_FLIGHT,
    Completion,
    CompletionState,
    Shadow,
    Submission,
    SubmissionState,
)
from hvkvm.tuples import NamedTuple


class ControllerState(NamedTuple):
    """Registers, queues and features. Nothing is in flight."""

    cc: int
    csts: int
    aqa: int
    asq: int
    acq: int
    interrupt_mask: int
    submissions: tuple[SubmissionState, ...]
    completions: tuple[CompletionState, ...]
    features: dict[int, int]
    events: tuple[int, ...]
    shadow: tuple[int, ...]
    """Two addresses, or nothing."""
    msix: msix.MsixState
    self_tests: tuple[tuple[int, int, int], ...] = ()
    msi: int = 0
    """Messages that are pending."""
    moved: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Bytes read and written, reads and writes so far, for the SMART log."""


def queues_of(
    state: ControllerState, memory: Memory, vectors: int
) -> tuple[dict[int, Completion], dict[int, Submission], Shadow | None]:
    """Completion queues, submission queues and the shadow doorbells. ValueError for what cannot be."""
    completions: dict[int, Completion] = {}
    submissions: dict[int, Submission] = {}

    def check(qid: int, base: int, size: int, entry: int, positions: tuple[int, ...], known: object) -> None:
        limit = 4096 if qid == 0 else MAX_ENTRIES
        good = (
            0 <= qid <= MAX_IO_QUEUES
            and 2 <= size <= limit
            and base % PAGE == 0
            and memory.contains(base, size * entry)
            and all(0 <= position < size for position in positions)
            and known is None
        )
        if not good:
            raise ValueError(f"its NVMe queue {qid} cannot be")

    for one in state.completions:
        check(one.id, one.base, one.size, nvme.CQE_SIZE, (one.head, one.tail), completions.get(one.id))
        if not 0 <= one.vector < vectors or one.phase not in (0, 1):
            raise ValueError(f"its NVMe completion queue {one.id} cannot be")
        made = Completion(one.id, one.base, one.size, one.vector, interrupts=one.interrupts)
        made.head, made.tail, made.phase = one.head, one.tail, one.phase
        completions[one.id] = made
    for given in state.submissions:
        check(
            given.id,
            given.base,
            given.size,
            nvme.SQE_SIZE,
            (given.head, given.tail),
            submissions.get(given.id),
        )
        completion = completions.get(given.completion)
        if completion is None:
            raise ValueError(f"its NVMe submission queue {given.id} has no completion queue")
        queue = Submission(given.id, given.base, given.size, completion)
        queue.head, queue.tail = given.head, given.tail
        submissions[given.id] = queue
    for one in state.completions:
        for entry in one.waiting:
            owner = submissions.get(entry[2])
            if owner is None or owner.completion.id != one.id or owner.in_flight >= MAX_IN_FLIGHT:
                raise ValueError(f"its NVMe completion queue {one.id} has answers of nobody")
            owner.in_flight += 1
            result, head, qid, command_id, status = entry
            kept = result & 0xFFFFFFFF, head & 0xFFFF, qid, command_id & 0xFFFF, status & 0x7FFF
            owner.completion.waiting.append((owner, kept))
    if not state.shadow:
        return completions, submissions, None
    if len(state.shadow) != 2 or not all(at % PAGE == 0 and memory.contains(at, PAGE) for at in state.shadow):
        raise ValueError("its NVMe doorbell buffer is nowhere")
    return completions, submissions, Shadow(*state.shadow)
