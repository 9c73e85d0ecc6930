"""What the bus waits for: calls that a device answers by `done`, at once or later.

Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable


class Pending:
    """Counts calls that were begun and not yet answered."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[Callable[[], object]] = []

    def begin(self, then: Callable[[], object]) -> Callable[[], None]:
        """The `done` to hand out: its first call runs `then()`; later ones do nothing."""
        answered = False

        def done() -> None:
            nonlocal answered
            if answered:
                return
            answered = True
            try:
                then()
            finally:
                self.count -= 1
                self._check()

        self.count += 1
        return done

    def when_none(self, then: Callable[[], object]) -> None:
        """Call `then()` once nothing is pending; now if that is so."""
        self._waiting.append(then)
        self._check()

    def _check(self) -> None:
        while not self.count and self._waiting:
            self._waiting.pop(0)()
