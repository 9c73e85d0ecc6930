"""struct kvm_run: what a vCPU and its host share in the mmap of the vCPU fd, with every x86 exit.

Layout only; anyone may import this, usually through `hvkvm.abi.kvm_structs`,
whose docstring explains the naming.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_uint8, c_uint16, c_uint32, c_uint64

from hvkvm.abi.kvm_cpu_structs import kvm_debug_exit_arch, kvm_run__s


class kvm_run__hw(Structure):
    _fields_ = [("hardware_exit_reason", c_uint64)]


class kvm_run__fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class kvm_run__ex(Structure):
    _fields_ = [("exception", c_uint32), ("error_code", c_uint32)]


class kvm_run__io(Structure):
    """`data_offset` counts from the start of kvm_run; `count` items of `size` bytes are there."""

    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class kvm_run__debug(Structure):
    _fields_ = [("arch", kvm_debug_exit_arch)]


class kvm_run__mmio(Structure):
    _fields_ = [
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    ]


class kvm_run__hypercall(Structure):
    """The first word after `ret` is `longmode` in old headers, `flags` (u64) in new ones: left out."""

    _fields_ = [
        ("nr", c_uint64),
        ("args", c_uint64 * 6),
        ("ret", c_uint64),
        ("_after_ret", c_uint64),
    ]


class kvm_run__tpr_access(Structure):
    _fields_ = [("rip", c_uint64), ("is_write", c_uint32), ("pad", c_uint32)]


class kvm_run__internal(Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class kvm_run__emulation_failure(Structure):
    """Overlays `internal` for KVM_INTERNAL_ERROR_EMULATION."""

    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class kvm_run__system_event(Structure):
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class kvm_run__eoi(Structure):
    _fields_ = [("vector", c_uint8)]


class kvm_hyperv_exit__u__synic(Structure):
    _fields_ = [
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("evt_page", c_uint64),
        ("msg_page", c_uint64),
    ]


class kvm_hyperv_exit__u__hcall(Structure):
    _fields_ = [("input", c_uint64), ("result", c_uint64), ("params", c_uint64 * 2)]


class kvm_hyperv_exit__u__syndbg(Structure):
    _fields_ = [
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("status", c_uint64),
        ("send_page", c_uint64),
        ("recv_page", c_uint64),
        ("pending_page", c_uint64),
    ]


class kvm_hyperv_exit__u(Union):
    _fields_ = [
        ("synic", kvm_hyperv_exit__u__synic),
        ("hcall", kvm_hyperv_exit__u__hcall),
        ("syndbg", kvm_hyperv_exit__u__syndbg),
    ]


class kvm_hyperv_exit(Structure):
    _fields_ = [("type", c_uint32), ("pad1", c_uint32), ("u", kvm_hyperv_exit__u)]


class kvm_run__msr(Structure):
    """`error` goes to the kernel (nonzero raises #GP); `data` goes either way."""

    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class kvm_run__notify(Structure):
    _fields_ = [("flags", c_uint32)]


class kvm_run__memory_fault(Structure):
    """Linux 6.8 and later."""

    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _kvm_run_exit(Union):
    _fields_ = [
        ("hw", kvm_run__hw),
        ("fail_entry", kvm_run__fail_entry),
        ("ex", kvm_run__ex),
        ("io", kvm_run__io),
        ("debug", kvm_run__debug),
        ("mmio", kvm_run__mmio),
        ("hypercall", kvm_run__hypercall),
        ("tpr_access", kvm_run__tpr_access),
        ("internal", kvm_run__internal),
        ("emulation_failure", kvm_run__emulation_failure),
        ("system_event", kvm_run__system_event),
        ("eoi", kvm_run__eoi),
        ("hyperv", kvm_hyperv_exit),
        ("msr", kvm_run__msr),
        ("notify", kvm_run__notify),
        ("memory_fault", kvm_run__memory_fault),
        ("padding", c_uint8 * 256),
    ]


class kvm_run(Structure):
    """Belongs to the vCPU's thread, save `immediate_exit`, which any thread may set to 1 (one byte store)."""

    _anonymous_ = ("_exit",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("_exit", _kvm_run_exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", kvm_run__s),
    ]
