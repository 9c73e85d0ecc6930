"""SynIC pages and the TLFS numbers that others build on."""

from __future__ import annotations

import ctypes

from hvkvm.abi import hv_synic as s
from hvkvm.abi import tlfs


def offsets(kind):
    return {name: getattr(kind, name).offset for name, *_ in kind._fields_}


def test_message_slot_is_256_bytes_with_the_type_first():
    slot = s.hv_message(s.HVMSG_TIMER_EXPIRED, b"\1\2\3")
    assert len(slot) == s.HV_MESSAGE_SIZE == 256
    assert slot[:4] == s.HVMSG_TIMER_EXPIRED.to_bytes(4, "little")
    assert (slot[4], slot[5:16]) == (3, bytes(11)), "payload_size, then flags, reserved and sender"
    assert slot[16:] == b"\1\2\3".ljust(s.HV_MESSAGE_PAYLOAD_BYTE_COUNT, b"\0")


def test_post_message_input():
    assert ctypes.sizeof(s.hv_post_message_input) == 256
    assert offsets(s.hv_post_message_input) == {
        "connection_id": 0,
        "reserved": 4,
        "message_type": 8,
        "payload_size": 12,
        "payload": 16,
    }


def test_small_structs():
    assert ctypes.sizeof(s.hv_signal_event_input) == 8
    assert offsets(s.hv_signal_event_input) == {"connection_id": 0, "flag_number": 4, "reserved": 6}
    assert s.hv_timer_message_payload.size == 24
    assert offsets(s.ms_hyperv_tsc_page) == {
        "tsc_sequence": 0,
        "reserved1": 4,
        "tsc_scale": 8,
        "tsc_offset": 16,
    }


def test_names_spell_what_the_guest_compares():
    assert tlfs.HV_CPUID_SIGNATURE_EAX.to_bytes(4, "little") == b"Hv#1"
    assert tlfs.HYPERV_VS_INTERFACE_EAX_SIGNATURE.to_bytes(4, "little") == b"VS#1"
    assert len(tlfs.HV_CPUID_VENDOR) == 12


def test_sint_and_stimer_msrs_are_contiguous():
    assert tlfs.HV_X64_MSR_SINT15 - tlfs.HV_X64_MSR_SINT0 == s.HV_SYNIC_SINT_COUNT - 1
    last = tlfs.HV_X64_MSR_STIMER0_COUNT + 2 * (tlfs.HV_STIMER_COUNT - 1)
    assert last == tlfs.HV_X64_MSR_STIMER3_COUNT


def test_the_msr_range_covers_every_msr():
    msrs = [v for n, v in vars(tlfs).items() if n.startswith("HV_X64_MSR_") and 0x40000000 <= v < 0x50000000]
    assert len(msrs) > 40
    assert max(msrs) < tlfs.HV_X64_MSR_FIRST + tlfs.HV_X64_MSR_COUNT


def test_the_control_words_fields_are_disjoint_and_complete():
    fields = [
        tlfs.HV_HYPERCALL_CODE_MASK,
        tlfs.HV_HYPERCALL_FAST_BIT,
        tlfs.HV_HYPERCALL_VARHEAD_MASK,
        tlfs.HV_HYPERCALL_NESTED,
        tlfs.HV_HYPERCALL_REP_COMP_MASK,
        tlfs.HV_HYPERCALL_REP_START_MASK,
        tlfs.HV_HYPERCALL_RSVD_MASK,
    ]
    assert sum(fields) == 2**64 - 1


def test_statuses_the_guest_is_told():
    told = {name: getattr(tlfs.HvStatus, name).value for name in ("INVALID_PORT_ID", "INVALID_CONNECTION_ID")}
    assert told == {"INVALID_PORT_ID": 17, "INVALID_CONNECTION_ID": 18}
    assert tlfs.HvStatus.INSUFFICIENT_BUFFERS == 19
