"""Making a guest warm: booted, with what it was asked to load, and saved where it waits for a command.

Why: a copy of it takes a command without a boot before it, and as many copies as
one likes go on from one file. `hvkvm.warm` is for programs, `hvkvm warm` for people;
`MachineConfig.warm` is how a copy is made.

The main thread calls; the save itself is the I/O loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hvkvm.errors import ConfigError, HvkvmError
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending, Outcome
from hvkvm.machine.parts import Parts

TAIL_LINES = 10


class NotWarm(HvkvmError):
    """A guest came to no place where it waits for a command, or was not saved there.

    `outcome` is how its run ended.
    """

    def __init__(self, outcome: Outcome, console: list[str]) -> None:
        if outcome.ending is Ending.NOT_SAVED:
            super().__init__(f"the guest is {outcome}")
        else:
            said = f"; its console ends: {' | '.join(console)}" if console else ""
            super().__init__(f"the guest does not wait for a command: {outcome}{said}")
        self.outcome = outcome
        self.exit_status = outcome.status or 1


def warm(
    config: MachineConfig,
    path: Path,
    *,
    observer: Observer = NULL_OBSERVER,
    on_console: Callable[[bytes], object] | None = None,
) -> int:
    """Boot `config` to where it waits for a command, and save it to `path`; the file's size in bytes.

    `config` has no command. `on_console(data)` hears the console, on the I/O loop. Takes
    `config.timeout` seconds at most, and blocks meanwhile. Raises NotWarm when the guest gets
    nowhere or cannot be saved, and what `Machine` raises.
    """
    if config.saved is not None:
        flag = "--from" if config.warm is not None else "--restore"
        raise ConfigError(f"{flag} {config.saved}: a guest that is made warm is booted; leave it out")
    with Machine(config._replace(awaits=True), observer=observer) as machine:
        if on_console is not None:
            machine.board.attach_sink(on_console)
        size = save_when_warm(machine.parts, path)
        outcome = machine.run()
        if outcome.ending is not Ending.SAVED:
            raise NotWarm(outcome, machine.board.tail.lines(TAIL_LINES))
        return size()


def save_when_warm(parts: Parts, path: Path) -> Callable[[], int]:
    """Have a machine, made with `awaits` and not started yet, saved to `path` once its guest waits.

    That ends its run: as SAVED, and then the returned function says how big the file is, in bytes, or
    with what went wrong.
    """
    assert parts.orders is not None
    sizes = [0]

    def done(size: int, why: str) -> None:
        sizes.append(size)
        if why:
            parts.lifecycle.finish(Ending.NOT_SAVED, 1, why)
        else:
            parts.lifecycle.finish(Ending.SAVED, 0, str(path))

    parts.orders.on_awaited = lambda: parts.saver.save(path, done, end=True)
    return lambda: sizes[-1]
