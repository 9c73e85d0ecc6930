"""How fast this processor's time-stamp counter (TSC) runs, so that the lab's Linux need not find out.

Why: emulated RDTSC reads this processor's counter. At boot Linux compares that with an
emulated timer, and on a busy host the emulator is kept waiting between the two: about one
lab in a dozen then took 2445 MHz for 491, and all its clocks ran five times too fast, the
time limits of tests with them. Called by `steps.lab_host`. Any thread.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable

# rdtsc; shl rdx, 32; or rax, rdx; ret
_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_TRIES = 50
_SECONDS = 0.1
_PLAUSIBLE_KHZ = range(100_000, 20_000_001)


def khz() -> int | None:
    """The counter's kHz, good to some 100 parts in a million, after 0.1 s; None where it cannot be read."""
    if platform.machine() != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # some hardened kernels let nobody run what he has written
        return None
    page[: len(_CODE)] = _CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return measured(ctypes.CFUNCTYPE(ctypes.c_uint64)(address), time.monotonic_ns, time.sleep)


def measured(
    counter: Callable[[], int], clock_ns: Callable[[], int], sleep: Callable[[float], None]
) -> int | None:
    """The kHz of `counter` by `clock_ns`; None if it cannot be one of a processor."""
    before = _at_once(counter, clock_ns)
    sleep(_SECONDS)
    after = _at_once(counter, clock_ns)
    found = (after[0] - before[0]) * 1_000_000 // max(1, after[1] - before[1])
    return found if found in _PLAUSIBLE_KHZ else None


def _at_once(counter: Callable[[], int], clock_ns: Callable[[], int]) -> tuple[int, int]:
    """The counter and the time of the try in which the least time went by: nothing came in between."""
    tries = []
    for _ in range(_TRIES):
        started = clock_ns()
        ticks = counter()
        tries.append((clock_ns() - started, ticks, started))
    _least, ticks, started = min(tries)
    return ticks, started
