"""The process of one case of `hvkvm matrix`: python -m hvkvm.cli.matrix_child FD FILE.

FILE has the machine, FD is a pipe that nobody writes to: its end is that of whoever
started us, and then ours.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from time import sleep

END_SECONDS = 2.0
"""Between one signal to ourselves and the next."""


def main(arguments: list[str]) -> int:
    """Run what FILE says; returns the exit status of `hvkvm run` or `hvkvm warm`."""
    lifeline, file = int(arguments[0]), Path(arguments[1])
    os.set_inheritable(lifeline, False)
    threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
    from hvkvm.cli import guarded

    config, output = pickle.loads(file.read_bytes())

    def work() -> int:
        if output is None:
            from hvkvm.cli import run

            return run.run_machine(config, run.parser().parse_args(["--json", "--console"]))
        from hvkvm.cli import warm

        return warm.save_machine(config, warm.parser().parse_args(["--quiet", "-o", str(output)]))

    return guarded(work)


def _watch(lifeline: int) -> None:
    os.read(lifeline, 1)
    # The first may be passed on to the guest's command; the second ends the run.
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        os.kill(os.getpid(), number)
        sleep(END_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
