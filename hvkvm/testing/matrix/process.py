"""A guest's process: started with a configuration, read while it runs, and ended with all that it made.

It holds one end of a pipe of ours, and ends itself when we are gone, however that came about.
Owner: one thread at a time.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from hvkvm.errors import CapabilityMissing, KvmUnavailable
from hvkvm.machine.config import MachineConfig
from hvkvm.testing.matrix.cases import ENDED, ERROR, FAILED, OK, SKIPPED, TIMEOUT, Case, Result

MAX_KEPT = 64 << 10
"""Bytes of each stream, the last ones."""
GRACE_SECONDS = 30.0
"""What a process may take beyond its guest's time limit."""
END_SECONDS = 5.0
"""What it may take after a signal."""

_RECORD = '{"ending": '


class GuestProcess:
    """`hvkvm run`, or `hvkvm warm` where `output` names its file, in a process of its own, of `folder`."""

    def __init__(self, config: MachineConfig, folder: Path, output: Path | None = None) -> None:
        self._order = folder / "order"
        self._order.write_bytes(pickle.dumps((config, output)))
        lifeline, self._hold = os.pipe()
        command = [sys.executable, "-m", "hvkvm.cli.matrix_child", str(lifeline), str(self._order)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._hold)
            raise
        finally:
            os.close(lifeline)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.began = monotonic()
        self.deadline = self.began + (config.timeout or 0.0) + GRACE_SECONDS
        self._streams = {
            stream.fileno(): bytearray() for stream in (self._process.stdout, self._process.stderr)
        }
        self._names = dict(zip(("out", "err"), self._streams, strict=True))
        self._open = set(self._streams)
        self._killed_for = ""
        self._ended_at = 0.0

    @property
    def fds(self) -> set[int]:
        """The streams that are not at their end; none: the process ends now."""
        return set(self._open)

    def read(self, fd: int) -> None:
        """Take what has come from `fd`, one of `fds` that is readable."""
        data = os.read(fd, 1 << 16)
        if not data:
            self._open.discard(fd)
            return
        kept = self._streams[fd]
        kept += data
        del kept[: max(0, len(kept) - MAX_KEPT)]

    def text(self, which: str) -> str:
        """The end of "out" or "err" so far."""
        return bytes(self._streams[self._names[which]]).decode(errors="replace").replace("\r\n", "\n")

    def check(self, now: float) -> None:
        """End it where it is beyond its time."""
        if now > self.deadline and not self._killed_for:
            self.end(TIMEOUT)
        if self._process.poll() is not None:
            # What it started may hold its streams open.
            self._ended_at = self._ended_at or now
            if now > self._ended_at + END_SECONDS:
                self._open.clear()

    def tell_to_end(self) -> None:
        """Send the first signal, so that several processes end side by side."""
        self._killed_for = self._killed_for or ENDED
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def end(self, why: str = ENDED) -> None:
        """Have it end, politely first. Blocks for END_SECONDS at most."""
        self._killed_for = self._killed_for or why
        # The first may be the guest command's, the second is ours.
        for _ in range(2):
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS / 2)
                break
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Wait for its end, and give everything back; its exit status."""
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        finally:
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None:
                    stream.close()
            os.close(self._hold)
            self._order.unlink(missing_ok=True)
        status = self._process.returncode
        return status if status >= 0 else 128 - status

    def result(self, case: Case, *, warm: bool) -> Result:
        """Close it, and say what became of `case`."""
        status = self.close()
        seconds = monotonic() - self.began
        errors, record = _split(self.text("err"))
        output = self.text("out")
        verdict, why = self._judge(case, status, output, record, errors)
        synic = str(record.get("synic") or "")
        return Result(verdict, why, status, seconds, synic, warm, "", output, errors)

    def _judge(
        self, case: Case, status: int, output: str, record: dict[str, Any], errors: str
    ) -> tuple[str, str]:
        if self._killed_for:
            why = "ended before its end" if self._killed_for == ENDED else "did not end when told to"
            return self._killed_for, why
        if not record:
            # It came to no run: the last line says why.
            last = errors.strip().rpartition("\n")[2].removeprefix("hvkvm: ") or f"status {status}"
            skips = (CapabilityMissing.exit_status, KvmUnavailable.exit_status)
            return (SKIPPED if status in skips else ERROR), last
        if record["ending"] == "timeout":
            return TIMEOUT, f"not finished after {case.config.timeout:g} s"
        if status != case.status:
            expected = f", not {case.status}" if case.status else ""
            detail = f" ({record['ending']})" if record["ending"] != "command exited" else ""
            return FAILED, f"status {status}{expected}{detail}"
        if case.stdout not in output:
            return FAILED, f"{case.stdout!r} is not in its output"
        return OK, ""


def _split(errors: str) -> tuple[str, dict[str, Any]]:
    """The standard error of a run without the record that hvkvm writes there last, and the record."""
    at = errors.rfind(_RECORD)
    line, _newline, behind = errors[max(at, 0) :].partition("\n")
    with suppress(ValueError, RecursionError):
        record = json.loads(line) if at >= 0 else {}
        if isinstance(record, dict):
            return errors[:at] + behind if record else errors, record
    return errors, {}
