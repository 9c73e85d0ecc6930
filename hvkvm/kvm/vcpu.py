"""A vCPU's fd and its kvm_run page: entering the guest, and the vCPU's state.

Owner: the vCPU's own thread. KVM holds the vCPU's mutex for the whole of
KVM_RUN, so an ioctl from another thread would wait until the guest exits;
others `submit` their work to the thread. Two things are for everyone:
`run.immediate_exit = 1` (one byte store) and KVM_NMI, which is no exception to
the waiting but may be sent before the thread starts.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from ctypes import sizeof
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from hvkvm.abi import kvm_requests as rq
from hvkvm.abi.kvm import KVM_CAP_HYPERV_CPUID, KVM_CAP_NESTED_STATE, KVM_CAP_XSAVE2, KVM_EXIT_INTR
from hvkvm.abi.kvm_cpu_structs import MSR_ENTRY
from hvkvm.abi.kvm_structs import (
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_enable_cap,
    kvm_interrupt,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msrs,
    kvm_msrs_of,
    kvm_nested_state,
    kvm_regs,
    kvm_run,
    kvm_sregs,
    kvm_translation,
    kvm_vcpu_events,
    kvm_xcrs,
)
from hvkvm.errors import CapabilityMissing, KvmIoctlError
from hvkvm.kvm import ioctl as door
from hvkvm.kvm.cpuid import cpuid_table, get_cpuid
from hvkvm.kvm.handle import Handle

if TYPE_CHECKING:
    import ctypes


_ENABLE_CAP = rq.KVM_ENABLE_CAP._replace(scope="vcpu")
_SUPPORTED_HV_CPUID = rq.KVM_GET_SUPPORTED_HV_CPUID._replace(scope="vcpu")
_KVM_RUN = rq.KVM_RUN.number
_MAX_IO_MSRS = 255  # one KVM_GET_MSRS or KVM_SET_MSRS takes fewer than the kernel's MAX_IO_MSRS, 256
_PLAIN_XSAVE = 4096
_NESTED_HEADER = 128
_MSR_TABLE = kvm_msrs.entries.offset


class Vcpu(Handle):
    """One vCPU. `index` is its APIC id and, vCPUs being created in order, its VP index.

    `run` is struct kvm_run in the shared map; `data` is the whole map as bytes
    (port data is at `run.io.data_offset`). After `close` both show a private
    copy, so that a late diagnosis reads stale values and not freed memory.
    """

    __slots__ = ("_capability", "_enter", "_map", "_xsave_size", "data", "index", "run")

    def __init__(self, fd: int, index: int, mmap_size: int, capability: Callable[[int], int]) -> None:
        """Take over `fd` (from `Vm.create_vcpu` only); closes it if the map fails.

        `capability(number)` is what the VM answers to KVM_CHECK_EXTENSION.
        """
        try:
            self._map = mmap.mmap(fd, mmap_size)
        except BaseException:
            os.close(fd)
            raise
        super().__init__(fd)
        self._capability = capability
        self.index = index
        self.run: kvm_run = kvm_run.from_buffer(self._map)
        self.data = memoryview(self._map)
        self._enter: Callable[[], object] = partial(door.run_ioctl, fd, _KVM_RUN)
        self._xsave_size = 0

    def enter(self) -> int:
        """KVM_RUN once; returns run.exit_reason. The hot path: one call that releases the GIL.

        Returns KVM_EXIT_INTR for EINTR (a kick) and EAGAIN (an AP changed
        state: enter again); errno decides that, since exit_reason may be stale
        then. Other errors raise KvmIoctlError.
        """
        try:
            self._enter()
        except (InterruptedError, BlockingIOError):
            return KVM_EXIT_INTR
        except OSError as error:
            raise KvmIoctlError(
                error.errno or 0, "KVM_RUN", "vcpu", f"vCPU {self.index}, exit_reason {self.run.exit_reason}"
            ) from None
        return self.run.exit_reason  # type: ignore[no-any-return]

    def io_data(self, offset: int, size: int) -> memoryview:
        """The port data of an exit: `size` writable bytes at `run.io.data_offset`. Do not keep it."""
        return self.data[offset : offset + size]

    def complete_exit(self) -> None:
        """Let KVM finish a pending IN, MMIO or MSR read without running guest code: before reading state.

        `run.immediate_exit` stays 1, as after a kick: clearing it here could
        lose the kick of a thread that set it meanwhile. The vCPU's loop clears
        it before it drains its queue; who calls `enter` by hand clears it too.
        """
        self.run.immediate_exit = 1
        self.enter()

    def _get(self, request: rq.Request, into: ctypes.Structure) -> None:
        door.ioctl(self.fd, request, into, f"vCPU {self.index}")

    _set = _get  # the direction is in the request

    # Registers.

    def regs(self) -> kvm_regs:
        """General registers, RIP and RFLAGS."""
        state = kvm_regs()
        self._get(rq.KVM_GET_REGS, state)
        return state

    def set_regs(self, state: kvm_regs) -> None:
        self._set(rq.KVM_SET_REGS, state)

    def sregs(self) -> kvm_sregs:
        """Segments, descriptor tables, control registers, EFER, APIC base."""
        state = kvm_sregs()
        self._get(rq.KVM_GET_SREGS, state)
        return state

    def set_sregs(self, state: kvm_sregs) -> None:
        self._set(rq.KVM_SET_SREGS, state)

    def debugregs(self) -> kvm_debugregs:
        state = kvm_debugregs()
        self._get(rq.KVM_GET_DEBUGREGS, state)
        return state

    def set_debugregs(self, state: kvm_debugregs) -> None:
        self._set(rq.KVM_SET_DEBUGREGS, state)

    def xcrs(self) -> kvm_xcrs:
        state = kvm_xcrs()
        self._get(rq.KVM_GET_XCRS, state)
        return state

    def set_xcrs(self, state: kvm_xcrs) -> None:
        if state.nr_xcrs:  # none on a host CPU without XSAVE, and there KVM refuses the ioctl altogether
            self._set(rq.KVM_SET_XCRS, state)

    def xsave(self) -> bytes:
        """The XSAVE area as KVM gives it: 4096 bytes, or more where dynamic features (AMX) are enabled."""
        size = self._xsave_bytes()
        area = bytearray(size)
        request = rq.KVM_GET_XSAVE2 if size > _PLAIN_XSAVE else rq.KVM_GET_XSAVE
        door.ioctl(self.fd, request, _bytes_at(area), f"vCPU {self.index}")
        return bytes(area)

    def set_xsave(self, area: bytes) -> None:
        """Put back what `xsave` gave. Raises ValueError for less than KVM would read."""
        if len(area) < self._xsave_bytes():
            raise ValueError(f"an XSAVE area has {self._xsave_bytes()} bytes here, not {len(area)}")
        door.ioctl(self.fd, rq.KVM_SET_XSAVE, _bytes_at(bytearray(area)), f"vCPU {self.index}")

    def _xsave_bytes(self) -> int:
        if not self._xsave_size:
            self._xsave_size = max(_PLAIN_XSAVE, self._capability(KVM_CAP_XSAVE2))
        return self._xsave_size

    def nested_state(self) -> bytes:
        """The guest's own use of VMX or SVM: struct kvm_nested_state with its data; empty without KVM's."""
        room = self._capability(KVM_CAP_NESTED_STATE)
        if not room:
            return b""
        area = bytearray(max(room, _NESTED_HEADER))
        header = kvm_nested_state.from_buffer(area)
        header.size = len(area)
        door.ioctl(self.fd, rq.KVM_GET_NESTED_STATE, _bytes_at(area), f"vCPU {self.index}")
        return bytes(area[: header.size])

    def set_nested_state(self, area: bytes) -> None:
        """Put back what `nested_state` gave."""
        if area:
            door.ioctl(self.fd, rq.KVM_SET_NESTED_STATE, _bytes_at(bytearray(area)), f"vCPU {self.index}")

    # MSRs.

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Read MSRs; raises KvmIoctlError naming the first that KVM refuses (EINVAL)."""
        values, refused = self._every_msr(rq.KVM_GET_MSRS, [(index, 0) for index in indices], stop=True)
        if refused:
            self._msr_refused(rq.KVM_GET_MSRS, f"{refused[0]:#x}")
        return dict(values)

    def set_msrs(self, values: Mapping[int, int] | Iterable[tuple[int, int]]) -> None:
        """Write MSRs in order; raises KvmIoctlError naming the first refused. Those before it are set."""
        pairs = list(values.items() if isinstance(values, Mapping) else values)
        done, refused = self._every_msr(rq.KVM_SET_MSRS, pairs, stop=True)
        if refused:
            self._msr_refused(rq.KVM_SET_MSRS, f"{refused[0]:#x} = {pairs[len(done)][1]:#x}")

    def readable_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """As `msrs`, but without those that KVM refuses: an ioctl more for each of them."""
        return dict(self._every_msr(rq.KVM_GET_MSRS, [(index, 0) for index in indices])[0])

    def set_writable_msrs(self, values: Mapping[int, int]) -> list[int]:
        """As `set_msrs`, but those that KVM refuses are left out, and returned."""
        return self._every_msr(rq.KVM_SET_MSRS, list(values.items()))[1]

    def _every_msr(
        self, request: rq.Request, pairs: list[tuple[int, int]], *, stop: bool = False
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """What was read or written, and which MSRs KVM refused; with `stop` not beyond the first of these."""
        accepted: list[tuple[int, int]] = []
        refused: list[int] = []
        while pairs and not (stop and refused):
            batch = pairs[:_MAX_IO_MSRS]
            table = kvm_msrs_of(len(batch))(nmsrs=len(batch))
            for at, pair in zip(range(_MSR_TABLE, sizeof(table), MSR_ENTRY.size), batch, strict=True):
                MSR_ENTRY.pack_into(table, at, *pair)
            # KVM stops at the first MSR it refuses and returns how many it did: that is no error to ioctl(2).
            done = door.ioctl(self.fd, request, table, f"vCPU {self.index}")
            accepted += MSR_ENTRY.iter_unpack(bytes(table)[_MSR_TABLE : _MSR_TABLE + done * MSR_ENTRY.size])
            if done < len(batch):
                refused.append(batch[done][0])
                done += 1
            pairs = pairs[done:]
        return accepted, refused

    def _msr_refused(self, request: rq.Request, what: str) -> NoReturn:
        detail = f"vCPU {self.index} refused MSR {what}"
        raise KvmIoctlError(errno.EINVAL, request.name, request.scope, detail)

    # CPUID.

    def set_cpuid2(self, entries: Iterable[kvm_cpuid_entry2]) -> None:
        """Give the guest its CPUID. After the first KVM_RUN only the same table again is accepted."""
        self._set(rq.KVM_SET_CPUID2, cpuid_table(entries))

    def cpuid2(self) -> list[kvm_cpuid_entry2]:
        """The table in force."""
        entries = get_cpuid(self.fd, rq.KVM_GET_CPUID2)
        # Older kernels (6.1) leave nent at the room offered: what follows is all zero.
        while len(entries) > 1 and not any(bytes(entries[-1])):
            entries.pop()
        return entries

    def supported_hv_cpuid(self) -> list[kvm_cpuid_entry2]:
        """The Hyper-V leaves KVM can back, as this vCPU stands. Raises CapabilityMissing."""
        if not self._capability(KVM_CAP_HYPERV_CPUID):
            raise CapabilityMissing("KVM_CAP_HYPERV_CPUID: this kernel's KVM has no Hyper-V enlightenments")
        return get_cpuid(self.fd, _SUPPORTED_HV_CPUID, room=16)

    # Interrupt and run state.

    def lapic(self) -> kvm_lapic_state:
        """The in-kernel local APIC's registers."""
        state = kvm_lapic_state()
        self._get(rq.KVM_GET_LAPIC, state)
        return state

    def set_lapic(self, state: kvm_lapic_state) -> None:
        self._set(rq.KVM_SET_LAPIC, state)

    def mp_state(self) -> int:
        """KVM_MP_STATE_*."""
        state = kvm_mp_state()
        self._get(rq.KVM_GET_MP_STATE, state)
        return int(state.mp_state)

    def set_mp_state(self, state: int) -> None:
        self._set(rq.KVM_SET_MP_STATE, kvm_mp_state(state))

    def vcpu_events(self) -> kvm_vcpu_events:
        """Pending and injected exceptions, interrupts, NMIs."""
        state = kvm_vcpu_events()
        self._get(rq.KVM_GET_VCPU_EVENTS, state)
        return state

    def set_vcpu_events(self, state: kvm_vcpu_events) -> None:
        self._set(rq.KVM_SET_VCPU_EVENTS, state)

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt where there is no in-kernel irqchip (ENXIO where there is)."""
        self._set(rq.KVM_INTERRUPT, kvm_interrupt(vector))

    def nmi(self) -> None:
        """Queue an NMI."""
        door.ioctl(self.fd, rq.KVM_NMI, 0, f"vCPU {self.index}")

    # The rest.

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on the vCPU (KVM_CAP_HYPERV_SYNIC2, _ENFORCE_CPUID...)."""
        self._set(_ENABLE_CAP, kvm_enable_cap(cap=cap, args=args))

    def tsc_khz(self) -> int:
        """The guest's TSC rate in kHz."""
        return door.ioctl(self.fd, rq.KVM_GET_TSC_KHZ, 0, f"vCPU {self.index}")

    def set_tsc_khz(self, khz: int) -> None:
        door.ioctl(self.fd, rq.KVM_SET_TSC_KHZ, khz, f"vCPU {self.index}")

    def translate(self, gva: int) -> int | None:
        """The guest physical address behind a guest virtual one, or None where nothing is mapped."""
        state = kvm_translation(linear_address=gva)
        self._get(rq.KVM_TRANSLATE, state)
        return int(state.physical_address) if state.valid else None

    def close(self) -> None:
        """Close the fd and drop the map; again does nothing.

        Whoever still holds `run` or a slice of `data` keeps the map (not the
        fd) alive until they let go.
        """
        if self.closed:
            return
        super().close()
        # A late enter says EBADF; it must never run whatever fd gets the old number.
        self._enter = _enter_closed
        self.run = kvm_run.from_buffer_copy(self.data)
        copy = memoryview(bytearray(self.data))
        self.data.release()
        self.data = copy
        with suppress(BufferError):  # unmapped when the last view dies, then
            self._map.close()

    def __repr__(self) -> str:
        return f"<Vcpu {self.index} {'closed' if self.closed else f'fd {self.fd}'}>"


def _enter_closed() -> NoReturn:
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _bytes_at(area: bytearray) -> ctypes.Array[ctypes.c_char]:
    from ctypes import c_char

    return (c_char * len(area)).from_buffer(area)
