"""The wire table: sizes as in the headers, one source for both directions, no exception for any bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire

# sizeof(struct vmbus_channel_*) of Linux 6.1, the 8-byte header included.
LINUX_SIZES = {
    "OFFERCHANNEL": 196,
    "RESCIND_CHANNELOFFER": 12,
    "REQUESTOFFERS": 8,
    "ALLOFFERS_DELIVERED": 8,
    "OPENCHANNEL": 148,
    "OPENCHANNEL_RESULT": 20,
    "CLOSECHANNEL": 12,
    "GPADL_HEADER": 20,
    "GPADL_BODY": 16,
    "GPADL_CREATED": 20,
    "GPADL_TEARDOWN": 16,
    "GPADL_TORNDOWN": 12,
    "RELID_RELEASED": 12,
    "INITIATE_CONTACT": 40,
    "VERSION_RESPONSE": 16,
    "UNLOAD": 8,
    "UNLOAD_RESPONSE": 8,
    "TL_CONNECT_REQUEST": 40,
    "MODIFYCHANNEL": 16,
    "MODIFYCHANNEL_RESPONSE": 16,
}


def test_sizes_are_those_of_the_headers() -> None:
    found = {kind.name: kind.size for kind in wire.KINDS.values()}
    assert LINUX_SIZES.items() <= found.items()


def test_every_kind_survives_building_and_parsing() -> None:
    for kind in wire.KINDS.values():
        values = {}
        zero = kind.layout.unpack(bytes(kind.layout.size))
        for position, name in enumerate(kind.names):
            if isinstance(zero[position], bytes):
                values[name] = bytes([position + 1]) * len(zero[position])
            else:
                values[name] = position + 1
        payload = wire.build(kind.name, **values)
        message = wire.parse(payload)
        assert message is not None
        assert message.kind is kind
        assert message.values == values
        assert str(message).startswith(kind.name)


def test_offsets_of_an_offer() -> None:
    payload = wire.build(wire.OFFERCHANNEL, relid=7, connection_id=0x2007, is_dedicated=1, monitorid=0xFF)
    assert int.from_bytes(payload[184:188], "little") == 7
    assert payload[188] == 0xFF
    assert payload[189] & 1 == 0  # no monitor page
    assert int.from_bytes(payload[190:192], "little") == 1
    assert int.from_bytes(payload[192:196], "little") == 0x2007


@pytest.mark.parametrize("kind", wire.KINDS.values(), ids=lambda kind: kind.name)
def test_short_messages_are_refused_and_padded_ones_taken(kind: wire.Kind) -> None:
    payload = wire.build(kind.type)
    assert wire.parse(payload[:-1]) is None
    padded = wire.parse(payload.ljust(240, b"\0"))
    assert padded is not None
    assert padded.kind is kind


def test_extensions_are_taken_in_full_or_not_at_all() -> None:
    longer = wire.build(wire.OPENCHANNEL, relid=1, connection_id=0x3000, event_flag=9)
    assert len(longer) == 156
    message = wire.parse(longer)
    assert message is not None
    assert (message["connection_id"], message["event_flag"]) == (0x3000, 9)
    shorter = wire.parse(longer[:-1])
    assert shorter is not None
    assert "connection_id" not in shorter.values
    assert shorter["connection_id"] == 0


def test_building_refuses_what_the_table_has_not() -> None:
    with pytest.raises(ValueError, match="CLOSECHANNEL has no gpadl"):
        wire.build(wire.CLOSECHANNEL, gpadl=1)
    with pytest.raises(ValueError, match="tail"):
        wire.build(wire.UNLOAD, b"x")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_parse_or_do_not(payload: bytes) -> None:
    message = wire.parse(payload)
    assert message is None or str(message)


def test_guids_have_their_first_fields_reversed() -> None:
    text = "9527e630-d0ae-497b-adce-e80ab0175caf"
    assert vmbus.guid(text)[:4] == bytes.fromhex("30e62795")
    assert vmbus.guid_text(vmbus.guid(text)) == text
    with pytest.raises(ValueError, match="not a GUID"):
        vmbus.guid("12")
