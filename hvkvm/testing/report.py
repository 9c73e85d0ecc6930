"""What a failing test says of its guests: a section for each question one would ask next.

Any thread but a vCPU's or the I/O loop's, since a dump waits for those. Whatever goes
wrong in making a section is that section's text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hvkvm.testing.guest import Guest
from hvkvm.testing.linux import LinuxGuest

CONSOLE_LINES = 200


def sections(guests: Sequence[Guest]) -> Iterator[tuple[str, str]]:
    """Titles and texts, guest by guest."""
    for number, guest in enumerate(guests):
        which = f" {number}" if len(guests) > 1 else ""
        for title, make in _questions(guest):
            try:
                text = make()
            except Exception as error:
                text = f"not to be had: {type(error).__name__}: {error}"
            if text:
                yield f"guest{which}: {title}", text


def _questions(guest: Guest) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "how it ended", lambda: _ending(guest)
    yield "console", lambda: "\n".join(guest.console.splitlines()[-CONSOLE_LINES:])
    if isinstance(guest, LinuxGuest):
        yield "kernel messages", lambda: "\n".join(guest.dmesg[-CONSOLE_LINES:])
        yield "command's standard output", lambda: guest.stdout[-10_000:]
        yield "command's standard error", lambda: guest.stderr[-10_000:]
    yield "machine", lambda: _dump(guest)
    yield "inspect", lambda: _inspect(guest)
    if guest.flight is not None:
        flight = guest.flight
        yield "last messages and packets", lambda: "\n".join(flight.lines())


def _ending(guest: Guest) -> str:
    if guest.ended is not None:
        return str(guest.ended)
    return "it runs" if guest.started else "it was not started"


def _dump(guest: Guest) -> str:
    """Each vCPU's registers and last exits, and who waits for what."""
    from hvkvm.machine.dump import describe

    return describe(guest.machine.parts)


def _inspect(guest: Guest) -> str:
    from hvkvm.machine.inspect import inspect
    from hvkvm.observe import tree

    return "\n".join(tree.lines(inspect(guest.machine.parts)))


def properties(guest: Guest) -> dict[str, str]:
    """For JUnit: what was run on what."""
    import os

    offered, config = guest.machine.hyperv.offered, guest.machine.config
    found = {
        "hvkvm.host": f"{os.uname().nodename} {os.uname().release}",
        "hvkvm.synic": offered.synic or "none",
        "hvkvm.cpus": str(config.cpus),
    }
    if isinstance(guest, LinuxGuest):
        found["hvkvm.kernel"] = guest.kernel.name
    return found
