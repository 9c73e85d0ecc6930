"""NVSP: what a guest's NIC driver and its host agree on around the RNDIS messages.

Names and layouts are those of Linux's drivers/net/hyperv/hyperv_net.h. Every message begins with its type;
offsets count from there. Layout only; anyone may import it.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.abi.vmbus import guid

HV_NIC_GUID = guid("f8615163-df3e-46c5-913f-f2d2f965ed0e")

NVSP_PROTOCOL_VERSION_1 = 2
NVSP_PROTOCOL_VERSION_2 = 0x30002
NVSP_PROTOCOL_VERSION_4 = 0x40000
NVSP_PROTOCOL_VERSION_5 = 0x50000
NVSP_PROTOCOL_VERSION_6 = 0x60000
NVSP_PROTOCOL_VERSION_61 = 0x60001
NVSP_VERSIONS = (
    NVSP_PROTOCOL_VERSION_1,
    NVSP_PROTOCOL_VERSION_2,
    NVSP_PROTOCOL_VERSION_4,
    NVSP_PROTOCOL_VERSION_5,
    NVSP_PROTOCOL_VERSION_6,
    NVSP_PROTOCOL_VERSION_61,
)

NVSP_MSG_TYPE_INIT = 1
NVSP_MSG_TYPE_INIT_COMPLETE = 2
NVSP_MSG1_TYPE_SEND_NDIS_VER = 100
NVSP_MSG1_TYPE_SEND_RECV_BUF = 101
NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE = 102
NVSP_MSG1_TYPE_REVOKE_RECV_BUF = 103
NVSP_MSG1_TYPE_SEND_SEND_BUF = 104
NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE = 105
NVSP_MSG1_TYPE_REVOKE_SEND_BUF = 106
NVSP_MSG1_TYPE_SEND_RNDIS_PKT = 107
NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE = 108
NVSP_MSG2_TYPE_SEND_NDIS_CONFIG = 125
NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION = 128
NVSP_MSG4_TYPE_SWITCH_DATA_PATH = 129
NVSP_MSG5_TYPE_SUBCHANNEL = 133
NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE = 134

NVSP_STAT_SUCCESS = 1
NVSP_STAT_FAIL = 2
NVSP_STAT_PROTOCOL_TOO_NEW = 3
NVSP_STAT_PROTOCOL_TOO_OLD = 4
NVSP_STAT_INVALID_RNDIS_PKT = 5
NVSP_STAT_BUSY = 6
NVSP_STAT_PROTOCOL_UNSUPPORTED = 7

NVSP_SUBCHANNEL_ALLOCATE = 1

RMC_DATA = 0
RMC_CONTROL = 1
NETVSC_INVALID_INDEX = 0xFFFFFFFF

MESSAGE_BYTES = 40
"""sizeof(struct nvsp_message) of 6.1. Linux copies so many bytes of a reply, whatever the version."""

message_type = Struct("<I")
init = Struct("<III")
"""Type, lowest and highest version that the guest speaks."""
init_complete = Struct("<IIII24x")
"""Type, version, max_mdl_chain_len, status."""
ndis_version = Struct("<III")
"""Type, major, minor."""
ndis_config = Struct("<IIIQ")
"""Type, MTU with the Ethernet header, reserved, capabilities (NDIS_CONFIG_*)."""
NDIS_CONFIG_IEEE8021Q = 1 << 3
NDIS_CONFIG_RSC = 1 << 7

send_buf = Struct("<IIH")
"""SEND_RECV_BUF and SEND_SEND_BUF: type, GPADL, id."""
revoke_buf = Struct("<IH")
"""REVOKE_RECV_BUF and REVOKE_SEND_BUF: type, id."""
recv_buf_complete = Struct("<IIIIIII12x")
"""Type, status, sections (1), and of that one: offset, bytes of a sub-allocation, how many, its end."""
send_buf_complete = Struct("<III28x")
"""Type, status, bytes of a section."""

rndis_pkt = Struct("<IIII24x")
"""SEND_RNDIS_PKT: type, channel (RMC_*), section of the send buffer, bytes there."""
RNDIS_PKT_BYTES = 16
"""The part of it that means something: Hyper-V's own and older guests' messages are shorter than 40 bytes."""
rndis_pkt_complete = Struct("<II")
"""Type, status."""

subchannel = Struct("<III")
"""Request: type, operation, how many."""
subchannel_complete = Struct("<III28x")
"""Type, status, how many are offered."""

INDIRECTION_ENTRIES = 16
indirection_table = Struct(f"<III28x{INDIRECTION_ENTRIES}I")
"""Type, count, offset of the table from the message's beginning, then the table: channels by index."""
INDIRECTION_OFFSET = MESSAGE_BYTES
