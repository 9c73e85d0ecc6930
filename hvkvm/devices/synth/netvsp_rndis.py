"""The RNDIS side of a NIC: initialize, query, set, and what the guest has set so far.

A message goes in, the answer comes out; sending it is for `netvsp`. What Linux's rndis_filter.c makes of
answers decides their form: it looks at a query's status for one OID alone, and takes a buffer at offset 0
for none. Owner: the I/O loop. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hvkvm.abi import ndis, rndis
from hvkvm.tuples import NamedTuple

MAX_MULTICAST = 64
"""Addresses that a guest may list; one with more sees all of them."""

MAX_PACKETS_PER_MESSAGE = 8
ALIGNMENT_FACTOR = 3
MAX_TRANSFER = 0xEFFFFFFF

RNDIS_INITIALIZED = (1, 0)
_FRAME = 14
_MAC_BYTES = 6
_NOT_SUPPORTED = rndis.RNDIS_STATUS_NOT_SUPPORTED


class ControlState(NamedTuple):
    """What the guest has agreed and set."""

    initialized: bool
    packet_filter: int
    multicast: tuple[bytes, ...]
    address: bytes
    rsc4: bool
    rsc6: bool
    scaling: bool
    table: tuple[int, ...]
    key: bytes


class NicFacts(NamedTuple):
    """What a NIC says of itself. `speed` in units of 100 bit/s; `queues` it may have at most."""

    mtu: int
    link_up: bool
    speed: int
    csum: bool
    lso4: bool
    lso6: bool
    rsc: bool
    queues: int


class Control:
    """One guest's RNDIS state. `facts()` and `counters()` are asked when a query needs them."""

    def __init__(
        self, address: bytes, facts: Callable[[], NicFacts], counters: Callable[[], Mapping[int, int]]
    ) -> None:
        self._facts = facts
        self._counters = counters
        self.permanent_address = self.address = address
        """What the guest's frames come from, as it said last; the permanent one is heard too."""
        self.clear()

    def clear(self) -> None:
        """As before INITIALIZE. The address stays: Linux says it once, also for what comes after a halt."""
        self.initialized = False
        self.packet_filter = 0
        self.multicast: frozenset[bytes] = frozenset()
        self.rsc4 = self.rsc6 = False
        self.scaling = False
        self.table: tuple[int, ...] = ()
        self.key = b""

    def save(self) -> ControlState:
        """For `load`."""
        return ControlState(
            self.initialized,
            self.packet_filter,
            tuple(sorted(self.multicast)),
            self.address,
            self.rsc4,
            self.rsc6,
            self.scaling,
            self.table,
            self.key,
        )

    def load(self, state: ControlState) -> None:
        """Be what `save` gave. ValueError for what it cannot have been."""
        bad = len(state.multicast) > MAX_MULTICAST or len(state.address) != _MAC_BYTES
        bad = bad or any(len(one) != _MAC_BYTES for one in state.multicast)
        bad = bad or len(state.key) not in (0, ndis.HASH_KEY_BYTES) or not 0 <= state.packet_filter < 1 << 32
        bad = bad or len(state.table) > ndis.INDIRECTION_ENTRIES
        bad = bad or (state.scaling and not (state.table and state.key))
        if bad:
            raise ValueError("the NIC's settings are none that a guest can have made")
        self.initialized, self.packet_filter = state.initialized, state.packet_filter
        self.multicast, self.address = frozenset(state.multicast), state.address
        self.rsc4, self.rsc6 = state.rsc4, state.rsc6
        self.scaling, self.table, self.key = state.scaling, state.table, state.key

    def wants(self, destination: bytes) -> bool:
        """Whether the guest is to have a frame for this address."""
        wanted = self.packet_filter
        if wanted & rndis.NDIS_PACKET_TYPE_PROMISCUOUS:
            return True
        if not destination[0] & 1:
            if not wanted & rndis.NDIS_PACKET_TYPE_DIRECTED:
                return False
            return destination in (self.address, self.permanent_address)
        if destination == b"\xff" * _MAC_BYTES:
            return bool(wanted & rndis.NDIS_PACKET_TYPE_BROADCAST)
        if wanted & rndis.NDIS_PACKET_TYPE_ALL_MULTICAST:
            return True
        return bool(wanted & rndis.NDIS_PACKET_TYPE_MULTICAST) and destination in self.multicast

    def handle(self, message: bytes) -> bytes | None:
        """The answer to a message of the guest; None where there is none, or the message makes no sense."""
        if len(message) < rndis.header.size:
            return None
        kind, length = rndis.header.unpack_from(message)
        if length < 12 or length > len(message):
            return None
        message = message[:length]
        ident = int.from_bytes(message[8:12], "little")
        if kind == rndis.RNDIS_MSG_INIT:
            return self._initialize(message, ident)
        if kind == rndis.RNDIS_MSG_HALT:
            self.clear()
            return None
        if kind == rndis.RNDIS_MSG_KEEPALIVE:
            return _complete(rndis.RNDIS_MSG_KEEPALIVE, ident, rndis.RNDIS_STATUS_SUCCESS)
        if kind == rndis.RNDIS_MSG_RESET:
            self.packet_filter, self.multicast = 0, frozenset()
            code = rndis.RNDIS_MSG_RESET | rndis.RNDIS_MSG_COMPLETION
            return rndis.reset_complete.pack(code, rndis.reset_complete.size, rndis.RNDIS_STATUS_SUCCESS, 1)
        if kind not in (rndis.RNDIS_MSG_QUERY, rndis.RNDIS_MSG_SET) or length < rndis.request.size:
            return None
        _kind, _length, ident, oid, size, offset, _vc = rndis.request.unpack_from(message)
        data = rndis.parse_buffer(message, size, offset, rndis.request.size)
        if kind == rndis.RNDIS_MSG_QUERY:
            return self._query(ident, oid, size, data)
        status = rndis.RNDIS_STATUS_INVALID_LENGTH if data is None else self._set(oid, data)
        return _complete(rndis.RNDIS_MSG_SET, ident, status)

    def _initialize(self, message: bytes, ident: int) -> bytes | None:
        if len(message) < rndis.initialize.size:
            return None
        self.clear()
        self.initialized = True
        return rndis.initialize_complete.pack(
            rndis.RNDIS_MSG_INIT | rndis.RNDIS_MSG_COMPLETION,
            rndis.initialize_complete.size,
            ident,
            rndis.RNDIS_STATUS_SUCCESS,
            *RNDIS_INITIALIZED,
            rndis.RNDIS_DF_CONNECTIONLESS,
            0,  # medium: 802.3
            MAX_PACKETS_PER_MESSAGE,
            MAX_TRANSFER,
            ALIGNMENT_FACTOR,
            0,
            0,
        )

    # Queries.

    def _query(self, ident: int, oid: int, size: int, data: bytes | None) -> bytes:
        found = self._answer(oid, size if data is not None else 0)
        code = rndis.RNDIS_MSG_QUERY | rndis.RNDIS_MSG_COMPLETION
        if found is None:
            # An offset that no buffer can have: Linux looks at it, not at the status.
            return rndis.query_complete.pack(code, rndis.query_complete.size, ident, _NOT_SUPPORTED, 0, 0)
        offset = rndis.query_complete.size - rndis.BODY
        total = rndis.query_complete.size + len(found)
        head = rndis.query_complete.pack(code, total, ident, rndis.RNDIS_STATUS_SUCCESS, len(found), offset)
        return head + found

    def _answer(self, oid: int, size: int) -> bytes | None:
        facts = self._facts()
        if oid in (rndis.RNDIS_OID_802_3_PERMANENT_ADDRESS, rndis.RNDIS_OID_802_3_CURRENT_ADDRESS):
            permanent = oid == rndis.RNDIS_OID_802_3_PERMANENT_ADDRESS
            return self.permanent_address if permanent else self.address
        if oid in (rndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES, rndis.OID_TCP_OFFLOAD_CURRENT_CONFIG):
            most = size or ndis.OFFLOAD_SIZES[0][1]
            lso4, lso6 = facts.lso4, facts.lso6
            return ndis.offload(csum=facts.csum, lso4=lso4, lso6=lso6, rsc=facts.rsc, most=most)
        if oid == rndis.OID_GEN_RECEIVE_SCALE_CAPABILITIES:
            return ndis.recv_scale_capabilities(facts.queues) if facts.queues > 1 else None
        if oid == rndis.RNDIS_OID_802_3_MULTICAST_LIST:
            return b"".join(sorted(self.multicast))
        if oid == rndis.RNDIS_OID_GEN_SUPPORTED_LIST:
            known = sorted({*self._numbers(facts), *self._counters(), *_TEXTS, *_OTHERS})
            return b"".join(one.to_bytes(4, "little") for one in known)
        if oid in _TEXTS:
            return _TEXTS[oid]
        number = self._numbers(facts).get(oid)
        if number is None:
            number = self._counters().get(oid)
        return None if number is None else (number & 0xFFFFFFFF).to_bytes(4, "little")

    def _numbers(self, facts: NicFacts) -> dict[int, int]:
        return {
            rndis.RNDIS_OID_GEN_HARDWARE_STATUS: 0,
            rndis.RNDIS_OID_GEN_MEDIA_SUPPORTED: 0,
            rndis.RNDIS_OID_GEN_MEDIA_IN_USE: 0,
            rndis.RNDIS_OID_GEN_MAXIMUM_LOOKAHEAD: facts.mtu,
            rndis.RNDIS_OID_GEN_CURRENT_LOOKAHEAD: facts.mtu,
            rndis.RNDIS_OID_GEN_MAXIMUM_FRAME_SIZE: facts.mtu,
            rndis.RNDIS_OID_GEN_MAXIMUM_TOTAL_SIZE: facts.mtu + _FRAME,
            rndis.RNDIS_OID_GEN_LINK_SPEED: facts.speed,
            rndis.RNDIS_OID_GEN_TRANSMIT_BLOCK_SIZE: facts.mtu + _FRAME,
            rndis.RNDIS_OID_GEN_RECEIVE_BLOCK_SIZE: facts.mtu + _FRAME,
            rndis.RNDIS_OID_GEN_TRANSMIT_BUFFER_SPACE: MAX_PACKETS_PER_MESSAGE * (facts.mtu + _FRAME),
            rndis.RNDIS_OID_GEN_RECEIVE_BUFFER_SPACE: MAX_PACKETS_PER_MESSAGE * (facts.mtu + _FRAME),
            rndis.RNDIS_OID_GEN_VENDOR_ID: 0xFFFFFF,  # none
            rndis.RNDIS_OID_GEN_DRIVER_VERSION: 0x0500,
            rndis.RNDIS_OID_GEN_VENDOR_DRIVER_VERSION: 0x10000,
            rndis.RNDIS_OID_GEN_CURRENT_PACKET_FILTER: self.packet_filter,
            rndis.RNDIS_OID_GEN_MAC_OPTIONS: 0,
            rndis.RNDIS_OID_GEN_MEDIA_CONNECT_STATUS: 0 if facts.link_up else 1,
            rndis.RNDIS_OID_GEN_MAXIMUM_SEND_PACKETS: MAX_PACKETS_PER_MESSAGE,
            rndis.RNDIS_OID_802_3_MAXIMUM_LIST_SIZE: MAX_MULTICAST,
            rndis.RNDIS_OID_802_3_MAC_OPTIONS: 0,
            rndis.RNDIS_OID_802_3_RCV_ERROR_ALIGNMENT: 0,
            rndis.RNDIS_OID_802_3_XMIT_ONE_COLLISION: 0,
            rndis.RNDIS_OID_802_3_XMIT_MORE_COLLISIONS: 0,
        }

    # Sets.

    def _set(self, oid: int, data: bytes) -> int:
        setter = _SETTERS.get(oid)
        return _NOT_SUPPORTED if setter is None else setter(self, data)

    def _set_filter(self, data: bytes) -> int:
        if len(data) < 4:
            return rndis.RNDIS_STATUS_INVALID_LENGTH
        self.packet_filter = int.from_bytes(data[:4], "little")
        return rndis.RNDIS_STATUS_SUCCESS

    def _set_multicast(self, data: bytes) -> int:
        if len(data) % _MAC_BYTES or len(data) > MAX_MULTICAST * _MAC_BYTES:
            return rndis.RNDIS_STATUS_INVALID_LENGTH
        self.multicast = frozenset(data[at : at + _MAC_BYTES] for at in range(0, len(data), _MAC_BYTES))
        return rndis.RNDIS_STATUS_SUCCESS

    def _set_offload(self, data: bytes) -> int:
        rsc = ndis.parse_rsc(data)
        if rsc is None:
            return rndis.RNDIS_STATUS_INVALID_DATA
        able = self._facts().rsc
        if rsc[0]:
            self.rsc4 = able and rsc[0] == ndis.NDIS_OFFLOAD_PARAMETERS_RSC_ENABLED
        if rsc[1]:
            self.rsc6 = able and rsc[1] == ndis.NDIS_OFFLOAD_PARAMETERS_RSC_ENABLED
        return rndis.RNDIS_STATUS_SUCCESS

    def _set_scaling(self, data: bytes) -> int:
        wanted = ndis.parse_recv_scale(data)
        if wanted is None:
            return rndis.RNDIS_STATUS_INVALID_DATA
        table = self.table if wanted.table is None else wanted.table
        key = self.key if wanted.key is None else wanted.key
        queues = self._facts().queues
        if wanted.enabled and (not table or not key or any(queue >= queues for queue in table)):
            return rndis.RNDIS_STATUS_INVALID_DATA
        self.scaling, self.table, self.key = wanted.enabled, table, key
        return rndis.RNDIS_STATUS_SUCCESS

    def _set_parameter(self, data: bytes) -> int:
        """ "NetworkAddress" is the one parameter there is: the guest changes its MAC address."""
        if len(data) < rndis.config_parameter.size:
            return rndis.RNDIS_STATUS_INVALID_LENGTH
        name_at, name_size, kind, value_at, value_size = rndis.config_parameter.unpack_from(data)
        name, value = data[name_at:][:name_size], data[value_at:][:value_size]
        if name.rstrip(b"\0") + b"\0" != _NETWORK_ADDRESS or kind != rndis.CONFIG_PARAMETER_STRING:
            return _NOT_SUPPORTED
        try:
            address = bytes.fromhex(value.decode("utf-16-le").rstrip("\0"))
        except ValueError:
            return rndis.RNDIS_STATUS_INVALID_DATA
        if len(address) != _MAC_BYTES or address[0] & 1:
            return rndis.RNDIS_STATUS_INVALID_DATA
        self.address = address
        return rndis.RNDIS_STATUS_SUCCESS

    def _set_nothing(self, _data: bytes) -> int:
        return rndis.RNDIS_STATUS_SUCCESS


def _complete(kind: int, ident: int, status: int) -> bytes:
    return rndis.complete.pack(kind | rndis.RNDIS_MSG_COMPLETION, rndis.complete.size, ident, status)


_NETWORK_ADDRESS = "NetworkAddress".encode("utf-16-le")

_TEXTS = {
    rndis.RNDIS_OID_GEN_VENDOR_DESCRIPTION: b"hvkvm virtual NIC\0",
    rndis.RNDIS_OID_GEN_FRIENDLY_NAME: "hvkvm virtual NIC\0".encode("utf-16-le"),
}

_SETTERS: dict[int, Callable[[Control, bytes], int]] = {
    rndis.RNDIS_OID_GEN_CURRENT_PACKET_FILTER: Control._set_filter,
    rndis.RNDIS_OID_802_3_MULTICAST_LIST: Control._set_multicast,
    rndis.OID_TCP_OFFLOAD_PARAMETERS: Control._set_offload,
    rndis.OID_GEN_RECEIVE_SCALE_PARAMETERS: Control._set_scaling,
    rndis.RNDIS_OID_GEN_RNDIS_CONFIG_PARAMETER: Control._set_parameter,
    rndis.OID_OFFLOAD_ENCAPSULATION: Control._set_nothing,
    rndis.RNDIS_OID_GEN_CURRENT_LOOKAHEAD: Control._set_nothing,
    rndis.RNDIS_OID_GEN_NETWORK_LAYER_ADDRESSES: Control._set_nothing,
    rndis.RNDIS_OID_GEN_PROTOCOL_OPTIONS: Control._set_nothing,
}

_OTHERS = (
    rndis.RNDIS_OID_GEN_SUPPORTED_LIST,
    rndis.RNDIS_OID_802_3_PERMANENT_ADDRESS,
    rndis.RNDIS_OID_802_3_CURRENT_ADDRESS,
    rndis.OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES,
    rndis.OID_TCP_OFFLOAD_CURRENT_CONFIG,
    *_SETTERS,
)
