"""ptrace, by python-ptrace's binding: its requests, and what it has no name for.

Importing this without python-ptrace (an optional extra) raises CapabilityMissing.
Used by `ioctl_trace` alone, on the tracer's one thread: the kernel refuses others.
"""

from __future__ import annotations

import errno
import os
from ctypes import Structure, Union, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

from hvkvm.errors import CapabilityMissing

try:
    from ptrace import PtraceError as PtraceError  # "as": passed on
    from ptrace.binding import func as _func
except ImportError as error:
    raise CapabilityMissing("python-ptrace is not installed; run: pip install 'hvkvm[trace]'") from error

binding = _func

# What python-ptrace's binding has no name for.
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_LISTEN = 0x4208
PTRACE_GET_SYSCALL_INFO = 0x420E
PTRACE_EVENT_STOP = 128
WALL = 0x40000000  # __WALL
AUDIT_ARCH_X86_64 = 0xC000003E
ENTRY, EXIT = 1, 2  # PTRACE_SYSCALL_INFO_*
OPTIONS = (
    binding.PTRACE_O_TRACESYSGOOD
    | binding.PTRACE_O_TRACECLONE
    | binding.PTRACE_O_TRACEFORK
    | binding.PTRACE_O_TRACEVFORK
    | binding.PTRACE_O_TRACEEXEC
)
BIRTHS = (binding.PTRACE_EVENT_CLONE, binding.PTRACE_EVENT_FORK, binding.PTRACE_EVENT_VFORK)


class ptrace_syscall_info__entry(Structure):
    _fields_ = [("nr", c_uint64), ("args", c_uint64 * 6)]


class ptrace_syscall_info__exit(Structure):
    _fields_ = [("rval", c_int64), ("is_error", c_uint8)]


class _ptrace_syscall_info_u(Union):
    _fields_ = [("entry", ptrace_syscall_info__entry), ("exit", ptrace_syscall_info__exit)]


class ptrace_syscall_info(Structure):
    """<linux/ptrace.h>; PTRACE_GET_SYSCALL_INFO takes its size, so older and newer kernels agree."""

    _anonymous_ = ("_u",)
    _fields_ = [
        ("op", c_uint8),
        ("pad", c_uint8),
        ("flags", c_uint16),
        ("arch", c_uint32),
        ("instruction_pointer", c_uint64),
        ("stack_pointer", c_uint64),
        ("_u", _ptrace_syscall_info_u),
    ]


def request(number: int, tid: int, address: int = 0, data: int = 0) -> bool:
    """One ptrace request; False if the thread was killed meanwhile (its end is reported like any)."""
    try:
        binding.ptrace(number, tid, address, data)
    except PtraceError as error:
        if error.errno != errno.ESRCH:
            raise
        return False
    return True


def forbidden(what: str, error: PtraceError, remedy: str) -> CapabilityMissing:
    """The error to raise where the kernel refused to let us trace `what`."""
    if error.errno not in (errno.EPERM, errno.EACCES):
        return CapabilityMissing(f"{what}: cannot trace it ({os.strerror(error.errno)}); {remedy}")
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as file:
            scope = f" (kernel.yama.ptrace_scope is {file.read().strip()})"
    except OSError:
        scope = ""
    return CapabilityMissing(f"{what}: not permitted to trace it{scope}; {remedy}")
