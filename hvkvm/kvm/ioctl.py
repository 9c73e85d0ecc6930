"""The one door to the kernel: every KVM ioctl of this process goes through `ioctl` or `Vcpu.enter`.

One place turns a negative return into a typed error, and one place is there for
tests to replace (`monkeypatch.setattr("hvkvm.kvm.ioctl.ioctl", ...)`): rooms
call it as `door.ioctl(...)`, never by a copied name. Used by `hvkvm.kvm` alone,
from whatever thread owns the fd.

ctypes, not `fcntl.ioctl`: fcntl keeps the GIL for buffers above 1024 bytes and
cannot pass an address above 2 GiB as a number; ctypes does neither.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from hvkvm.errors import KvmIoctlError

if TYPE_CHECKING:
    from hvkvm.abi.kvm_requests import Request

    IoctlArg = int | ctypes.Structure | ctypes.Union | ctypes.Array[Any] | ctypes._SimpleCData[Any]

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int

# For KVM_RUN alone. A whole port-write exit measured (CPython 3.11): this 9.1 us, ctypes with argtypes
# 9.8-11.2 us, fcntl.ioctl 11.6-12.0 us; a kick's EINTR costs fcntl.ioctl an exception on top. Take care:
# without argtypes every int is passed as a C int, so only numbers below 2**31 are right here.
run_ioctl = _libc["ioctl"]
run_ioctl.restype = ctypes.c_int

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
