"""Saving a running machine to a file, and making one that goes on from it.

A save takes the machine to rest, takes each part's state on the I/O loop, writes
RAM on a thread of its own while the loop serves who asks, and lets the machine go
on. `restored_config` says which machine a file needs; `load` puts the parts'
states into one that was just made so.

Owner: the I/O loop, but for the threads named "save", which look at the file's name and write it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from time import time
from typing import TYPE_CHECKING, Any, get_args

from hvkvm.abi.guest_command import CommandIo
from hvkvm.errors import CapabilityMissing, ConfigError, HostExhausted, HvkvmError, StateError, Stopped
from hvkvm.machine.outcome import Ending
from hvkvm.runtime.thread_start import start_thread
from hvkvm.state.file import Saved, Writer
from hvkvm.state.manifest import Manifest, SavedBoot, SavedConfig
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.machine.config import MachineConfig
    from hvkvm.machine.disk_shelf import DiskShelf
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.machine.part import Part
    from hvkvm.machine.platform import Platform

JOIN_SECONDS = 30.0
WATCH_SECONDS = 0.1

FOLDER_GONE = (
    "the folder that this run was started in is gone, and with it the files that it named from there"
)

_GIVEN_UP = "nobody waits for it any more"

Done = Callable[[int, str], object]
"""done(size, why): the file's size in bytes, or why there is none. I/O loop."""


class _Order(NamedTuple):
    """A save, as it was asked for: see `Saver.save`."""

    path: Path
    done: Done
    end: bool
    compress: bool
    wanted: Callable[[], bool]


class Saver:
    """Saves one machine, one save at a time. `order` has its parts as `Lifecycle` has them.

    `waits()`: whether its guest waits for a command. `recipe()`: what it was booted from, on the
    writing thread.
    """

    def __init__(
        self,
        name: str,
        platform: Platform,
        lifecycle: Lifecycle,
        hyperv: Hyperv,
        order: Sequence[Part],
        shelf: DiskShelf | None = None,
        *,
        waits: Callable[[], bool] = lambda: False,
        recipe: Callable[[], SavedBoot | None] = lambda: None,
    ) -> None:
        self._name = name
        self._waits = waits
        self._recipe = recipe
        self._platform = platform
        self._lifecycle = lifecycle
        self._offered = hyperv.offered
        self._order = order
        self._shelf = shelf
        self._busy = False
        self._path: Path | None = None
        self._ending = False
        self._writer: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is being made. I/O loop."""
        return self._busy

    @property
    def path(self) -> Path | None:
        """What the machine is being saved to; None while it is not. Any thread."""
        return self._path if self._busy else None

    def save(
        self,
        path: Path,
        done: Done,
        *,
        end: bool = False,
        compress: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Write the machine to `path` soon; `done` hears how it went. False while another save is made.

        With `end` the run ends at that, and the guest does nothing that is not in the file. `compress` is
        for keeping: a smaller file, which takes longer to write and to go on from. Once it is not `wanted()`
        any more, which any thread may ask, it is given up, and the guest goes on.
        """
        if self._busy:
            return False
        if why := "" if self._shelf is None else self._shelf.why_not_saved():
            done(0, why)
            return True
        self._path, self._busy = path, True

        def allowed(why: str) -> None:
            if why:
                self._busy = False
                done(0, why)
                return
            # A disk that hangs shall not cost the guest its life because somebody wants to keep it.
            order = _Order(path, done, end, compress, wanted)
            self._lifecycle.at_rest(lambda go_on: self._stable(order, go_on), patient=True)

        specs = () if self._shelf is None else self._shelf.specs
        look = threading.Thread(target=self._look, args=(path, specs, allowed), name="save", daemon=True)
        try:
            start_thread(look)
        except HostExhausted as error:
            allowed(str(error))
        return True

    def _look(self, path: Path, specs: Sequence[Any], allowed: Callable[[str], object]) -> None:
        """Why `path` must not be replaced: it is a disk of this machine, say. On a thread of its own.

        It, or one of the machine's own files, may be on a disk that stands still, and the loop must not.
        """
        from hvkvm.machine.own_files import why_kept

        try:
            why = why_kept(path, self._platform.config, specs)
        except FileNotFoundError:
            why = FOLDER_GONE
        except Exception as error:
            why = f"{path}: {error}"
        with suppress(Stopped):
            self._platform.io.call_soon(allowed, why)

    def save_and_wait(self, path: Path, *, end: bool, compress: bool = False) -> int:
        """See `Machine.save`. RuntimeError on the machine's own threads."""
        self._lifecycle.check_thread("save")
        if self._lifecycle.started_at is None:
            raise StateError("not saved: the machine has not been started")
        heard: SimpleQueue[tuple[int, str]] = SimpleQueue()

        def start() -> None:
            if not self.save(path, lambda size, why: heard.put((size, why)), end=end, compress=compress):
                heard.put((0, "another save is being made"))

        ended = False
        with suppress(Stopped):  # the run has ended, and its outcome is there
            self._platform.io.call_soon(start, cancelled=lambda: None)
        while not ended:
            ended = self._lifecycle.outcome is not None  # what was heard by then is taken all the same
            with suppress(Empty):
                size, why = heard.get(timeout=WATCH_SECONDS)
                if why:
                    raise StateError(f"not saved: {why}")
                if end:
                    self._lifecycle.wait()  # it comes just behind
                return size
        raise StateError(f"not saved: the run has ended: {self._lifecycle.outcome}")

    def _stable(self, order: _Order, go_on: Callable[[], object]) -> None:
        """Nothing is in flight any more. What the guest has written is made stable before it is saved."""
        if self._lifecycle.reset_pending:
            # First that: a guest that goes on from the file would wait for it without end.
            self._lifecycle.at_rest(lambda again: self._stable(order, again))
            go_on()
            return

        def flushed(why: str) -> None:
            why = why or ("" if order.wanted() else _GIVEN_UP)
            if why:
                self._busy = False
                go_on()
                order.done(0, why)
            else:
                self._at_rest(order, go_on)

        if self._shelf is None:
            flushed("")
        elif why := self._shelf.why_not_saved():  # written on the way to rest
            flushed(why)
        else:
            self._shelf.flush(flushed)

    def _at_rest(self, order: _Order, go_on: Callable[[], object]) -> None:
        def finish(size: int, why: str) -> None:
            self._busy = False
            if not order.end or why:
                go_on()
                with suppress(Stopped):  # behind that: who hears of it finds a machine that goes on
                    self._platform.io.call_soon(order.done, size, why)
            else:
                order.done(size, why)
                self._lifecycle.finish(Ending.QUIT, 0, f"saved to {order.path}")

        def write() -> None:
            try:
                size, why = self._write(order, saved, states), ""
            except CapabilityMissing as error:
                size, why = 0, str(error)
            except Exception as error:  # whatever it is: the machine stands still until it hears of it
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                size, why = 0, f"{order.path}: {reason}"
            if not self._ending:
                with suppress(Stopped):
                    self._platform.io.call_soon(finish, size, why)

        try:
            states = {part.name: part.save() for part in self._order}
            saved = self._config()  # here: a disk or NIC may come while the file is written
            self._writer = threading.Thread(target=write, name="save", daemon=True)
            self._writer.start()
        except FileNotFoundError:
            finish(0, FOLDER_GONE)
        except (HvkvmError, RuntimeError) as error:  # a KVM that refuses; "can't start new thread"
            finish(0, str(error))

    def _config(self) -> SavedConfig:
        """What a machine must be made as to go on from the parts' states, but for how it was booted."""
        config, offered = self._platform.config, self._offered
        return SavedConfig(
            _absolute(config.kernel),
            config.append,
            config.cpus,
            config.memory,
            str(offered.features) or "none",
            offered.synic or "auto",
            config.devices,
            config.vmbus,
            config.vmbus_max_version,
            config.acpi,
            _absolute(config.firmware),
            config.pci,
            () if self._shelf is None else self._shelf.saved(),
            config.awaits,
            self._waits(),
            None,  # `_write` knows
            "ramfb" if config.has_display else "none",
            config.command,
            config.command_io,
            config.hpet,
            config.apic_bus_ns,
        )

    def _write(self, order: _Order, saved: SavedConfig, states: dict[str, Any]) -> int:
        from hvkvm import __version__

        platform, config = self._platform, self._platform.config
        with Writer(order.path, config.memory, compress=order.compress) as writer:
            for offset, data in platform.memory.pieces():
                if self._ending:
                    raise ValueError("the run ended before it was saved")
                if not order.wanted():
                    raise ValueError(_GIVEN_UP)
                writer.write_ram(offset, data)
            saved = saved._replace(boot=self._recipe())
            return writer.commit(Manifest(__version__, time(), self._name, saved, ()), states)

    def close(self) -> None:
        """Give up a save that is being written, before RAM goes. The I/O loop has ended."""
        self._ending = True
        if self._writer is not None and self._writer.ident is not None:
            self._writer.join(JOIN_SECONDS)


def _absolute(path: str | Path | None) -> str:
    """What names the file from wherever: "" for none, and the word "auto" as it is."""
    return str(path.absolute()) if isinstance(path, Path) else path or ""


def restored_config(saved: Saved, config: MachineConfig) -> MachineConfig:
    """`config` with all that the file decides. StateError."""
    needs = saved.manifest.config
    where = f"{saved.path}: configuration"
    if needs.memory != saved.ram_size:
        raise StateError(f"{where}: {needs.memory} bytes of RAM, and the file has {saved.ram_size}")
    if needs.waits and not needs.awaits:
        raise StateError(f"{where}: waits for a command that nobody gives it")
    if needs.waits != (config.warm is not None):
        which = "hvkvm run --from FILE -- COMMAND" if needs.waits else "hvkvm run --restore FILE"
        what = "waits for a command" if needs.waits else "does not wait for a command"
        raise StateError(f"{saved.path}: a guest that {what}; go on with `{which}`")
    try:
        values = {**needs._asdict(), "disks": ()}
        if needs.boot is None:
            values["reboot"] = False
        command, command_io = values.pop("command"), values.pop("command_io")
        if command_io not in get_args(CommandIo):
            raise ValueError(f"a command's streams lead nowhere: {command_io[:20]!r}")
        del values["waits"], values["boot"]
        for key in ("kernel", "firmware"):
            values[key] = Path(values[key]) if values[key] not in ("", "auto") else values[key] or None
        if needs.vmbus == "on":
            from hvkvm.machine.nics import specs_to_restore

            values["nets"] = specs_to_restore(saved, config.nets)
        if needs.disks:
            from hvkvm.machine.saved_disks import specs_of

            values["disks"], values["cdroms"] = specs_of(needs.disks)
        restored = config._replace(**values).validate()
        if config.firmware_vars is not None and restored.firmware is None:
            raise ConfigError(
                f"--firmware-vars {config.firmware_vars}: it was saved without firmware; leave it out"
            )
        # A warm guest's copy has its own.
        return restored if needs.waits else restored._replace(command=command, command_io=command_io)
    except (HvkvmError, ValueError) as error:
        raise StateError(f"{where}: {error}") from None


def load(saved: Saved, order: Sequence[Part], shelf: DiskShelf | None = None) -> None:
    """Put each part's state into a machine just made as `restored_config` says. StateError.

    In the order in which parts start: what is used by another comes first.
    """
    if shelf is not None:
        shelf.check(saved.manifest.config.disks)
    for part in reversed(order):
        part.load(saved.state(part.State, part.name))
