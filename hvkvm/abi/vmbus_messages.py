"""The wire table: every VMBus control message, its layout, direction and minimum version.

Why: parsing, building, names, minimum versions and traces all derive from this
one table, on the host's side and on the guest's side for tests, so the two
cannot disagree by accident. A row is what Linux's include/linux/hyperv.h lays
out as struct vmbus_channel_*; sizes count the 8-byte header.

No I/O and no state; anyone may import this. `parse` takes guest bytes: it
returns None or a message, and raises nothing.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi.vmbus import guid_text, version_text
from hvkvm.tuples import NamedTuple

HEADER_BYTES = 8
MAX_MESSAGE_BYTES = 240
_header = Struct("<II")

TO_GUEST = False
TO_HOST = True


class Extension(NamedTuple):
    """Fields that newer versions append to a message."""

    names: tuple[str, ...]
    layout: Struct


class Kind(NamedTuple):
    """One row: a message type.

    `size` is the least number of bytes of a message. `tail` says that bytes
    behind the layout belong to it, `feature` which 6.0 feature it needs.
    """

    type: int
    name: str
    to_host: bool
    since: int
    names: tuple[str, ...]
    layout: Struct
    size: int
    extensions: tuple[Extension, ...]
    tail: bool
    feature: int

    def __str__(self) -> str:
        return self.name


class Message:
    """One message: its row, its fields by name, and the bytes of a variable tail."""

    __slots__ = ("kind", "payload", "tail", "values")

    def __init__(self, kind: Kind, values: dict[str, Any], tail: bytes = b"", payload: bytes = b"") -> None:
        self.kind = kind
        self.values = values
        self.tail = tail
        self.payload = payload
        """What it was parsed from."""

    def __getitem__(self, name: str) -> Any:
        """A field's value: int, or bytes for GUIDs and user data. 0 for one that a short message lacks."""
        return self.values.get(name, 0)

    def __str__(self) -> str:
        return describe(self)


_SKIP = "_"


def _fields(text: str) -> tuple[tuple[str, ...], Struct]:
    """Names and Struct of "name:code ..."; a code x with count pads, and has no name."""
    names, codes = [], []
    for word in text.split():
        name, code = word.split(":")
        codes.append(code)
        if name != _SKIP:
            names.append(name)
    return tuple(names), Struct("<" + "".join(codes))


KINDS: dict[int, Kind] = {}
"""The table by message type."""


def _row(
    number: int,
    name: str,
    to_host: bool,
    since: int,
    fields: str = "",
    *extensions: str,
    tail: bool = False,
    feature: int = 0,
) -> int:
    names, layout = _fields(fields)
    longer = tuple(Extension(*_fields(text)) for text in extensions)
    KINDS[number] = Kind(
        number, name, to_host, since, names, layout, HEADER_BYTES + layout.size, longer, tail, feature
    )
    return number


_V1, _WIN10 = vmbus.VERSION_WS2008, vmbus.VERSION_WIN10
_V4_1, _V5, _V5_3, _V6 = (
    vmbus.VERSION_WIN10_V4_1,
    vmbus.VERSION_WIN10_V5,
    vmbus.VERSION_WIN10_V5_3,
    vmbus.VERSION_COPPER,
)

OFFERCHANNEL = _row(
    1,
    "OFFERCHANNEL",
    TO_GUEST,
    _V1,
    "interface:16s instance:16s _:16x flags:H mmio_megabytes:H user_defined:120s sub_channel_index:H "
    "mmio_megabytes_optional:H relid:I monitorid:B monitor_allocated:B is_dedicated:H connection_id:I",
)
RESCIND_CHANNELOFFER = _row(2, "RESCIND_CHANNELOFFER", TO_GUEST, _V1, "relid:I")
REQUESTOFFERS = _row(3, "REQUESTOFFERS", TO_HOST, _V1)
ALLOFFERS_DELIVERED = _row(4, "ALLOFFERS_DELIVERED", TO_GUEST, _V1)
OPENCHANNEL = _row(
    5,
    "OPENCHANNEL",
    TO_HOST,
    _V1,
    "relid:I openid:I ring_gpadl:I target_vp:I downstream_page_offset:I userdata:120s",
    "connection_id:I event_flag:H open_flags:H",
)
OPENCHANNEL_RESULT = _row(6, "OPENCHANNEL_RESULT", TO_GUEST, _V1, "relid:I openid:I status:I")
CLOSECHANNEL = _row(7, "CLOSECHANNEL", TO_HOST, _V1, "relid:I")
GPADL_HEADER = _row(8, "GPADL_HEADER", TO_HOST, _V1, "relid:I gpadl:I range_buflen:H rangecount:H", tail=True)
GPADL_BODY = _row(9, "GPADL_BODY", TO_HOST, _V1, "msgnumber:I gpadl:I", tail=True)
GPADL_CREATED = _row(10, "GPADL_CREATED", TO_GUEST, _V1, "relid:I gpadl:I status:I")
GPADL_TEARDOWN = _row(11, "GPADL_TEARDOWN", TO_HOST, _V1, "relid:I gpadl:I")
GPADL_TORNDOWN = _row(12, "GPADL_TORNDOWN", TO_GUEST, _V1, "gpadl:I")
RELID_RELEASED = _row(13, "RELID_RELEASED", TO_HOST, _V1, "relid:I")
# interrupt_page: a page before 2.4; {msg_sint u8, msg_vtl u8, reserved u16, feature_flags u32} from 5.0 on.
INITIATE_CONTACT = _row(
    14,
    "INITIATE_CONTACT",
    TO_HOST,
    _V1,
    "version:I target_vcpu:I interrupt_page:Q monitor_page1:Q monitor_page2:Q",
    "client_id:16s",
)
VERSION_RESPONSE = _row(
    15,
    "VERSION_RESPONSE",
    TO_GUEST,
    _V1,
    "version_supported:B connection_state:B _:2x msg_conn_id:I",
    "supported_features:I",
    "_:4x parent_to_child_monitor:Q child_to_parent_monitor:Q",
)
# 3.0 brought it, but a host that knows it answers at any version: iPXE leaves a connection of 0.13 by it.
UNLOAD = _row(16, "UNLOAD", TO_HOST, _V1)
UNLOAD_RESPONSE = _row(17, "UNLOAD_RESPONSE", TO_GUEST, _V1)
OPEN_RESERVED_CHANNEL = _row(
    18,
    "OPEN_RESERVED_CHANNEL",
    TO_HOST,
    _WIN10,
    "relid:I target_vp:I target_sint:I ring_gpadl:I downstream_page_offset:I",
)
CLOSE_RESERVED_CHANNEL = _row(
    19, "CLOSE_RESERVED_CHANNEL", TO_HOST, _WIN10, "relid:I target_vp:I target_sint:I"
)
CLOSE_RESERVED_RESPONSE = _row(20, "CLOSE_RESERVED_RESPONSE", TO_GUEST, _WIN10, "relid:I")
TL_CONNECT_REQUEST = _row(
    21, "TL_CONNECT_REQUEST", TO_HOST, _WIN10, "endpoint_id:16s service_id:16s", "silo_id:16s"
)
MODIFYCHANNEL = _row(22, "MODIFYCHANNEL", TO_HOST, _V4_1, "relid:I target_vp:I")
TL_CONNECT_RESULT = _row(23, "TL_CONNECT_RESULT", TO_GUEST, _V4_1, "endpoint_id:16s service_id:16s status:I")
MODIFYCHANNEL_RESPONSE = _row(24, "MODIFYCHANNEL_RESPONSE", TO_GUEST, _V5_3, "relid:I status:I")
MODIFY_CONNECTION = _row(
    25,
    "MODIFY_CONNECTION",
    TO_HOST,
    _V6,
    "monitor_page1:Q monitor_page2:Q",
    feature=vmbus.FEATURE_MODIFY_CONNECTION,
)
MODIFY_CONNECTION_RESPONSE = _row(26, "MODIFY_CONNECTION_RESPONSE", TO_GUEST, _V6, "connection_state:B")
PAUSE = _row(27, "PAUSE", TO_HOST, _V6, feature=vmbus.FEATURE_PAUSE_RESUME)
PAUSE_RESPONSE = _row(28, "PAUSE_RESPONSE", TO_GUEST, _V6, feature=vmbus.FEATURE_PAUSE_RESUME)
RESUME = _row(29, "RESUME", TO_HOST, _V6, feature=vmbus.FEATURE_PAUSE_RESUME)

_BY_NAME = {kind.name: kind for kind in KINDS.values()}


def message_type(payload: bytes) -> int | None:
    """The type of a message, None when not even the header is there."""
    return int.from_bytes(payload[:4], "little") if len(payload) >= HEADER_BYTES else None


def parse(payload: bytes) -> Message | None:
    """The message in `payload`, which may be longer than its type; None for an unknown type or a short one.

    An extension is taken when it is there in full: whether it means anything is
    for who knows the negotiated version.
    """
    size = len(payload)
    if not HEADER_BYTES <= size <= MAX_MESSAGE_BYTES:
        return None
    kind = KINDS.get(int.from_bytes(payload[:4], "little"))
    if kind is None or size < kind.size:
        return None
    values = dict(zip(kind.names, kind.layout.unpack_from(payload, HEADER_BYTES), strict=True))
    at = kind.size
    for extension in kind.extensions:
        end = at + extension.layout.size
        if end > size:
            break
        values.update(zip(extension.names, extension.layout.unpack_from(payload, at), strict=True))
        at = end
    return Message(kind, values, payload[kind.size :] if kind.tail else b"", payload)


def build(type_or_name: int | str, tail: bytes = b"", **values: Any) -> bytes:
    """The wire bytes of a message; fields not given are 0, an extension is there if a field of it is given.

    ValueError for a field that the type has not, struct.error for a value that
    does not fit: mistakes of the caller.
    """
    kind = KINDS[type_or_name] if isinstance(type_or_name, int) else _BY_NAME[type_or_name]
    left = dict(values)
    body = _header.pack(kind.type, 0) + _pack(kind.layout, kind.names, left)
    for extension in kind.extensions:
        if not left:
            break
        body += _pack(extension.layout, extension.names, left)
    if left or (tail and not kind.tail):
        raise ValueError(f"{kind.name} has no {', '.join(left) or 'tail'}")
    if len(body) + len(tail) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{kind.name} of {len(body) + len(tail)} bytes: at most {MAX_MESSAGE_BYTES}")
    return body + tail


def _pack(layout: Struct, names: tuple[str, ...], values: dict[str, Any]) -> bytes:
    # A bytes field that is not given packs as b"": which fields those are, the zeroed layout itself tells.
    zero = layout.unpack(bytes(layout.size))
    return layout.pack(*(values.pop(name, zero[i]) for i, name in enumerate(names)))


def describe(message: Message) -> str:
    """A line for traces: the C name and every field that is not zero."""
    shown = []
    for name, value in message.values.items():
        if isinstance(value, bytes):
            if not any(value):
                continue
            text = guid_text(value) if len(value) == vmbus.GUID_BYTES else f"{len(value)} bytes"
        elif name == "version":
            text = version_text(value)
        elif not value:
            continue
        else:
            text = f"{value:#x}" if value > 9 else str(value)
        shown.append(f"{name}={text}")
    if message.tail:
        shown.append(f"+{len(message.tail)} bytes")
    return " ".join([message.kind.name, *shown])
