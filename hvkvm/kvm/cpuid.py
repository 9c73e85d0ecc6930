"""CPUID tables in and out of KVM: the grow-and-retry that KVM_GET_*_CPUID2 wants.

Used by `Kvm` and `Vcpu`; owner thread is the fd's.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hvkvm.abi.kvm_structs import kvm_cpuid2_of, kvm_cpuid_entry2
from hvkvm.errors import KvmIoctlError
from hvkvm.kvm import ioctl as door

if TYPE_CHECKING:
    from hvkvm.abi.kvm_requests import Request

_MOST = 1024  # KVM_MAX_CPUID_ENTRIES is 256 (80 before Linux 5.10) and not in the UAPI


def get_cpuid(fd: int, request: Request, room: int = 128) -> list[kvm_cpuid_entry2]:
    """Read a CPUID table, with more room each time the kernel says E2BIG. Raises KvmIoctlError."""
    while True:
        table = kvm_cpuid2_of(room)(nent=room)
        try:
            door.ioctl(fd, request, table)
        except KvmIoctlError as error:
            if error.errno != errno.E2BIG or room >= _MOST:
                raise
            room *= 2
            continue
        return [kvm_cpuid_entry2.from_buffer_copy(table.entries[i]) for i in range(table.nent)]


def cpuid_table(entries: Iterable[kvm_cpuid_entry2]) -> Any:
    """A struct kvm_cpuid2 that holds copies of `entries`."""
    listed = list(entries)
    table = kvm_cpuid2_of(len(listed))(nent=len(listed))
    for i, entry in enumerate(listed):
        table.entries[i] = entry
    return table
