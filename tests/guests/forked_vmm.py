"""VMMs that are there at once, each in a process of its own: a fork of this one.

    forked_vmm.py

Each line of input is a saved machine's file, a tab and a line for its guest's console. The VMM says first
"[vmm PID]"; then its console follows, and "[ended STATUS]" when the process is gone, killed or not: in the
same line as what has no end. What is imported and compiled once serves all of them; no thread runs here that
a fork could lose. `nvme_writer.py` has other guests.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import sleep

import hvkvm
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine

SECONDS = 600.0
LEFT_OUT = {"cli", "testing", "record", "__main__"}
"""Of hvkvm's parts, what no machine uses."""


def serve(run: Callable[[str, str], object]) -> None:
    """`run(first, second)` in a process of its own for each line of input, until there is no more."""
    # A machine imports what it needs when it needs it: an emulated host takes seconds for that.
    for module in pkgutil.walk_packages(hvkvm.__path__, "hvkvm."):
        if module.name.split(".")[1] not in LEFT_OUT:
            importlib.import_module(module.name)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                say(f"[vmm {os.getpid()}]\n".encode())
                run(*line.rstrip("\n").split("\t"))
            except BaseException:
                say(f"complaint: {traceback.format_exc()}\n".encode())
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        say(f"[ended {os.waitstatus_to_exitcode(status)}]\n".encode())


def say(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def go_on(file: str, typed: str) -> None:
    with Machine(MachineConfig(kernel=Path(file), restore=Path(file), timeout=SECONDS)) as machine:
        machine.board.attach_sink(say)
        machine.start()
        data = f"{typed}\n".encode()
        while data:
            data = data[machine.board.serial.feed(data) :]
            sleep(0)
        machine.wait(SECONDS)


if __name__ == "__main__":
    serve(go_on)
