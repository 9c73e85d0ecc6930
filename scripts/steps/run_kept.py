"""`make run` from its second time on: its command runs in a copy of a guest that was kept, and nothing boots.

The first time there is none yet: then it is booted, with its console shown, and kept where the
command's own copy of it goes on at once. Another kernel, hvkvm, option or host CPU is another guest.
Called by `scripts/run`, where KVM has Hyper-V. One thread.

    run_kept.py [options of hvkvm warm] -- [options of hvkvm run --from] -- COMMAND
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.pop(0)  # this folder, which has a file with the name of a module of Python's own

from hvkvm.cli import main
from hvkvm.cli.run import machine_config, values_of
from hvkvm.cli.warm import parser
from hvkvm.errors import HvkvmError
from hvkvm.machine.warm_kept import find, kept


def say(text: str) -> None:
    """For people, whatever else is shown."""
    print(f"run: {text}", file=sys.stderr, flush=True)


def show(data: bytes) -> None:
    """The console of the guest that is made warm."""
    sys.stderr.write(data.decode(errors="replace").replace("\r\n", "\n"))
    sys.stderr.flush()


def guest(arguments: list[str]) -> Path:
    """The kept guest's file. Raises what `kept` raises."""
    options = parser().parse_args(arguments)
    config = machine_config(options, values_of(options))._replace(control="off")
    file = find(config)
    if file is not None:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
        say(f"in a copy of the guest that was booted {made} ({file}); HVKVM_WARM=off boots one")
        return file
    say("booting a guest, which is kept: the next run takes a copy of it (HVKVM_WARM=off boots each time)")
    file = kept(config, on_console=show)
    say(f"kept in {file}, {file.stat().st_blocks * 512 >> 20} MiB on disk; the command runs in a copy of it")
    return file


if __name__ == "__main__":
    at = sys.argv.index("--", 1)
    try:
        chosen = guest(sys.argv[1:at])
    except HvkvmError as error:
        say(str(error))
        sys.exit(error.exit_status)
    except OSError as error:
        say(f"{error.filename}: {error.strerror}; HVKVM_WARM=off boots a guest and keeps none")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main(["run", "--from", str(chosen), *sys.argv[at + 1 :]]))
