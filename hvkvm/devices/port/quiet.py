"""Ports that every PC guest tries and that need no device: their names, and how to keep them cheap.

An access to a port nobody claims is answered all ones and, once in a while,
reported. For these it is not worth a report. The delay port 0x80 is worth
even less: guests write it only to pass time, so `absorb_writes` gives it to an
ioeventfd nobody reads, and the write never leaves the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvkvm.kvm.doorbell import IoEventFd
    from hvkvm.kvm.vm import Vm

POST_PORT = 0x80
IO_DELAY_PORT = 0xED  # Linux with io_delay=0xed

QUIET_RANGES = (
    (0x00, 0x10, "DMA controller 1"),
    (0x2E, 0x02, "super I/O"),
    (0x4E, 0x02, "super I/O"),
    (0x81, 0x0F, "DMA page registers"),
    (0xB2, 0x02, "SMI command"),
    (0xC0, 0x20, "DMA controller 2"),
    (0xF0, 0x02, "FPU error"),
    (0x170, 0x08, "IDE 2"),
    (0x1F0, 0x08, "IDE 1"),
    (0x201, 0x01, "game port"),
    (0x220, 0x10, "sound"),
    (0x278, 0x08, "LPT2"),
    (0x2E8, 0x08, "COM4"),
    (0x2F8, 0x08, "COM2"),
    (0x376, 0x02, "IDE 2 control"),
    (0x378, 0x08, "LPT1"),
    (0x388, 0x04, "sound"),
    (0x3B0, 0x30, "VGA"),
    (0x3E8, 0x08, "COM3"),
    (0x3F0, 0x08, "floppy, IDE 1 control"),
    (0x4D0, 0x02, "interrupt edge/level control"),
    (POST_PORT, 0x01, "POST code"),
    (IO_DELAY_PORT, 0x01, "I/O delay"),
)


def quiet_ports() -> Iterator[int]:
    """All ports of QUIET_RANGES, for `PortBus.expect`."""
    return chain.from_iterable(range(port, port + length) for port, length, _ in QUIET_RANGES)


def absorb_writes(vm: Vm, ports: Iterable[int] = (POST_PORT,)) -> list[IoEventFd]:
    """Swallow byte writes to `ports` inside the kernel. The caller closes the handles.

    An eventfd counter that nobody reads stops at its maximum and blocks nobody
    in the kernel. Reads still exit. Raises KvmIoctlError.
    """
    from hvkvm.kvm.doorbell import IoEventFd

    handles: list[IoEventFd] = []
    try:
        handles.extend(IoEventFd(vm, port, 1, pio=True) for port in ports)
    except BaseException:
        for handle in handles:
            handle.close()
        raise
    return handles
