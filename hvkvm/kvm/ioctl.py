"""The one way into the kernel: every KVM ioctl of this process goes through `ioctl` or `Vcpu.enter`.

One place turns a negative return into a typed error, and one place is there for
tests to replace (`monkeypatch.setattr("hvkvm.kvm.ioctl.ioctl", ...)`): modules
call it as `door.ioctl(...)`, never by a copied name. Used by `hvkvm.kvm` alone,
from whatever thread owns the fd.

ctypes, and `fcntl.ioctl` for KVM_RUN alone where that is right: fcntl keeps the GIL for buffers
above 1024 bytes and cannot pass an address above 2 GiB as a number.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from typing import TYPE_CHECKING, Any

from hvkvm.errors import KvmIoctlError

if TYPE_CHECKING:
    from hvkvm.abi.kvm_requests import Request

    IoctlArg = int | ctypes.Structure | ctypes.Union | ctypes.Array[Any] | ctypes._SimpleCData[Any]

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int


def _run_by_ctypes(fd: int, request: int) -> None:
    if _ioctl(fd, request, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# For KVM_RUN alone, called as run_ioctl(fd, KVM_RUN): raises OSError, EINTR included, and never retries.
# Before Python 3.14 by fcntl, without a third argument: it then has nothing to convert and costs half of a
# ctypes call (0.35 us to 0.7 us, CPython 3.11); with a 0 there it costs twice as much as ctypes. From 3.14 on
# fcntl.ioctl tries again after EINTR: a kicked vCPU would then never come back.
run_ioctl = fcntl.ioctl if sys.version_info < (3, 14) else _run_by_ctypes

_byref = ctypes.byref
_get_errno = ctypes.get_errno


def ioctl(fd: int, request: Request, arg: IoctlArg = 0, detail: str = "") -> int:
    """Do one ioctl and return what the kernel returned (0 or more). Any thread; releases the GIL.

    `arg` is a number, or a ctypes object to pass by address. Raises
    KvmIoctlError with the request's C name and scope; EINTR too, since an
    interrupted KVM_RUN means a kick and retrying here would lose it. `detail`
    joins the error's text.
    """
    result: int = _ioctl(fd, request.number, arg if type(arg) is int else _byref(arg))  # type: ignore[arg-type]
    if result < 0:
        raise KvmIoctlError(_get_errno(), request.name, request.scope, detail)
    return result
