"""What a machine has of each of its parts: the calls that take it to rest and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Part(Protocol):
    """Something with guest-visible state. `Lifecycle` calls it, on the I/O loop, with every vCPU paused.

    It is stopped when made: `start` comes before the vCPUs first run, without a
    loop yet. A stopped part may be started, reset and stopped again, in any order.
    """

    name: str
    """For messages about it, and its place in a saved machine."""
    State: type[Any]
    """A NamedTuple that `state.codec` can write; it stands beside the part's class."""

    def start(self) -> None:
        """Go on from the state that it has."""

    def stop(self, done: Callable[[], object]) -> None:
        """Come to rest, then call `done()` once, now or later.

        From then on the part touches no guest memory and has no work in flight.
        A part that is stopped already answers at once.
        """

    def reset(self) -> None:
        """Take the power-on state. Only while stopped."""

    def save(self) -> Any:
        """The state, a `State`: all that the guest could tell apart. Only while stopped."""

    def load(self, state: Any) -> None:
        """Take `state`, a `State`. Only while stopped, on a part that has just been reset or made.

        Raises StateError for what this part, as it was made, cannot take over: its
        values may come from a damaged or foreign file, and nothing of them is
        believed.
        """


class GuestConsole(Protocol):
    """Where a panic shows that the guest has no other way to report."""

    def flush(self) -> None:
        """Take over what the guest has printed by now. The I/O loop, or after its end."""

    def console_panic(self, *, hung: bool = False) -> str | None:
        """The guest's panic, if that is how its output ends: in a reset, or `hung`. Any thread."""

    def console_panic_report(self) -> str | None:
        """What the output says of a panic that is known from elsewhere. Any thread."""
