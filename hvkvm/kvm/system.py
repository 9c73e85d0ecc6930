"""/dev/kvm: what this kernel's KVM can do, and where VMs come from.

Used by machine set-up and by `hvkvm doctor`. Owner: the main thread, though
the questions may be asked from any.
"""

from __future__ import annotations

import errno
import os

from hvkvm.abi import kvm_requests as rq
from hvkvm.abi.kvm import KVM_API_VERSION, KVM_CAP_SYS_HYPERV_CPUID
from hvkvm.abi.kvm_structs import kvm_cpuid_entry2, kvm_msr_list_of
from hvkvm.errors import CapabilityMissing, KvmIoctlError, KvmUnavailable
from hvkvm.kvm import ioctl as door
from hvkvm.kvm.cpuid import get_cpuid
from hvkvm.kvm.handle import Handle
from hvkvm.kvm.vm import Vm

_REMEDIES = {
    errno.ENOENT: "load the kvm_intel or kvm_amd module, or enable virtualization in the firmware",
    errno.ENODEV: "load the kvm_intel or kvm_amd module, or enable virtualization in the firmware",
    errno.ENXIO: "load the kvm_intel or kvm_amd module, or enable virtualization in the firmware",
    errno.EACCES: "add yourself to the group that owns it (usually kvm), or run as root",
    errno.EPERM: "the sandbox or container forbids it: pass the device in",
    errno.EBUSY: "another hypervisor holds the CPU's virtualization extensions: stop it",
}


class Kvm(Handle):
    """The system fd. A context manager; VMs made from it outlive its close."""

    __slots__ = ("path", "vcpu_mmap_size")

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open KVM. Raises KvmUnavailable (missing, not permitted, not KVM) with a one-line remedy."""
        self.path = path
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "check that this is the KVM device")
            raise KvmUnavailable(f"cannot open {path}: {error.strerror}; {remedy}") from error
        super().__init__(fd)
        try:
            version = door.ioctl(fd, rq.KVM_GET_API_VERSION)
            if version != KVM_API_VERSION:
                raise KvmUnavailable(
                    f"{path} speaks KVM API {version}, not {KVM_API_VERSION}; use a newer kernel"
                )
            self.vcpu_mmap_size = door.ioctl(fd, rq.KVM_GET_VCPU_MMAP_SIZE)
        except KvmIoctlError as error:
            self.close()
            raise KvmUnavailable(
                f"{path} does not answer as KVM: {error.strerror}; give the KVM device"
            ) from error
        except BaseException:
            self.close()
            raise

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if this kernel lacks `cap`, else 1 or the number it stands for."""
        return door.ioctl(self.fd, rq.KVM_CHECK_EXTENSION, cap)

    def create_vm(self) -> Vm:
        """A new, empty VM. Raises KvmIoctlError (EBUSY, ENOMEM...)."""
        while True:
            try:
                return Vm(door.ioctl(self.fd, rq.KVM_CREATE_VM), self.vcpu_mmap_size)
            except KvmIoctlError as error:
                # Any signal, also one that nobody acts on, interrupts it while it registers with the memory
                # manager (mm_take_all_locks); QEMU tries again, too. A handler may raise in between.
                if error.errno != errno.EINTR:
                    raise

    def supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """What KVM_SET_CPUID2 may offer a guest on this host (KVM's own 0x4000_0000 leaves included)."""
        return get_cpuid(self.fd, rq.KVM_GET_SUPPORTED_CPUID)

    def supported_hv_cpuid(self) -> list[kvm_cpuid_entry2]:
        """The Hyper-V leaves this KVM can back. Raises CapabilityMissing where it has none."""
        if not self.check_extension(KVM_CAP_SYS_HYPERV_CPUID):
            raise CapabilityMissing(
                "KVM_CAP_SYS_HYPERV_CPUID: this kernel's KVM has no Hyper-V enlightenments"
                " (built without CONFIG_KVM_HYPERV, or older than 5.11)"
            )
        return get_cpuid(self.fd, rq.KVM_GET_SUPPORTED_HV_CPUID, room=16)

    def msr_index_list(self) -> list[int]:
        """The MSRs that KVM_GET_MSRS can save on this host."""
        room = 256
        while True:
            table = kvm_msr_list_of(room)(nmsrs=room)
            try:
                door.ioctl(self.fd, rq.KVM_GET_MSR_INDEX_LIST, table)
            except KvmIoctlError as error:
                if error.errno != errno.E2BIG or table.nmsrs <= room:
                    raise
                room = table.nmsrs  # the kernel says how many it has
                continue
            return list(table.indices[: table.nmsrs])
