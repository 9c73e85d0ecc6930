"""The kick: how a thread is brought out of KVM_RUN, and why none is lost.

A kick stores 1 into `kvm_run.immediate_exit` and then sends the thread a
real-time signal whose handler is a C function that does nothing. The signal
interrupts a KVM_RUN that is already in the guest or asleep in HLT or waiting
for INIT; the byte catches the signal that came before KVM_RUN began. The byte
is stored first, so one of the two always works:

- KVM reads the byte after the store: it returns EINTR at once.
- KVM reads it before the store: the thread is inside KVM_RUN by then, and the
  signal, sent later still, is pending there and interrupts it.

No Python handler is installed, so a kick never runs Python code, on no thread.
No SA_RESTART, or the kernel would restart the ioctl.

Only `VcpuThread` kicks; other threads take `block_signals` from here, so that no kick is theirs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from typing import Protocol

KICK_SIGNAL = signal.SIGRTMIN + 5
"""Sent to vCPU threads only. glibc keeps the two below SIGRTMIN; low offsets are what others pick first."""

_SYS_TGKILL = 234  # x86-64
_RETRY_SECONDS = 0.001

# PyDLL: neither call blocks, and dropping the GIL here would hand it to the thread being kicked or another
# one for up to a switch interval while the caller still has work to finish.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)
_syscall.restype = ctypes.c_long

_FAULT_SIGNALS = frozenset(
    (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP)
)


class _Sigaction(ctypes.Structure):
    """struct sigaction of glibc and musl on x86-64."""

    _fields_ = [
        ("sa_handler", ctypes.c_void_p),
        ("sa_mask", ctypes.c_ubyte * 128),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    ]


class HasImmediateExit(Protocol):
    """What a kick needs of struct kvm_run."""

    immediate_exit: int


def install_handler() -> None:
    """Make KICK_SIGNAL interrupt system calls and do nothing else, process-wide. Any thread; repeatable."""
    # abs(int) has a handler's signature and no effect. Python's signal module could only install a
    # handler that wakes the interpreter up, on the main thread, at every kick.
    action = _Sigaction(sa_handler=ctypes.cast(_libc.abs, ctypes.c_void_p).value)
    if _libc.sigaction(KICK_SIGNAL, ctypes.byref(action), None):
        number = ctypes.get_errno()
        raise OSError(number, f"sigaction of the kick signal: {os.strerror(number)}")


def block_signals(*kept: int) -> None:
    """Block every signal on this thread but `kept` and those that a fault of its own raises.

    So SIGINT and its like go to a thread that can act on them, and do not
    interrupt a vCPU or the I/O loop for nothing.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - _FAULT_SIGNALS - set(kept))


class Kicker:
    """Kicks one thread, from its `bind()` to its `unbind()`; outside them a kick does nothing."""

    __slots__ = ("_pid", "_run", "_tid")

    def __init__(self) -> None:
        self._run: HasImmediateExit | None = None
        self._pid = 0
        self._tid = 0

    def bind(self, run: HasImmediateExit) -> None:
        """From now on kick the calling thread, whose vCPU shares `run`."""
        install_handler()
        block_signals(KICK_SIGNAL)
        self._pid = os.getpid()
        self._tid = threading.get_native_id()
        self._run = run

    def unbind(self) -> None:
        """The thread is about to end. A kick that is under way may still reach it, or nobody."""
        self._run = None

    def kick(self) -> None:
        """Bring the thread out of KVM_RUN, or keep it from staying there. Any thread."""
        run = self._run
        if run is None:
            return
        run.immediate_exit = 1
        # tgkill and not pthread_kill: a thread that has ended is ESRCH here, undefined there.
        while _syscall(_SYS_TGKILL, self._pid, self._tid, KICK_SIGNAL) < 0:
            number = ctypes.get_errno()
            if number == errno.ESRCH:
                return
            if number != errno.EAGAIN:
                raise OSError(number, f"kick: {os.strerror(number)}")
            # The user's queue of real-time signals (RLIMIT_SIGPENDING) is full: giving up loses the kick.
            time.sleep(_RETRY_SECONDS)
