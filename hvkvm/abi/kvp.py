"""Key-value exchange messages: the bodies behind an integration component's header.

struct hv_kvp_msg and hv_kvp_ip_msg of include/uapi/linux/hyperv.h. Layout
only; anyone may import it. The builders raise ValueError for what does not fit;
the parsers take a guest's bytes and raise nothing.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

KVP_OP_GET = 0
KVP_OP_SET = 1
KVP_OP_DELETE = 2
KVP_OP_ENUMERATE = 3
KVP_OP_GET_IP_INFO = 4
KVP_OP_SET_IP_INFO = 5

KVP_POOL_EXTERNAL = 0
"""Set by the host, read by the guest."""
KVP_POOL_GUEST = 1
"""Set by the guest's programs."""
KVP_POOL_AUTO = 2
"""Facts the guest's daemon tells of itself; made anew at each question."""
KVP_POOL_AUTO_EXTERNAL = 3
KVP_POOL_AUTO_INTERNAL = 4
KVP_POOL_COUNT = 5

REG_SZ = 1
REG_U32 = 4
REG_U64 = 8

ADDR_FAMILY_NONE = 0
ADDR_FAMILY_IPV4 = 1
ADDR_FAMILY_IPV6 = 2

HV_KVP_EXCHANGE_MAX_KEY_SIZE = 512
HV_KVP_EXCHANGE_MAX_VALUE_SIZE = 2048
"""Bytes of UTF-16 with their NUL."""
MAX_ADAPTER_ID_SIZE = 128
MAX_IP_ADDR_SIZE = 1024
MAX_GATEWAY_SIZE = 512
"""UTF-16 units with their NUL."""

hv_kvp_hdr = Struct("<BBH")
"""operation, pool, pad."""
hv_kvp_exchg_msg_value = Struct("<III512s2048s")
"""value_type, key_size, value_size, key, value."""
hv_kvp_msg_enumerate_index = Struct("<I")
"""What precedes the value in struct hv_kvp_msg_enumerate."""
hv_kvp_msg_delete = Struct("<I512s")
"""key_size, key."""
hv_kvp_ip_msg = Struct("<BB256sBB2048s2048s1024s2048s")
"""operation, pool, adapter_id, addr_family, dhcp_enabled, ip_addr, sub_net, gate_way, dns_addr: packed."""
SIZEOF_HV_KVP_MSG = 7432
"""The union's largest member, rounded up. A guest answers in the same bytes: a request has room for it."""

Value = str | int | bytes
"""A string, a number, or the bytes of a type that is neither."""


class KvpPair(NamedTuple):
    """A key and its value."""

    key: str
    value: Value


class IpInfo(NamedTuple):
    """struct hv_kvp_ipaddr_value, its lists taken apart."""

    adapter_id: str = ""
    addr_family: int = ADDR_FAMILY_NONE
    dhcp_enabled: bool = False
    ip_addr: tuple[str, ...] = ()
    sub_net: tuple[str, ...] = ()
    gate_way: tuple[str, ...] = ()
    dns_addr: tuple[str, ...] = ()


def utf16(what: str, text: str, size: int) -> bytes:
    """`text` with its NUL. ValueError naming `what` when that is over `size` bytes, or no UTF-16 text."""
    if "\0" in text:
        raise ValueError(f"{what} holds a NUL")
    try:
        encoded = text.encode("utf-16-le")
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half a character (a lone surrogate)") from None
    if len(encoded) > size - 2:
        raise ValueError(f"{what}: {len(encoded) // 2} UTF-16 units; {size // 2 - 1} fit")
    return encoded + b"\0\0"


def text_of(raw: bytes, declared: int | None = None) -> str:
    """The text before the first NUL within `declared` bytes and the real ones; bad units are replaced."""
    raw = raw if declared is None else raw[:declared]
    return raw[: len(raw) & ~1].decode("utf-16-le", "replace").partition("\0")[0]


def _padded(body: bytes) -> bytes:
    return body.ljust(SIZEOF_HV_KVP_MSG, b"\0")


def key_bytes(key: str) -> bytes:
    """A key as requests carry it. ValueError for one that is empty or does not fit."""
    if not key:
        raise ValueError("the key is empty")
    return utf16("the key", key, HV_KVP_EXCHANGE_MAX_KEY_SIZE)


def get_body(pool: int, key: str) -> bytes:
    """KVP_OP_GET."""
    raw = key_bytes(key)
    value = hv_kvp_exchg_msg_value.pack(REG_SZ, len(raw), 0, raw, b"")
    return _padded(hv_kvp_hdr.pack(KVP_OP_GET, pool, 0) + value)


def set_body(pool: int, key: str, value: str | int) -> bytes:
    """KVP_OP_SET. A number goes as REG_U32 where it fits, else as REG_U64."""
    raw = key_bytes(key)
    if isinstance(value, str):
        kind, content = REG_SZ, utf16("the value", value, HV_KVP_EXCHANGE_MAX_VALUE_SIZE)
    elif 0 <= value < 1 << 64:
        size = 4 if value < 1 << 32 else 8
        kind, content = (REG_U32 if size == 4 else REG_U64), value.to_bytes(size, "little")
    else:
        raise ValueError(f"the value {value} is no unsigned number of 64 bits")
    body = hv_kvp_exchg_msg_value.pack(kind, len(raw), len(content), raw, content)
    return _padded(hv_kvp_hdr.pack(KVP_OP_SET, pool, 0) + body)


def delete_body(pool: int, key: str) -> bytes:
    """KVP_OP_DELETE."""
    raw = key_bytes(key)
    return _padded(hv_kvp_hdr.pack(KVP_OP_DELETE, pool, 0) + hv_kvp_msg_delete.pack(len(raw), raw))


def enumerate_body(pool: int, index: int) -> bytes:
    """KVP_OP_ENUMERATE: the pair at `index`, or HV_S_CONT behind the last."""
    return _padded(hv_kvp_hdr.pack(KVP_OP_ENUMERATE, pool, 0) + hv_kvp_msg_enumerate_index.pack(index))


def ip_info_body(operation: int, info: IpInfo) -> bytes:
    """KVP_OP_GET_IP_INFO (only adapter and family count) or KVP_OP_SET_IP_INFO."""
    addresses = 2 * MAX_IP_ADDR_SIZE
    return hv_kvp_ip_msg.pack(
        operation,
        KVP_POOL_EXTERNAL,
        utf16("the adapter", info.adapter_id, 2 * MAX_ADAPTER_ID_SIZE),
        info.addr_family,
        info.dhcp_enabled,
        utf16("the addresses", ";".join(info.ip_addr), addresses),
        utf16("the subnets", ";".join(info.sub_net), addresses),
        utf16("the gateways", ";".join(info.gate_way), 2 * MAX_GATEWAY_SIZE),
        utf16("the name servers", ";".join(info.dns_addr), addresses),
    )


def parse_get(body: bytes) -> KvpPair | None:
    """The pair in an answer to KVP_OP_GET; None for fewer bytes than its value has."""
    return _pair(body, hv_kvp_hdr.size)


def parse_enumerate(body: bytes) -> KvpPair | None:
    """The pair in an answer to KVP_OP_ENUMERATE; None for fewer bytes than its value has."""
    return _pair(body, hv_kvp_hdr.size + hv_kvp_msg_enumerate_index.size)


def _pair(body: bytes, offset: int) -> KvpPair | None:
    if len(body) < offset + hv_kvp_exchg_msg_value.size:
        return None
    kind, key_size, value_size, key, value = hv_kvp_exchg_msg_value.unpack_from(body, offset)
    return KvpPair(text_of(key, key_size), _value(kind, value, value_size))


def _value(kind: int, raw: bytes, declared: int) -> Value:
    if kind == REG_SZ:
        return text_of(raw, declared)
    if kind in (REG_U32, REG_U64):
        return int.from_bytes(raw[:kind], "little")  # the numbers of these types are their sizes in bytes
    return raw[:declared]


def parse_ip_info(body: bytes) -> IpInfo | None:
    """The answer to KVP_OP_GET_IP_INFO; None for fewer bytes than it has."""
    if len(body) < hv_kvp_ip_msg.size:
        return None
    fields = hv_kvp_ip_msg.unpack_from(body)
    lists = (_list(raw) for raw in fields[5:])
    return IpInfo(text_of(fields[2]), fields[3], bool(fields[4]), *lists)


def _list(raw: bytes) -> tuple[str, ...]:
    return tuple(part for part in text_of(raw).split(";") if part)
