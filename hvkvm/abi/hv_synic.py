"""SynIC pages and messages as the guest sees them (TLFS "Virtual Interrupt Controller").

Layout only; anyone may import this. The structures are meant for `from_buffer`
on shared pages as well as for private copies; a slot's `message_type` is stored last (S27).
"""

from __future__ import annotations

from ctypes import Array, Structure, c_uint8, c_uint16, c_uint32, c_uint64
from struct import Struct

HV_SYNIC_SINT_COUNT = 16
HV_EVENT_FLAGS_COUNT = 2048
HV_EVENT_FLAGS_BYTE_COUNT = 256
HV_MESSAGE_SIZE = 256
HV_MESSAGE_PAYLOAD_BYTE_COUNT = 240
HV_MESSAGE_PAGE_SIZE = 4096
HV_SYNIC_VERSION_1 = 1

# message_type; bit 31 marks the hypervisor's own.
HVMSG_NONE = 0x00000000
HVMSG_VMBUS = 0x00000001
HVMSG_UNMAPPED_GPA = 0x80000000
HVMSG_GPA_INTERCEPT = 0x80000001
HVMSG_TIMER_EXPIRED = 0x80000010
HVMSG_INVALID_VP_REGISTER_VALUE = 0x80000020
HVMSG_UNRECOVERABLE_EXCEPTION = 0x80000021
HVMSG_UNSUPPORTED_FEATURE = 0x80000022
HVMSG_EVENTLOG_BUFFERCOMPLETE = 0x80000040
HVMSG_X64_IOPORT_INTERCEPT = 0x80010000
HVMSG_X64_MSR_INTERCEPT = 0x80010001
HVMSG_X64_CPUID_INTERCEPT = 0x80010002
HVMSG_X64_EXCEPTION_INTERCEPT = 0x80010003
HV_MESSAGE_TYPE_HYPERVISOR_MASK = 0x80000000

# hv_message.flags
HV_MESSAGE_FLAG_PENDING = 0x01

# HV_X64_MSR_SCONTROL, SIMP, SIEFP, SINTn
HV_SYNIC_CONTROL_ENABLE = 1 << 0
HV_SYNIC_SIMP_ENABLE = 1 << 0
HV_SYNIC_SIEFP_ENABLE = 1 << 0
HV_SYNIC_PAGE_MASK = 0xFFFFFFFFFFFFF000
HV_SYNIC_SINT_VECTOR_MASK = 0xFF
HV_SYNIC_SINT_MASKED = 1 << 16
HV_SYNIC_SINT_AUTO_EOI = 1 << 17
HV_SYNIC_SINT_POLLING = 1 << 18
HV_SYNIC_SINT_RESET = HV_SYNIC_SINT_MASKED
HV_SYNIC_FIRST_VALID_VECTOR = 16

# HvPostMessage and HvSignalEvent use 24 bits of a connection id; HvSignalEvent's flag number is above bit 32.
HV_CONNECTION_ID_MASK = 0x00FFFFFF
HV_SIGNAL_EVENT_FLAG_NUMBER_SHIFT = 32
HV_SIGNAL_EVENT_FLAG_NUMBER_MASK = 0xFFFF


_hv_message = Struct(f"<IBBHQ{HV_MESSAGE_PAYLOAD_BYTE_COUNT}s")
"""message_type, payload_size, flags, reserved, sender, payload."""


def hv_message(message_type: int, payload: bytes) -> bytes:
    """The 256 bytes of a slot of the message page; its sender is 0, not a port id (S28).

    Slot s of SIMP is that of SINT s. In SIEFP, SINT s has the 256 bytes at 256 * s, and flag f is
    bit f % 8 of byte f // 8 of them.
    """
    return _hv_message.pack(message_type, len(payload), 0, 0, 0, payload)


class hv_post_message_input(Structure):
    """Input of HVCALL_POST_MESSAGE, 256 bytes in guest memory: copy once, then trust only the copy (S48)."""

    connection_id: int
    reserved: int
    message_type: int
    payload_size: int
    payload: Array[c_uint8]
    _fields_ = [
        ("connection_id", c_uint32),
        ("reserved", c_uint32),
        ("message_type", c_uint32),
        ("payload_size", c_uint32),
        ("payload", c_uint8 * HV_MESSAGE_PAYLOAD_BYTE_COUNT),
    ]


class hv_signal_event_input(Structure):
    """Input of HVCALL_SIGNAL_EVENT; the fast form carries the same 8 bytes in a register."""

    _fields_ = [("connection_id", c_uint32), ("flag_number", c_uint16), ("reserved", c_uint16)]


hv_timer_message_payload = Struct("<IIQQ")
"""Of HVMSG_TIMER_EXPIRED: timer_index, reserved, expiration_time, delivery_time (reference time, 100 ns)."""


class ms_hyperv_tsc_page(Structure):
    """Reference TSC page: time = ((tsc * tsc_scale) >> 64) + tsc_offset, in 100 ns; sequence 0 means invalid.

    `tsc_offset` is signed in meaning; it wraps the same in unsigned arithmetic.
    """

    _fields_ = [
        ("tsc_sequence", c_uint32),
        ("reserved1", c_uint32),
        ("tsc_scale", c_uint64),
        ("tsc_offset", c_uint64),
    ]
