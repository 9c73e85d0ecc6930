"""A `hvkvm run` process for tests, and `hvkvm ctl` beside it, in a folder for sockets of their own."""

from __future__ import annotations

import io
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from unittest.mock import patch

SECONDS = 600.0


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hvkvm", *map(str, arguments)]


def whole_lines(text: str) -> str:
    """`text` without a last line that has no end yet: what is read behind a marker must have come whole."""
    return text[: text.rfind("\n") + 1]


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        return client.connect_ex(str(path)) == 0


def wait_until_listening(
    process: subprocess.Popen[bytes], runtime: Path, report: Callable[[], object]
) -> None:
    """Until a socket in the folder takes connections; AssertionError with the report if `process` ends first.

    To ask by `hvkvm ctl` in a loop instead would take most of a lab's processor from the VM that comes up.
    """
    end = monotonic() + SECONDS
    while not any(map(_listens, runtime.glob("hvkvm/*.sock"))):
        assert process.poll() is None, report()
        assert monotonic() < end, report()
        sleep(0.02)


class RunningVm:
    """The process, what it has printed, and its socket's folder."""

    def __init__(self, process: subprocess.Popen[bytes], runtime: Path) -> None:
        self.process = process
        self.runtime = runtime
        self.output = bytearray()
        self.errors = bytearray()
        self._threads = [
            threading.Thread(target=self._collect, args=(stream, into), daemon=True)
            for stream, into in ((process.stdout, self.output), (process.stderr, self.errors))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _collect(stream: Any, into: bytearray) -> None:
        while data := stream.read1():
            into.extend(data)

    @property
    def text(self) -> str:
        return bytes(self.output).decode(errors="replace").replace("\r\n", "\n")

    def report(self) -> str:
        return f"{self.text[-4000:]}\n{bytes(self.errors).decode(errors='replace')[-4000:]}"

    @property
    def error_text(self) -> str:
        """Standard error: where the console of a guest that runs a command is shown, if it is."""
        return bytes(self.errors).decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, marker: str, *, count: int = 1, errors: bool = False) -> str:
        """The output's whole lines, once `marker` stands in them `count` times; those of `errors` if so."""
        end = monotonic() + SECONDS
        while True:
            ended = self.process.poll() is not None
            if ended:
                self.finish()  # what it has printed is read to its end
            lines = whole_lines(self.error_text if errors else self.text)
            if lines.count(marker) >= count:
                return lines
            assert not ended, f"ended before {marker!r}\n{self.report()}"
            assert monotonic() < end, f"no {marker!r}\n{self.report()}"
            sleep(0.05)

    def ctl(self, *arguments: object, status: int = 0, seconds: float = SECONDS) -> str:
        """What `hvkvm ctl` printed; AssertionError for another exit status. Its errors where it failed."""
        result = ctl(self.runtime, *arguments, seconds=seconds)
        assert result.returncode == status, (arguments, result, self.report())
        return result.stdout if status == 0 else result.stderr

    def json(self, *arguments: object) -> Any:
        """What `hvkvm ctl --json` printed."""
        return json.loads(self.ctl("--json", *arguments))

    def wait_until_listening(self) -> None:
        """Until its socket in the folder takes connections."""
        wait_until_listening(self.process, self.runtime, self.report)

    def finish(self) -> int:
        """The exit status, once the process has ended by itself."""
        status = self.process.wait(SECONDS)
        for thread in self._threads:
            thread.join(SECONDS)
        return status


def environment(runtime: Path) -> dict[str, str]:
    return {**os.environ, "HVKVM_CONTROL_DIR": str(runtime / "hvkvm"), "NO_COLOR": "1"}


def ctl(runtime: Path, *arguments: object, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """`hvkvm ctl` with sockets in `runtime`.

    In a lab the verb is called in here: starting a process for it takes most of a second of the lab's
    only processor. That it is a process as well is for the tests on this machine to see.
    """
    if "HVKVM_IN_LAB" in os.environ:
        return _called(["ctl", *map(str, arguments)], environment(runtime))
    return subprocess.run(
        command_line("ctl", *arguments),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False,
        env=environment(runtime),
    )  # fmt: skip


def _called(words: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a command line of ours comes to, in this process."""
    from hvkvm import cli

    out, err = io.StringIO(), io.StringIO()
    with patch.dict(os.environ, settings), redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@contextmanager
def running_vm(runtime: Path, *arguments: object) -> Iterator[RunningVm]:
    """`hvkvm run ARGUMENTS` with its socket in `runtime`; killed at the end if it still runs."""
    process = subprocess.Popen(
        command_line("run", *arguments),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(runtime),
    )  # fmt: skip
    vm = RunningVm(process, runtime)
    try:
        yield vm
    finally:
        if process.poll() is None:
            process.kill()
        vm.finish()


def read_until(fd: int, happened: Callable[[str], bool]) -> str:
    """What comes from `fd` until `happened(all of it)`; AssertionError if that takes too long."""
    seen = ""
    end = monotonic() + SECONDS
    while not happened(seen):
        assert monotonic() < end, seen
        if select.select([fd], [], [], 1)[0]:
            seen += os.read(fd, 4096).decode(errors="replace")
    return seen
