"""A distribution's own hv_kvp_daemon and hv_vss_daemon in a Linux guest, and what is asked of them.

Nothing of the daemons' package depends on the kernel's version, so the same ones
serve every kernel. Owner: the test's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from guest_artifacts import artifact
from linux_guest import LinuxGuest

DISK = "mke2fs -q /dev/ram0 2>&1 && mkdir -p /mnt/data && mount -t ext4 /dev/ram0 /mnt/data"
"""A file system to freeze; module brd gives its disk."""
WRITE = (
    "(echo written > /mnt/data/file) & writer=$!;"
    " while grep -q 'State:.[RS]' /proc/$writer/status; do sleep 0.1; done;"
    " grep -q 'State:.D' /proc/$writer/status"
)
"""A write to a frozen file system stands still, uninterruptibly; else it is over soon."""
WRITTEN = "wait $writer; cat /mnt/data/file; rm /mnt/data/file"
"""Wait for that write's end, and print what it left."""


def daemons() -> Mapping[str, Path]:
    """The daemons, and the loader and libc they need."""
    folder, libc = artifact("HVKVM_GUEST_HYPERV_DAEMONS"), artifact("HVKVM_GUEST_LIBC")
    return {
        "/usr/sbin/hv_kvp_daemon": folder / "hv_kvp_daemon",
        "/usr/sbin/hv_vss_daemon": folder / "hv_vss_daemon",
        "/lib64/ld-linux-x86-64.so.2": libc / "ld-linux-x86-64.so.2",
        "/lib/x86_64-linux-gnu/libc.so.6": libc / "libc.so.6",
    }


def ask(guest: LinuxGuest, method: Callable[..., object], *args: Any) -> Any:
    """Call `method(*args, reply)` on the I/O loop; the reply."""
    replies: list[Any] = []
    done = threading.Event()

    def reply(told: object) -> None:
        replies.append(told)
        done.set()

    guest.call(method, *args, reply)
    guest.wait_until(done.is_set, f"{method.__name__}{args}")
    return replies[0]
