"""Every exit decoded from a hand-filled kvm_run."""

from __future__ import annotations

import ctypes

import pytest

from hvkvm.abi import kvm
from hvkvm.abi.kvm_structs import kvm_run
from hvkvm.kvm import exits


def filled(reason: int, **at: tuple[int, int]) -> kvm_run:
    """kvm_run with raw bytes at the ABI's own offsets: `_32=(value, width)`."""
    raw = bytearray(ctypes.sizeof(kvm_run))
    raw[8:12] = reason.to_bytes(4, "little")
    for name, (value, width) in at.items():
        offset = int(name[1:])
        raw[offset : offset + width] = value.to_bytes(width, "little")
    return kvm_run.from_buffer(raw)


E = exits
CASES = [
    (filled(kvm.KVM_EXIT_UNKNOWN, _32=(0x1234, 8)), E.UnknownExit(0, 0x1234)),
    (filled(kvm.KVM_EXIT_EXCEPTION, _32=(14, 4), _36=(2, 4)), E.ExceptionExit(1, 14, 2)),
    (
        filled(kvm.KVM_EXIT_IO, _33=(2, 1), _34=(0x3F8, 2), _36=(1, 4), _40=(4096, 8)),
        E.IoExit(2, False, 0x3F8, 2, 1, b""),
    ),
    (
        filled(kvm.KVM_EXIT_HYPERCALL, _32=(7, 8), _40=(1, 8), _80=(6, 8)),
        E.HypercallExit(3, 7, (1, 0, 0, 0, 0, 6)),
    ),
    (
        filled(kvm.KVM_EXIT_DEBUG, _32=(1, 4), _40=(0x1000, 8), _48=(0x4000, 8), _56=(0x400, 8)),
        E.DebugExit(4, 1, 0x1000, 0x4000, 0x400),
    ),
    (filled(kvm.KVM_EXIT_HLT), E.HltExit(5)),
    (
        filled(kvm.KVM_EXIT_MMIO, _32=(0xFED00000, 8), _40=(0xAABBCCDD, 8), _48=(4, 4), _52=(1, 1)),
        E.MmioExit(6, True, 0xFED00000, 4, b"\xdd\xcc\xbb\xaa"),
    ),
    (
        filled(kvm.KVM_EXIT_MMIO, _32=(0xFED00000, 8), _40=(0xAABBCCDD, 8), _48=(4, 4)),
        E.MmioExit(6, False, 0xFED00000, 4, b""),
    ),
    (filled(kvm.KVM_EXIT_IRQ_WINDOW_OPEN), E.IrqWindowOpenExit(7)),
    (filled(kvm.KVM_EXIT_SHUTDOWN), E.ShutdownExit(8)),
    (filled(kvm.KVM_EXIT_FAIL_ENTRY, _32=(0x80000021, 8), _40=(3, 4)), E.FailEntryExit(9, 0x80000021, 3)),
    (filled(kvm.KVM_EXIT_INTR), E.IntrExit(10)),
    (filled(kvm.KVM_EXIT_SET_TPR), E.PlainExit(11)),
    (filled(kvm.KVM_EXIT_TPR_ACCESS, _32=(0xFFF0, 8), _40=(1, 4)), E.TprAccessExit(12, 0xFFF0, True)),
    (
        filled(kvm.KVM_EXIT_INTERNAL_ERROR, _32=(3, 4), _36=(2, 4), _40=(5, 8), _48=(6, 8)),
        E.InternalErrorExit(17, 3, (5, 6), b""),
    ),
    (
        filled(
            kvm.KVM_EXIT_INTERNAL_ERROR,
            _32=(1, 4),
            _36=(3, 4),
            _40=(1, 8),
            _48=(3, 1),
            _49=(0xC1010F, 3),
        ),
        E.InternalErrorExit(17, 1, (1, 0xC1010F03, 0), b"\x0f\x01\xc1"),
    ),
    (
        filled(kvm.KVM_EXIT_SYSTEM_EVENT, _32=(2, 4), _36=(1, 4), _40=(9, 8)),
        E.SystemEventExit(24, kvm.KVM_SYSTEM_EVENT_RESET, (9,)),
    ),
    (filled(kvm.KVM_EXIT_IOAPIC_EOI, _32=(0x31, 1)), E.IoapicEoiExit(26, 0x31)),
    (
        filled(
            kvm.KVM_EXIT_HYPERV,
            _32=(1, 4),
            _40=(0x40000083, 4),
            _48=(1, 8),
            _56=(0x2001, 8),
            _64=(0x3001, 8),
        ),
        E.HypervSynicExit(27, 0x40000083, 1, 0x2001, 0x3001),
    ),
    (
        filled(kvm.KVM_EXIT_HYPERV, _32=(2, 4), _40=(0x1005D, 8), _56=(0x1234, 8), _64=(5, 8)),
        E.HypervHcallExit(27, 0x1005D, (0x1234, 5)),
    ),
    (
        filled(
            kvm.KVM_EXIT_HYPERV,
            _32=(3, 4),
            _40=(0x400000F1, 4),
            _48=(1, 8),
            _56=(2, 8),
            _64=(3, 8),
            _72=(4, 8),
            _80=(5, 8),
        ),
        E.HypervSyndbgExit(27, 0x400000F1, 1, 2, 3, 4, 5),
    ),
    (filled(kvm.KVM_EXIT_HYPERV, _32=(77, 4)), E.HypervUnknownExit(27, 77)),
    (filled(kvm.KVM_EXIT_X86_RDMSR, _40=(4, 4), _44=(0x40000020, 4)), E.RdmsrExit(29, 0x40000020, 4)),
    (
        filled(kvm.KVM_EXIT_X86_WRMSR, _40=(2, 4), _44=(0x40000000, 4), _48=(0x8100, 8)),
        E.WrmsrExit(30, 0x40000000, 0x8100, 2),
    ),
    (filled(kvm.KVM_EXIT_DIRTY_RING_FULL), E.PlainExit(31)),
    (filled(kvm.KVM_EXIT_X86_BUS_LOCK), E.PlainExit(33)),
    (filled(kvm.KVM_EXIT_NOTIFY, _32=(1, 4)), E.NotifyExit(37, 1)),
    (
        filled(kvm.KVM_EXIT_MEMORY_FAULT, _32=(8, 8), _40=(0x5000, 8), _48=(4096, 8)),
        E.MemoryFaultExit(39, 8, 0x5000, 4096),
    ),
    (filled(0xFFFF, _32=(1, 8)), E.UnknownExit(0xFFFF, 1)),
]


@pytest.mark.parametrize(
    ("run", "wanted"), CASES, ids=lambda v: type(v).__name__ if isinstance(v, E.Exit) else ""
)
def test_decode(run, wanted):
    got = exits.decode(run)
    assert type(got) is type(wanted)
    assert got == wanted


def test_every_decoder_has_a_case():
    assert exits._DECODERS.keys() <= {run.exit_reason for run, _ in CASES}


def test_port_write_carries_its_bytes():
    page = bytearray(4096 + 16)
    page[4096:4102] = b"\x01\x02\x03\x04\x05\x06"
    run = filled(kvm.KVM_EXIT_IO, _32=(1, 1), _33=(2, 1), _34=(0x80, 2), _36=(3, 4), _40=(4096, 8))
    assert exits.decode(run, memoryview(page)) == exits.IoExit(2, True, 0x80, 2, 3, page[4096:4102])


def test_counts_beyond_the_struct_are_cut():
    run = filled(kvm.KVM_EXIT_INTERNAL_ERROR, _32=(4, 4), _36=(0xFFFFFFFF, 4))
    assert len(exits.decode(run).data) == 16
    run = filled(kvm.KVM_EXIT_SYSTEM_EVENT, _32=(3, 4), _36=(0xFFFFFFFF, 4))
    assert len(exits.decode(run).data) == 16
    run = filled(kvm.KVM_EXIT_MMIO, _48=(200, 4), _52=(1, 1))
    assert len(exits.decode(run).data) == 8
    run = filled(kvm.KVM_EXIT_INTERNAL_ERROR, _32=(1, 4), _36=(3, 4), _40=(1, 8), _48=(255, 1))
    assert len(exits.decode(run).insn) == 15


def test_a_decoded_exit_outlives_the_next_run():
    run = filled(kvm.KVM_EXIT_SYSTEM_EVENT, _32=(1, 4))
    decoded = exits.decode(run)
    run.system_event.type = 3
    run.exit_reason = 0
    assert decoded == exits.SystemEventExit(24, 1, ())


def test_names():
    assert exits.exit_name(kvm.KVM_EXIT_IO) == "KVM_EXIT_IO"
    assert exits.exit_name(kvm.KVM_EXIT_EXCEPTION) == "KVM_EXIT_EXCEPTION"  # not KVM_EXIT_IO_OUT, also 1
    assert exits.exit_name(kvm.KVM_EXIT_HYPERV) == "KVM_EXIT_HYPERV"
    assert exits.exit_name(2**32 - 1) == "KVM_EXIT_4294967295"
    assert exits.HltExit(5).name == "KVM_EXIT_HLT"


@pytest.mark.parametrize(
    ("exit_", "text"),
    [
        (
            E.FailEntryExit(kvm.KVM_EXIT_FAIL_ENTRY, 0x80000021, 3),
            "KVM_EXIT_FAIL_ENTRY, hardware reason 0x80000021 (invalid guest state), on the host's CPU 3",
        ),
        (
            E.FailEntryExit(kvm.KVM_EXIT_FAIL_ENTRY, 7, 0),
            "KVM_EXIT_FAIL_ENTRY, hardware reason 0x7, on the host's CPU 0",
        ),
        (
            E.InternalErrorExit(kvm.KVM_EXIT_INTERNAL_ERROR, 1, (1, 2), b"\x0f\x01\xc1"),
            "KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION, instruction 0f 01 c1",
        ),
        (
            E.InternalErrorExit(kvm.KVM_EXIT_INTERNAL_ERROR, 3, (0x80000B0E, 0x31), b""),
            "KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV, data 0x80000b0e 0x31",
        ),
        (
            E.InternalErrorExit(kvm.KVM_EXIT_INTERNAL_ERROR, 99, (), b""),
            "KVM_EXIT_INTERNAL_ERROR, suberror 99",
        ),
    ],
)
def test_what_ends_a_vcpu_is_said_by_names(exit_: E.Exit, text: str) -> None:
    assert str(exit_) == text
