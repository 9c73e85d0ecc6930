"""The decoders, on bytes laid out by hand as <linux/kvm.h> says, and on bytes that no kernel would take."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import kvm_requests as r
from hvkvm.observe import kvm_ioctls as k
from hvkvm.observe.kvm_names import REQUEST_NAMES, cap_name, msr_name, request_name

AT = 0x7F00_0000_0000


def memory(data: bytes):
    """A reader of a process whose memory is `data` at AT and nothing else."""

    def read(address: int, size: int) -> bytes:
        offset = address - AT
        return data[offset : offset + size] if 0 <= offset < len(data) else b""

    return read


def routing(*entries: bytes) -> bytes:
    return struct.pack("<II", len(entries), 0) + b"".join(entry.ljust(48, b"\0") for entry in entries)


CASES = [
    (
        r.KVM_IRQFD,
        struct.pack("<4I16x", 14, 24, 2, 15),
        "fd=14, gsi=24, flags=RESAMPLE, resamplefd=15",
    ),
    (r.KVM_IRQFD, struct.pack("<4I16x", 0xFFFFFFFF, 24, 9, 0), "fd=-1, gsi=24, flags=DEASSIGN|0x8"),
    (
        r.KVM_SET_GSI_ROUTING,
        routing(
            struct.pack("<6I", 0, 1, 0, 0, 2, 0),
            struct.pack("<6I", 24, 4, 0, 0, 1, 2),
            struct.pack("<7I", 25, 2, 0, 0, 0xFEE00000, 0, 0x4021),
            struct.pack("<4I", 26, 9, 0, 0),
        ),
        (
            "nr=4, irqchip=1, entries=[{gsi=24, type=HV_SINT, vcpu=1, sint=2}, "
            "{gsi=25, type=MSI, address=0xfee00000, data=0x4021}, {gsi=26, type=9}]"
        ),
    ),
    (r.KVM_HYPERV_EVENTFD, struct.pack("<IiI12x", 5, 9, 0), "conn_id=0x5, fd=9, flags=0"),
    (r.KVM_HYPERV_EVENTFD, struct.pack("<IiI12x", 5, -1, 1), "conn_id=0x5, fd=-1, flags=DEASSIGN"),
    (r.KVM_ENABLE_CAP, struct.pack("<II4Q64x", 148, 0, 0, 0, 0, 0), "cap=KVM_CAP_HYPERV_SYNIC2"),
    (
        r.KVM_ENABLE_CAP,
        struct.pack("<II4Q64x", 9999, 1, 3, 0, 0, 0),
        "cap=KVM_CAP_9999, flags=0x1, args=[0x3]",
    ),
    (
        r.KVM_SET_USER_MEMORY_REGION,
        struct.pack("<IIQQQ", 1, 3, 0x1000, 0x2000, 0x7000),
        "slot=1, flags=LOG_DIRTY_PAGES|READONLY, gpa=0x1000, size=0x2000, hva=0x7000",
    ),
    (
        r.KVM_IOEVENTFD,
        struct.pack("<QQIiI36x", 3, 0x510, 2, 8, 3),
        "addr=0x510, len=2, fd=8, flags=DATAMATCH|PIO, datamatch=0x3",
    ),
    (r.KVM_IOEVENTFD, struct.pack("<QQIiI36x", 3, 0x510, 2, 8, 0), "addr=0x510, len=2, fd=8, flags=0"),
    (
        r.KVM_SET_MSRS,
        struct.pack("<4IQ2IQ", 2, 0, 0x40000092, 0, 0x30, 0x10, 0, 7),
        "nmsrs=2, msrs=[{HV_X64_MSR_SINT2=0x30}, {0x10=0x7}]",
    ),
    (
        r.KVM_SET_CPUID2,
        struct.pack("<II", 2, 0)
        + struct.pack("<7I12x", 1, *[9] * 6)
        + struct.pack("<7I12x", 0x40000000, 0, 0, 1, 2, 3, 4),
        "nent=2, hypervisor=[{0x40000000=[0x1, 0x2, 0x3, 0x4]}]",
    ),
    (r.KVM_SET_MP_STATE, struct.pack("<I", 4), "mp_state=SIPI_RECEIVED"),
    (r.KVM_SIGNAL_MSI, struct.pack("<5I12x", 0xFEE01000, 1, 0x31, 0, 0), "address=0x1fee01000, data=0x31"),
]


@pytest.mark.parametrize(("request_", "data", "expected"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_a_structure_is_told_by_its_fields(request_, data, expected):
    assert k.text(k.decode(request_.number, AT, memory(data))) == expected


def test_numbers_that_are_no_address_are_told_as_they_are():
    assert k.decode(r.KVM_CHECK_EXTENSION.number, 148, memory(b"")) == {"cap": "KVM_CAP_HYPERV_SYNIC2"}
    assert k.decode(r.KVM_CREATE_VCPU.number, 3, memory(b"")) == {"id": 3}
    assert k.decode(r.KVM_RUN.number, 0, memory(b"")) == {}


def test_an_address_that_is_not_there_is_said_so():
    assert k.text(k.decode(r.KVM_IRQFD.number, 0x1000, memory(b""))) == "arg=0x1000, unreadable=1"
    assert "unreadable" in k.decode(r.KVM_IRQFD.number, AT, memory(bytes(31)))


def test_a_list_is_cut_and_says_how_much_is_missing():
    entries = b"".join(struct.pack("<IIQ", 0x40000090, 0, n) for n in range(100))
    fields = k.decode(r.KVM_SET_MSRS.number, AT, memory(struct.pack("<II", 100, 0) + entries))
    assert (len(fields["msrs"]), fields["more"]) == (k.SHOWN, 100 - k.SHOWN)


def test_a_count_without_memory_behind_it_reads_no_gigabytes():
    asked = []

    def read(address: int, size: int) -> bytes:
        asked.append(size)
        return bytes(b"\xff" * min(size, 8))

    fields = k.decode(r.KVM_SET_GSI_ROUTING.number, AT, read)
    assert fields == {"nr": 0xFFFFFFFF, "irqchip": 0, "entries": []}
    assert max(asked) <= k.READ_LIMIT * 48


def test_an_exit_is_told_with_what_the_guest_wrote():
    run = bytearray(8192)
    struct.pack_into("<I", run, 8, 2)
    struct.pack_into("<BBHIQ", run, 32, 1, 1, 0x80, 1, 4096)
    run[4096] = 42
    text = "exit=KVM_EXIT_IO, is_write=1, port=0x80, size=1, count=1, data=2a"
    assert k.text(k.decode_run(bytes(run))) == text
    assert k.decode_run(bytes(100)) == {}


def test_names():
    assert request_name(r.KVM_IRQFD.number) == "KVM_IRQFD"
    assert request_name(0xAEFE) == "KVM_IO_0xfe"
    assert request_name(0x4010AEFE) == "KVM_IOW_0xfe_16"
    assert cap_name(123) == "KVM_CAP_HYPERV_SYNIC"
    assert msr_name(0x400000B3) == "HV_X64_MSR_STIMER1_COUNT"
    assert msr_name(0x40000084) == "HV_X64_MSR_EOM"
    assert msr_name(0x10) == "0x10"


@given(number=st.sampled_from(sorted(REQUEST_NAMES)), data=st.binary(max_size=600), at=st.integers(0, 16))
def test_no_bytes_break_a_decoder(number, data, at):
    fields = k.decode(number, AT + at, memory(data))
    assert len(k.text(fields)) < 20_000
    assert json.loads(json.dumps(fields)).keys() == fields.keys()


@given(number=st.integers(0, 2**32 - 1), arg=st.integers(0, 2**64 - 1))
def test_no_request_and_no_argument_breaks_a_decoder(number, arg):
    assert request_name(number).startswith("KVM_")
    k.text(k.decode(number, arg, lambda address, size: b""))


@given(reason=st.integers(0, 45), rest=st.binary(min_size=64, max_size=300))
def test_no_run_page_breaks_the_exit_decoder(reason, rest):
    run = bytearray(8192)
    run[32 : 32 + len(rest)] = rest
    struct.pack_into("<I", run, 8, reason)
    fields = k.decode_run(bytes(run))
    assert fields["exit"].startswith("KVM_EXIT_")
    assert len(json.dumps(fields)) < 4000
