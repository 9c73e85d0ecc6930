"""Atomic operations by host address, for words that a running guest changes too.

Why: a read-modify-write of an event-flag word in plain Python loses what the
guest cleared in between, and then a wake-up with it (S36); `struct.pack_into`
is worse, it zeroes its destination first. Everything here is sequentially
consistent.

Any thread. An address must be naturally aligned, lie on one live mapping
(`GuestMemory.hva()`, `OverlayPage.hva`) and stay mapped during the call: a bad
one is not an exception but a SIGSEGV, so nothing taken from a guest reaches this
file unchecked.

Two backends give the same results: libatomic (`__atomic_*`, GCC's documented
library ABI), or, where that is not installed, a page of x86-64 instructions.
Both are called with the GIL held: an operation takes nanoseconds, handing the
GIL over can take milliseconds. Nothing here needs it: the operations are atomic
by themselves, also between threads of a Python without one (`FREE_THREADED`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from hvkvm.tuples import NamedTuple

FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether threads run Python code at the same time, so that a store and the load behind it need a fence, and
views of one mapping a buffer each (`memory.mapping`)."""

_SEQ_CST = 5  # __ATOMIC_SEQ_CST

_u8 = ctypes.c_uint64
_u4 = ctypes.c_uint32
_pointer = ctypes.c_void_p
_order = ctypes.c_int


class Backend(NamedTuple):
    """One implementation of every operation; sizes in a name are bytes."""

    name: str
    fetch_or_8: Callable[[int, int], int]
    fetch_and_8: Callable[[int, int], int]
    exchange_4: Callable[[int, int], int]
    compare_exchange_4: Callable[[int, int, int], bool]
    fence: Callable[[], None]


def libatomic_backend(library: str = "libatomic.so.1") -> Backend:
    """The backend on libatomic. OSError or AttributeError when it is missing or incomplete."""
    lib = ctypes.PyDLL(library)
    raw_or, raw_and = lib.__atomic_fetch_or_8, lib.__atomic_fetch_and_8
    for function in (raw_or, raw_and):
        function.argtypes, function.restype = (_pointer, _u8, _order), _u8
    raw_exchange = lib.__atomic_exchange_4
    raw_exchange.argtypes, raw_exchange.restype = (_pointer, _u4, _order), _u4
    raw_compare = lib.__atomic_compare_exchange_4
    raw_compare.argtypes = (_pointer, ctypes.POINTER(_u4), _u4, _order, _order)
    raw_compare.restype = ctypes.c_bool
    raw_fence = lib.atomic_thread_fence
    raw_fence.argtypes, raw_fence.restype = (_order,), None

    def fetch_or_8(addr: int, mask: int) -> int:
        return raw_or(addr, mask, _SEQ_CST)  # type: ignore[no-any-return]

    def fetch_and_8(addr: int, mask: int) -> int:
        return raw_and(addr, mask, _SEQ_CST)  # type: ignore[no-any-return]

    def exchange_4(addr: int, value: int) -> int:
        return raw_exchange(addr, value, _SEQ_CST)  # type: ignore[no-any-return]

    def compare_exchange_4(addr: int, expected: int, desired: int) -> bool:
        # A fresh cell a call: the library writes the value it found into it.
        return raw_compare(addr, _u4(expected), desired, _SEQ_CST, _SEQ_CST)  # type: ignore[no-any-return]

    fence = partial(raw_fence, _SEQ_CST)
    return Backend("libatomic", fetch_or_8, fetch_and_8, exchange_4, compare_exchange_4, fence)


# System V AMD64 calling convention: arguments in rdi, rsi, rdx; result in rax.
_CODE = {
    "fetch_or_8": (
        "48 8b 07"  # mov rax, [rdi]
        "48 89 c1"  # again: mov rcx, rax
        "48 09 f1"  # or rcx, rsi
        "f0 48 0f b1 0f"  # lock cmpxchg [rdi], rcx
        "75 f3"  # jne again
        "c3"
    ),
    "fetch_and_8": (
        "48 8b 07"  # mov rax, [rdi]
        "48 89 c1"  # again: mov rcx, rax
        "48 21 f1"  # and rcx, rsi
        "f0 48 0f b1 0f"  # lock cmpxchg [rdi], rcx
        "75 f3"  # jne again
        "c3"
    ),
    "exchange_4": "89 f0 87 07 c3",  # mov eax, esi; xchg [rdi], eax (locks by itself)
    "compare_exchange_4": (
        "89 f0"  # mov eax, esi
        "f0 0f b1 17"  # lock cmpxchg [rdi], edx
        "0f 94 c0"  # sete al
        "0f b6 c0"  # movzx eax, al
        "c3"
    ),
    "fence": "0f ae f0 c3",  # mfence
}
_CODE_ALIGN = 32


def instruction_backend() -> Backend:
    """The backend on our own instructions. OSError where no executable page can be had."""
    import mmap
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        raise OSError(f"no atomic instructions known for {platform.machine()}: install libatomic")
    code, starts = bytearray(), {}
    for name, text in _CODE.items():
        starts[name] = len(code)
        code += bytes.fromhex(text)
        code += bytes(-len(code) % _CODE_ALIGN)
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(code)] = bytes(code)
    # The export pins the page: it is never unmapped.
    base = ctypes.addressof(ctypes.c_char.from_buffer(page))
    _pages.append(page)

    def bind(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
        prototype = ctypes.PYFUNCTYPE(result, *arguments)
        return prototype(base + starts[name])

    return Backend(
        "instructions",
        bind("fetch_or_8", _u8, _pointer, _u8),
        bind("fetch_and_8", _u8, _pointer, _u8),
        bind("exchange_4", _u4, _pointer, _u4),
        bind("compare_exchange_4", ctypes.c_bool, _pointer, _u4, _u4),
        bind("fence", None),
    )


_pages: list[object] = []


def _choose() -> Backend:
    try:
        return libatomic_backend()
    except (OSError, AttributeError):
        return instruction_backend()


backend = _choose()
"""The one in use."""

fetch_or_8 = backend.fetch_or_8
"""`fetch_or_8(addr, mask)`: OR `mask` into the 8-byte word, return what it was before."""

fetch_and_8 = backend.fetch_and_8
"""`fetch_and_8(addr, mask)`: AND `mask` into the 8-byte word, return what it was before."""

exchange_4 = backend.exchange_4
"""`exchange_4(addr, value)`: store into the 4-byte word, return what it was before."""

compare_exchange_4 = backend.compare_exchange_4
"""`compare_exchange_4(addr, expected, desired)`: store if it held `expected`; whether it did."""

fence = backend.fence
"""A full fence: no later load passes an earlier store (publish an index, then look at the peer's mask)."""

# A ctypes item access of natural size is one mov, which x86 makes acquire (load) or release (store).

_load_4 = _u4.from_address


def load_4(addr: int) -> int:
    """The 4-byte word, in one load with acquire order."""
    return _load_4(addr).value


def store_4(addr: int, value: int) -> None:
    """Write the 4-byte word in one store with release order; `fence()` when a load must stay behind it."""
    _load_4(addr).value = value
