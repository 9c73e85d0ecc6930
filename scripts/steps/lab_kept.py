"""A lab machine that stays up between commands, so that an edit is tried in a second.

Why: starting costs seconds, Python's first imports there cost more, and both
are spent again at every run of an ordinary lab. A kept machine keeps its cache
of this machine's files; the project's own folder is mounted anew for each
command, so edits are seen. Called by `scripts/lab`.

One command at a time holds it (flock); a command that finds it busy takes an
ordinary lab. One whose user died half-way is not trusted again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

from steps import lab_host
from steps.lab_image import INIT, Plan


class KeptLab:
    """The kept machine of this user, running or not. Use as a context manager: it holds the lock."""

    def __init__(self) -> None:
        # Not in the cache, whose path may be long. The end of a login takes this one away.
        place = lab_host.place(os.environ.get("XDG_RUNTIME_DIR", ""))
        self.folder = Path(place) / f"hvkvm-lab-kept-{os.getuid()}"
        self._lock: int | None = None

    def __enter__(self) -> KeptLab:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            return self
        lock = os.open(self.folder.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = lock
        except BlockingIOError:
            os.close(lock)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def held(self) -> bool:
        """Whether this process may use it; False while another command does."""
        return self._lock is not None

    def pid(self) -> int | None:
        """The process id of the running machine."""
        try:
            pid = int((self.folder / "pid").read_text())
            # The number may have been given to another process since.
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if any(bytes(self.folder / "console") in word for word in words) else None

    def serves(self, plan: Plan) -> bool:
        """Whether the running machine is what `plan` asks for, and was left in order."""
        try:
            return (
                self.pid() is not None
                and (self.folder / "plan").read_text() == _text(plan)
                and not (self.folder / "busy").exists()
            )
        except OSError:
            return False

    def start(self, plan: Plan) -> int:
        """Start it anew; the process id."""
        self.stop()
        self.folder.mkdir(mode=0o700, exist_ok=True)
        process = lab_host.start(plan, self.folder, outlive=True)
        (self.folder / "plan").write_text(_text(plan))
        (self.folder / "pid").write_text(str(process.pid))
        return process.pid

    def stop(self) -> bool:
        """End it and clear its folder; whether there was one."""
        pid = self.pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            while self.pid() is not None:
                time.sleep(0.01)
        shutil.rmtree(self.folder, ignore_errors=True)
        return pid is not None

    def mark_busy(self) -> None:
        """Note that a command is in it: should this process die half-way, the mark stays."""
        (self.folder / "busy").touch()

    def mark_idle(self) -> None:
        """Note that the command ended in order."""
        (self.folder / "busy").unlink(missing_ok=True)


def _text(plan: Plan) -> str:
    # A machine that runs an older init speaks another protocol.
    return json.dumps([plan, INIT.read_text()], default=str)
