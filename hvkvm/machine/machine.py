"""The machine: its parts put together, and their lifetime.

`with Machine(config) as machine: outcome = machine.run()`. Building opens
/dev/kvm, makes RAM, vCPUs, interrupt chips, the SynIC and the devices, and
loads the kernel; nothing runs until `start()`. What happens from then on is
`lifecycle`'s.

Threads: the caller's thread builds, waits and closes; `Lifecycle` says what else
may be called from where. What waits for the machine's own threads (`stop`, `close`,
`save`) is refused on them with RuntimeError: a callback ends the run by `finish`.

A machine is the process's that made it. A forked child has copies of fds, and
memory, that it shares with it, but none of the threads: closing the machine there
lets the copies go and changes nothing for the one that runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING

from hvkvm.errors import HvkvmError
from hvkvm.events import NULL_OBSERVER, Observer, limited
from hvkvm.hyperv.partition import Partition
from hvkvm.machine import build, saving
from hvkvm.machine.assembly import assemble
from hvkvm.machine.completion import completed
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.host_limits import make_room_for_files, named_when_exhausted
from hvkvm.machine.names import own_name
from hvkvm.machine.outcome import Ending, Outcome
from hvkvm.memory.guest import GuestMemory
from hvkvm.runtime.guard import fault_text
from hvkvm.state.file import Saved

if TYPE_CHECKING:
    from hvkvm.machine.disks import Disks

STOP_SECONDS = 10.0
"""How long shutdown waits for a thread before it says which one is stuck."""


class Machine:
    """One guest and everything that carries it. Raises HvkvmError's kinds when it cannot be built.

    `config` is what it was made of, `name` its name. `board.attach_sink(fn)` has `fn(data)` called with the
    console's output, on the I/O loop; give it before `start`. `bus` is its VMBus, `nics` are its NICs; each
    is None where it has none. A `with` block closes it.

    The guest calls code of the caller's on threads of the machine: a handler, a device, a sink. What that
    raises ends the run, and `run`, `stop` or `close` raises it, whichever comes first; `wait` does not.
    """

    def __init__(self, config: MachineConfig, *, observer: Observer = NULL_OBSERVER) -> None:
        self.config = config.validate()
        self._closed = False
        self._closing = RLock()
        with named_when_exhausted(), ExitStack() as stack:
            last = stack.enter_context(ExitStack())
            self.name = config.name or own_name(stack)
            file = self.config.saved
            saved = None if file is None else stack.enter_context(Saved(file))
            if saved is not None:
                self.config = saving.restored_config(saved, config)
            self.config, self.boot_note, self.root_note = completed(self.config)
            make_room_for_files(self.config.cpus)
            self.parts = parts = assemble(self.config, self.name, saved, limited(observer), stack)
            self.control = build.create_control(parts, stack, last)
            self._stack = stack.pop_all()
        self.platform, self.lifecycle = parts.platform, parts.lifecycle
        self.board, self.hyperv, self.bus, self.nics = parts.board, parts.hyperv, parts.bus, parts.nics
        self.disk_shelf, self.pci, self.firmware = parts.disk_shelf, parts.pci, parts.firmware
        self.orders = parts.orders

    @property
    def disks(self) -> Disks | None:
        """Its disks and DVD drives; None while it has had none."""
        return None if self.disk_shelf is None else self.disk_shelf.disks

    # Running it.

    def start(self) -> None:
        """Start the I/O loop and every vCPU. Once only, and not when closed; HvkvmError else."""
        if self._closed:
            raise HvkvmError("this machine is closed; build another one")
        if self.orders is not None and self.lifecycle.started_at is None:
            self.orders.start()
        self.lifecycle.start()
        if self.parts.records is not None:
            self.parts.records.start()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait up to `timeout` seconds (None: without limit) for the end; None if it has not come."""
        return self.lifecycle.wait(timeout)

    def run(self) -> Outcome:
        """Start, wait for the end or `config.timeout` seconds, stop every thread, return the outcome.

        Raises as `start` and `stop` do.
        """
        self.start()
        if self.wait(self.config.timeout) is None:
            self.expire()
        self.stop()
        if self.outcome is None:
            raise HvkvmError("the run was stopped and has no outcome")
        return self.outcome

    def expire(self) -> None:
        """End the run because its time is over. Any thread."""
        self.lifecycle.expire(self.config.timeout)

    def finish(self, ending: Ending, status: int, detail: str = "") -> None:
        """End the run, and name the end; the first ending wins. Wakes `wait()`. Any thread."""
        self.lifecycle.finish(ending, status, detail)

    def request_reset(self, reason: str) -> None:
        """Reset the machine soon, or end the run if the configuration says so. Any thread."""
        self.lifecycle.request_reset(reason)

    def save(self, path: Path, *, end: bool = False, compress: bool = False) -> int:
        """Write the machine to `path`, from where `MachineConfig.restore` goes on; the file's size in bytes.

        The guest stands still meanwhile, and goes on then; with `end` the run ends. `compress` makes the
        file small (zstd), for keeping. Any thread but a vCPU's and the I/O loop's. HvkvmError when it
        cannot be, the machine has not been started, or the run ends first.
        """
        return self.parts.saver.save_and_wait(path, end=end, compress=compress)

    def pause(self) -> None:
        """Take every vCPU out of KVM_RUN with its pending exit completed. Any thread but a vCPU's."""
        self.platform.group.pause_all()

    def resume(self) -> None:
        """Undo one `pause()`."""
        self.platform.group.resume_all()

    def stop(self) -> None:
        """Stop and join every thread. Idempotent; raises HvkvmError naming a thread that does not stop.

        Raises, once and with every thread stopped, what a callback of the guest's has raised.
        """
        self.lifecycle.stop(STOP_SECONDS)

    def close(self) -> None:
        """Stop, and release every fd and mapping, devices first. Idempotent; raises as `stop` does."""
        if self.lifecycle.is_copy:
            if not self._closed:
                self._closed = True
                self._let_go()
            return
        self.lifecycle.check_thread("close")
        with self._closing:  # who comes second finds all of it released
            if self._closed:
                return
            self._closed = True
            try:
                self.stop()
            finally:
                self._stack.close()
            if (error := self.lifecycle.take_error()) is not None:
                raise error  # of a device of the caller's, which has just been closed

    def _let_go(self) -> None:
        """A forked child's close: only what acts on this process alone, and nothing that takes a lock."""
        self.platform.vm.close()
        self.platform.memory.close()
        self.platform.kvm.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        """Warn that nobody has closed it, as Python does of a file; its fds and its RAM stay open.

        It is not closed here, wherever garbage is found: that waits for threads, and its guest may run.
        """
        if hasattr(self, "_stack") and not self._closed and not self.lifecycle.is_copy:
            text = f"unclosed machine {self.name}: call close(), or use it in a `with` block"
            _warn(text, ResourceWarning, source=self, stacklevel=2)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self.note_error_on(error)
        self.close()

    def note_error_on(self, error: BaseException) -> None:
        """Make what a callback has raised, if nobody has heard it, a note on `error`, which is to stay."""
        if (other := self.lifecycle.take_error()) is not None:
            error.add_note(f"before that a callback raised {fault_text(other)}")

    # Looking at it, and being its host.

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None while it has not."""
        return self.lifecycle.outcome

    @property
    def resets(self) -> int:
        """How often the guest was reset."""
        return self.lifecycle.resets

    @property
    def unwritten(self) -> list[str]:
        """Recordings and pictures of the run that could not be written, with the reasons. After `close`."""
        return [] if self.parts.records is None else self.parts.records.unwritten

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""
        return self.platform.memory

    @property
    def partition(self) -> Partition | None:
        """The SynIC component: SINT routes and connections. None where `--hv` leaves it out."""
        return self.hyperv.partition

    def exit_counts(self) -> dict[str, int]:
        """Exits of all vCPUs so far, by the C name of the reason. Any thread."""
        from hvkvm.machine.inspect import exit_counts

        return exit_counts(self.platform)
