"""VMBus numbers: versions, feature flags, offer flags, statuses and limits of the protocol.

Why: the server, the devices and the guest side for tests must mean the same
number by the same name. Names follow Linux's include/linux/hyperv.h where it
has one. Layouts of messages are in `vmbus_messages`, those of packets in
`ring`. Numbers only; anyone may import this.
"""

from __future__ import annotations


def version_number(major: int, minor: int) -> int:
    """A protocol version as it stands in INITIATE_CONTACT."""
    return major << 16 | minor


VERSION_WS2008 = version_number(0, 13)
VERSION_WIN7 = version_number(1, 1)
VERSION_WIN8 = version_number(2, 4)
VERSION_WIN8_1 = version_number(3, 0)
VERSION_WIN10 = version_number(4, 0)
VERSION_WIN10_V4_1 = version_number(4, 1)
VERSION_WIN10_V5 = version_number(5, 0)
VERSION_WIN10_V5_1 = version_number(5, 1)
VERSION_WIN10_V5_2 = version_number(5, 2)
VERSION_WIN10_V5_3 = version_number(5, 3)
VERSION_COPPER = version_number(6, 0)

HOST_VERSIONS = (
    VERSION_WS2008,
    VERSION_WIN7,
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5_2,
    VERSION_WIN10_V5_3,
    VERSION_COPPER,
)
"""What our host speaks, oldest first: all that there are."""


def version_text(version: int) -> str:
    """A version as people write it: "5.3"."""
    return f"{version >> 16}.{version & 0xFFFF}"


# Feature flags, from 6.0 on.
FEATURE_GUEST_SPECIFIED_SIGNAL_PARAMETERS = 0x01
FEATURE_INTERRUPT_REDIRECTION = 0x02
FEATURE_MODIFY_CONNECTION = 0x04
FEATURE_CLIENT_ID = 0x08
FEATURE_CONFIDENTIAL_CHANNELS = 0x10
FEATURE_PAUSE_RESUME = 0x20
FEATURE_SERVER_SPECIFIED_MONITOR_PAGES = 0x40
FEATURE_GPA_PINNING = 0x80

HOST_FEATURES = FEATURE_GUEST_SPECIFIED_SIGNAL_PARAMETERS | FEATURE_MODIFY_CONNECTION | FEATURE_CLIENT_ID
"""What our host grants. The others serve a paravisor, isolation or monitor pages, and are declined."""

# Connections and interrupts.
VMBUS_MESSAGE_CONNECTION_ID = 1
VMBUS_EVENT_CONNECTION_ID = 2
VMBUS_MONITOR_CONNECTION_ID = 3
VMBUS_MESSAGE_CONNECTION_ID_4 = 4
VMBUS_MESSAGE_SINT = 2
CHANNEL_CONNECTION_ID_BASE = 0x2000
"""A channel's doorbell is this plus its relid: unique, and none of 1 to 4."""

SEND_HALF = 2048
"""Where the guest's bits begin in the interrupt page of versions before 2.4; the host's are in front."""

VP_INVALID = 0xFFFFFFFF
"""target_vp of a channel whose guest polls and wants no interrupts."""

MAX_RELID = 2047
"""Relids are 1 to 2047: event flags end there, and so does Linux's array."""

MONITOR_ID_NONE = 0xFF

# connection_state of VERSION_RESPONSE.
VMBUS_CONNECTION_OK = 0
VMBUS_CONNECTION_LOW_RESOURCES = 1
VMBUS_CONNECTION_FAILURE = 2

# NTSTATUS values that our answers carry; guests only ask whether it is 0.
STATUS_SUCCESS = 0
STATUS_UNSUCCESSFUL = 0xC0000001
STATUS_INVALID_PARAMETER = 0xC000000D
STATUS_INSUFFICIENT_RESOURCES = 0xC000009A
STATUS_CONNECTION_REFUSED = 0xC0000236
STATUS_NO_SUCH_DEVICE = 0xC000000E

# Offer flags.
VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE = 0x0001
VMBUS_CHANNEL_NAMED_PIPE_MODE = 0x0010
VMBUS_CHANNEL_LOOPBACK_OFFER = 0x0100
VMBUS_CHANNEL_REQUEST_MONITORED_NOTIFICATION = 0x0400
VMBUS_CHANNEL_TLNPI_PROVIDER_OFFER = 0x2000
VMBUS_PIPE_TYPE_BYTE = 0
VMBUS_PIPE_TYPE_MESSAGE = 4

OFFER_USER_DEFINED_BYTES = 120
OPEN_USER_DATA_BYTES = 120

HV_HYP_PAGE_SIZE = 4096

# GPADL messages: how many 8-byte values fit behind each header in 240 bytes, the range's own header included.
GPADL_HEADER_VALUES = (240 - 20) // 8
GPADL_BODY_VALUES = (240 - 16) // 8
GPADL_MAX_RANGE_BYTES = 0xFFFF
"""range_buflen has 16 bits."""

GUID_BYTES = 16


def guid(text: str) -> bytes:
    """The 16 wire bytes of a GUID in its text form: the first three fields are little-endian."""
    raw = bytes.fromhex(text.strip("{}").replace("-", ""))
    if len(raw) != GUID_BYTES:
        raise ValueError(f"{text}: not a GUID")
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]


def guid_text(raw: bytes) -> str:
    """The text form of a GUID's 16 wire bytes."""
    parts = (raw[3::-1], raw[5:3:-1], raw[7:5:-1], raw[8:10], raw[10:16])
    return "-".join(part.hex() for part in parts)


# Interface types.
HV_HEART_BEAT_GUID = guid("57164f39-9115-4e78-ab55-382f3bd5422d")
HV_SHUTDOWN_GUID = guid("0e0b6031-5213-4934-818b-38d90ced39db")
HV_TS_GUID = guid("9527e630-d0ae-497b-adce-e80ab0175caf")
HV_KVP_GUID = guid("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6")
HV_VSS_GUID = guid("35fa2e29-ea23-4236-96ae-3a6ebacba440")
HV_KBD_GUID = guid("f912ad6d-2b17-48ea-bd65-f927a61c7684")
