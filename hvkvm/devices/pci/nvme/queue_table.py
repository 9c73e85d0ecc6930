"""The queues of a controller as they come and go, with the doorbells that a driver keeps in memory.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.devices.pci.nvme.bells import Bells
from hvkvm.devices.pci.nvme.prp import Memory
from hvkvm.devices.pci.nvme.queues import Completion, Shadow, Submission


class QueueTable:
    """By their ids; 0 is the admin queues'."""

    def __init__(self, memory: Memory, bells: Bells) -> None:
        self.submissions: dict[int, Submission] = {}
        self.completions: dict[int, Completion] = {}
        self.shadow: Shadow | None = None
        """Doorbell Buffer Config's pages."""
        self._memory = memory
        self._bells = bells

    @property
    def in_flight(self) -> int:
        """Commands that are unanswered."""
        return sum(queue.in_flight for queue in self.submissions.values())

    def described(self) -> dict[str, str]:
        """Each submission queue, with where it is answered. Any thread."""
        return {str(queue.id): queue.described(self._memory) for queue in list(self.submissions.values())}

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

    def use_shadow(self, pages: Shadow) -> None:
        """Doorbell Buffer Config: every I/O queue's doorbells are in these pages from now on."""
        self.shadow = pages
        for submission in self.submissions.values():
            submission.shadow = self._shadow_of(2 * submission.id)
            if submission.shadow is not None:
                self._memory.write_u32(submission.shadow.value, submission.tail)
                self._bells.add(submission.id)
        for completion in self.completions.values():
            completion.shadow = self._shadow_of(2 * completion.id + 1)
            if completion.shadow is not None:
                self._memory.write_u32(completion.shadow.value, completion.head)

    def load(
        self, completions: dict[int, Completion], submissions: dict[int, Submission], shadow: Shadow | None
    ) -> None:
        """Take those of a saved controller, into the tables that others hold."""
        self.forget()
        self.shadow = shadow
        self.completions.update(completions)
        self.submissions.update(submissions)
        for submission in submissions.values():
            submission.shadow = self._shadow_of(2 * submission.id)
        for completion in completions.values():
            completion.shadow = self._shadow_of(2 * completion.id + 1)

    def forget(self) -> None:
        """None is there: what is in flight is answered to nobody."""
        self.submissions.clear()
        self.completions.clear()
        self.shadow = None
        self._bells.drop_all()

    def move_bells(self, base: int | None) -> None:
        """The BAR is at `base` now."""
        if self._bells.base != base:
            with_shadow = [queue.id for queue in self.submissions.values() if queue.shadow is not None]
            self._bells.move(base, with_shadow)

    def _shadow_of(self, index: int) -> Shadow | None:
        if self.shadow is None or index < 2:  # the admin queues ring as ever
            return None
        return Shadow(self.shadow.value + 4 * index, self.shadow.event + 4 * index)

    def _start_shadow(self, shadow: Shadow | None) -> None:
        if shadow is not None:
            self._memory.write_u32(shadow.value, 0)
            self._memory.write_u32(shadow.event, 0)
