"""Which boots are quiet: those of a command whose console nobody is shown, unless the user chose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hvkvm.cli.front import with_quiet_boot
from hvkvm.machine.config import MachineConfig

KERNEL = MachineConfig(kernel=Path("vmlinuz"), command=("true",))


@pytest.mark.parametrize(
    ("config", "console", "append"),
    [
        (KERNEL, False, "quiet"),
        (KERNEL._replace(append="root=/dev/sda"), False, "root=/dev/sda quiet"),
        (KERNEL, True, ""),
        (KERNEL._replace(command=()), False, ""),
        (KERNEL._replace(append="loglevel=7"), False, "loglevel=7"),
        (KERNEL._replace(append="x debug"), False, "x debug"),
        (KERNEL._replace(append="ignore_loglevel"), False, "ignore_loglevel"),
        (KERNEL._replace(append="earlyprintk=ttyS0"), False, "earlyprintk=ttyS0"),
        (KERNEL._replace(append="x.debug=1 'quiet"), False, "x.debug=1 'quiet quiet"),
        (KERNEL._replace(warm=Path("warm.state")), False, ""),
        (MachineConfig(restore=Path("saved"), command=("true",)), False, ""),
        (MachineConfig(), False, ""),
    ],
)
def test_a_boot_that_nobody_watches_is_quiet(config: MachineConfig, console: bool, append: str) -> None:
    assert with_quiet_boot(config, SimpleNamespace(console=console)).append == append
