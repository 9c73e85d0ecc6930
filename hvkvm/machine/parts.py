"""A whole machine as its parts: for who looks at it from outside, and asks things of its devices.

Dumps, `inspect` and the control socket take this; nobody but the command line
and tests takes a `Machine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.machine.board import Board
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.disk_shelf import DiskShelf
    from hvkvm.machine.firmware import Firmware
    from hvkvm.machine.hyperv import Hyperv
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.machine.nics import Nics
    from hvkvm.machine.orders import Orders
    from hvkvm.machine.pci import Pci
    from hvkvm.machine.platform import Platform
    from hvkvm.machine.recording import Records
    from hvkvm.machine.saving import Saver


class Parts(NamedTuple):
    """A whole machine, for looking at it and for asking things of its devices."""

    name: str
    """What `hvkvm ctl --vm` calls it."""
    platform: Platform
    lifecycle: Lifecycle
    hyperv: Hyperv
    board: Board
    bus: Bus | None
    nics: Nics | None
    disk_shelf: DiskShelf | None
    saver: Saver
    pci: Pci | None = None
    firmware: Firmware | None = None
    orders: Orders | None = None
    """What a warm guest is handed, where it is one or is made one."""
    records: Records | None = None
    """Where the configuration asks for a recording or a picture of the run."""
