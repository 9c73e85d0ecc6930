"""A Dask scheduler and workers on loopback, for tests of what runs on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

SECONDS = 200.0
WORKERS = 3
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str) -> T:
    """What `condition` gives once that is true; AssertionError."""
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.05)
    return found


class Cluster:
    """A scheduler, and workers that each have a cache of their own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        file = folder / "scheduler.json"
        self.scheduler = self._dask(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)
        )
        wait_for(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler's file")
        self.address = json.loads(file.read_text())["address"]
        self.workers = [self.add_worker(number) for number in range(WORKERS)]

    def add_worker(self, number: int) -> subprocess.Popen[bytes]:
        made = self.folder / f"made{number}"
        made.mkdir()
        own = {"HVKVM_CACHE": str(self.folder / f"cache{number}"), "TMPDIR": str(made)}
        words = ("worker", self.address, "--nthreads", "1", "--no-nanny", "--name", str(number))
        return self._dask(*words, "--local-directory", str(self.folder), **own)

    def _dask(self, *words: str, **more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *words, "--no-dashboard"]
        log = self._stack.enter_context((self.folder / f"log{words[0]}{len(words)}").open("ab"))
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **more})
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def busy(self) -> list[int]:
        """The workers that have guests."""
        return [number for number in range(WORKERS) if self.guests(number)]

    def guests(self, number: int) -> list[int]:
        """The processes of a worker's cases."""
        mark = str(self.folder / f"made{number}").encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found
