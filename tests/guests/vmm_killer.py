"""VMMs that are killed while their guest writes to disks: the test's side of `forked_vmm.py`.

Owner: the test's thread.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

SECONDS = 600.0
"""How long one guest may take, on an emulated host that is busy."""

SHOWN = 20
_STABLE = r"^stable (\d+ \d+)$"


class Killer:
    """Starts VMMs one after the other, listens to what their guests say is stable, and kills them."""

    def __init__(self, process: subprocess.Popen[str], disks: int) -> None:
        self._process = process
        self._disks = disks
        self._lines: list[str] = []

    def kill_one(self, order: str, chance: Random, most: int) -> list[int]:
        """Have a VMM run by `order`, and kill it somewhere after up to `most` batches.

        The last batch of each disk that was told to be stable. AssertionError if the VMM ends by itself.
        """
        assert self._process.stdin is not None
        self._lines = []
        print(order, file=self._process.stdin, flush=True)
        pid = int(self._wait_for(r"\[vmm (\d+)\]"))
        stable = [0] * self._disks
        for _ in range(chance.randint(1, most)):
            self._note(self._wait_for(_STABLE), stable)
        threading.Event().wait(chance.random() / 10)  # anywhere within a batch
        os.kill(pid, signal.SIGKILL)
        while True:
            line = self._line()
            if found := re.search(_STABLE, line):
                self._note(found[1], stable)
            if found := re.search(r"\[ended (.*)\]$", line):
                assert found[1] == "-9", self._lines[-SHOWN:]
                return stable

    def _note(self, told: str, stable: list[int]) -> None:
        disk, batch = map(int, told.split())
        assert batch == stable[disk] + 1, self._lines[-SHOWN:]
        stable[disk] = batch

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._lines.append(line.strip())
        assert line.endswith("\n"), f"the VMM's parent has ended: {self._lines[-SHOWN:]}"
        assert "complaint" not in line, self._lines[-SHOWN:]
        return line.strip()

    def _wait_for(self, pattern: str) -> str:
        while True:
            line = self._line()
            assert "[ended " not in line, self._lines[-SHOWN:]
            if found := re.search(pattern, line):
                return found[1]


@contextmanager
def vmm_killer(program: str, disks: int, kills: int) -> Iterator[Killer]:
    """`program` is a file that calls `forked_vmm.serve`; each guest writes to so many disks."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    ) as process:  # fmt: skip
        watchdog = threading.Timer((kills + 1) * SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            yield Killer(process, disks)
        finally:
            watchdog.cancel()
            os.killpg(process.pid, signal.SIGKILL)
