"""A Linux guest that runs one command: its streams, its status, its console and kernel messages.

The kernel is a distribution's own; the root file system is made for the command, of
busybox, modules and files (see `boot.initramfs`). Owner: the test's thread.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hvkvm.testing.guest import Guest
from hvkvm.testing.kernels import GuestKernel, busybox

if TYPE_CHECKING:
    from hvkvm.machine.outcome import Outcome

DRAIN_SECONDS = 10.0
"""How long what the command printed last may take into our files."""

_KERNEL_LINE = re.compile(r"^\[ *\d+\.\d+\]")


def _drivers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules by which Linux finds the disks and NICs that it is given."""
    disks = ("hv_storvsc", "sd_mod") if config.get("disks") or config.get("cdroms") else ()
    return (*disks, *(("hv_netvsc",) if config.get("nets") else ()))


class LinuxResult(NamedTuple):
    """What a guest's command came to."""

    status: int
    """The command's exit status; that of the run if it did not end by itself."""
    stdout: str
    stderr: str
    console: str
    dmesg: list[str]
    """The kernel's log."""
    outcome: Outcome


class LinuxGuest(Guest):
    """Boots `kernel` and runs `command` in it, not started. ConfigError and its like.

    The command's standard input is empty. `modules` are loaded first; `files` maps
    guest paths to files of this host, or to their content. `vmbus` offers the VMBus
    host's devices. `warm` copies a guest that was booted before, by the first test that
    asked for one like it: the console has nothing of its boot then. `config` are more
    fields of MachineConfig. The kernel prints errors alone on the console (`quiet`), which takes
    less than half as long to boot, unless `append` says how much it prints.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        kernel: GuestKernel,
        modules: Sequence[str] = (),
        files: Mapping[str, Path | bytes | str] | None = None,
        vmbus: bool = True,
        warm: bool = False,
        seconds: float = 300.0,
        **config: Any,
    ) -> None:
        from hvkvm.backends.host_input import HostInput
        from hvkvm.backends.output import Output
        from hvkvm.boot.linux import chooses_messages
        from hvkvm.machine.command import Command
        from hvkvm.machine.config import MachineConfig

        self._folder = tempfile.TemporaryDirectory(prefix="hvkvm-files-")
        settings: dict[str, Any] = {
            "kernel": kernel.image,
            "modules_dir": kernel.modules,
            "modules": tuple(dict.fromkeys((*modules, *_drivers(config)))),
            "busybox": busybox(),
            "vmbus": "on" if vmbus else "off",
            "command": tuple(command),
            "command_io": "streams",
            "files": tuple(self._files(files or {})),
        }
        settings |= {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        if not chooses_messages(settings.get("append", "")):
            settings["append"] = f"{settings.get('append', '')} quiet".strip()
        try:
            if warm:
                from hvkvm.testing.warm_guests import copy_of

                settings = copy_of(settings, seconds)
            super().__init__(MachineConfig(**settings), seconds=seconds)
        except BaseException:
            self._folder.cleanup()
            raise
        self.kernel = kernel
        machine = self.machine
        self._streams = {name: os.memfd_create(f"hvkvm-{name}") for name in ("out", "err")}
        self._outputs = {name: Output(fd, machine.platform.io) for name, fd in self._streams.items()}
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._input = HostInput(self._null, machine.platform.io)
        self._command = Command(machine.platform.io, machine.board, machine.bus, self._input, self._outputs)
        self._closed = False

    def _files(self, files: Mapping[str, Path | bytes | str]) -> list[tuple[str, Path]]:
        found = []
        for number, (name, content) in enumerate(files.items()):
            if isinstance(content, Path):
                found.append((name, content))
                continue
            path = Path(self._folder.name) / str(number)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            path.chmod(0o755)
            found.append((name, path))
        return found

    @property
    def dmesg(self) -> list[str]:
        """The kernel's log so far, out of the guest's RAM; where there is none, its lines on the console."""
        from hvkvm.machine.kernel_log import kernel_log
        from hvkvm.observe.kernel_log import NoKernelLog

        with suppress(NoKernelLog):
            if not self._closed:
                return [str(line) for line in kernel_log(self.machine.platform)]
        return [line for line in self.console.splitlines() if _KERNEL_LINE.match(line)]

    @property
    def stdout(self) -> str:
        """What the command has written on its standard output so far."""
        return self._read("out")

    @property
    def stderr(self) -> str:
        """What the command has written on its standard error so far."""
        return self._read("err")

    def _read(self, name: str) -> str:
        fd = self._streams[name]
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    def wait_for_stdout(self, text: str, *, seconds: float | None = None) -> str:
        """What the command has written, once `text` stands in it. GuestFailure."""

        def written() -> str | None:
            found = self.stdout
            return found if text in found else None

        return self.wait_until(written, f"{text!r} on the command's standard output", seconds)

    def run(self, seconds: float | None = None) -> LinuxResult:
        """Run it to the command's end. GuestFailure if that does not come within `seconds`."""
        __tracebackhide__ = True
        outcome = self.wait_for_end(seconds)
        return LinuxResult(outcome.status, self.stdout, self.stderr, self.console, self.dmesg, outcome)

    def _take_rest(self, outcome: Outcome) -> None:
        from hvkvm.machine.outcome import Ending

        self._command.take_rest(exited=outcome.ending is Ending.COMMAND_EXITED)
        super()._take_rest(outcome)

    def _finish(self, outcome: Outcome) -> None:
        self._take_rest(outcome)
        try:
            super()._finish(outcome)
        finally:
            for output in self._outputs.values():
                output.drain(DRAIN_SECONDS)

    def close(self) -> None:
        """See Guest."""
        if self._closed:
            return
        self._closed = True
        try:
            self.machine.stop()
        finally:
            self._command.close()
            self._input.close()
            for output in self._outputs.values():
                output.close()
            super().close()
            for fd in (self._null, *self._streams.values()):
                os.close(fd)
            self._folder.cleanup()
