"""The table of layouts agrees with the structs that the devices use, and takes any bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import device_layouts, hvsock, ic, keyboard, nvsp, storvsp, vmbus, vmbus_messages, vss
from hvkvm.abi.layout import Layout, decode, every
from hvkvm.record import words
from hvkvm.record.explain import from_hex

EVERY = [
    row
    for protocol in (*device_layouts.PROTOCOLS.values(), device_layouts.HVSOCK)
    if protocol.payload is not None
    for row in every(protocol.payload)
]
SIZES = {
    "icmsg_hdr": ic.ICMSG_HDR,
    "heartbeat_msg_data": ic.heartbeat_msg_data.size,
    "shutdown_msg_data": ic.shutdown_msg_data.size,
    "ictimesync_data": ic.ictimesync_data.size,
    "ictimesync_ref_data": ic.ictimesync_ref_data.size,
    "hv_vss_msg": vss.hv_vss_msg.size,
    "synth_kbd_keystroke": keyboard.event.size - 4,
    "vmpipe_proto_header": hvsock.pipe_header.size,
    "vmscsi_request": storvsp.PACKET_BYTES - 12,
    "vmstorage_protocol_version": storvsp._version.size,
    "nvsp_message_init": nvsp.init.size - 4,
    "nvsp_1_message_send_receive_buffer": nvsp.send_buf.size - 4,
    "nvsp_1_message_revoke_send_buffer": nvsp.revoke_buf.size - 4,
    "nvsp_1_message_send_receive_buffer_complete": nvsp.recv_buf_complete.size - 4 - 12,
    "nvsp_1_message_send_send_buffer_complete": nvsp.send_buf_complete.size - 4 - 28,
    "nvsp_1_message_send_rndis_packet": nvsp.RNDIS_PKT_BYTES - 4,
    "nvsp_1_message_send_rndis_packet_complete": nvsp.rndis_pkt_complete.size - 4,
    "nvsp_2_vsc_capability": nvsp.ndis_config.size - 4,
    "nvsp_5_subchannel": nvsp.subchannel.size - 4,
}


def rows(name: str) -> list[Layout]:
    return [row for row in EVERY if row.name == name]


def test_sizes_are_those_of_the_devices_structs() -> None:
    for name, size in SIZES.items():
        found = rows(name)
        assert found, name
        assert {row.size for row in found} == {size}, name


def test_a_built_request_is_read_back_field_by_field() -> None:
    body = ic.heartbeat_msg_data.pack(77)
    payload = ic.build(ic.ICMSGTYPE_HEARTBEAT, body, frame=(3, 0), message=(3, 0), transaction=9)
    decoded = decode(payload, device_layouts.PROTOCOLS[vmbus.HV_HEART_BEAT_GUID].payload)
    found = {value.field.name: value.value for value in decoded.values}
    assert found["icmsgtype"] == ic.ICMSGTYPE_HEARTBEAT
    assert (found["icverframe_major"], found["icvermsg_major"]) == (3, 3)
    assert (found["seq_num"], found["ictransaction_id"]) == (77, 9)
    assert (decoded.rest, decoded.short) == (len(payload), "")


def test_a_disks_request_and_its_end_are_named() -> None:
    layout = device_layouts.PROTOCOLS[storvsp.SCSI].payload
    request = bytearray(storvsp.PACKET_BYTES)
    request[0], request[12], request[28] = storvsp.EXECUTE_SRB, 52, 0x28
    text = " ".join(words.fields(decode(bytes(request), layout)))
    assert "operation=VSTOR_OPERATION_EXECUTE_SRB" in text
    assert "cdb_opcode=READ_10" in text
    done = bytearray(storvsp.PACKET_BYTES)
    done[0], done[12], done[14], done[15] = storvsp.COMPLETE_IO, 52, 0x84, 2
    text = " ".join(words.fields(decode(bytes(done), layout)))
    assert "srb_status=SRB_STATUS_ERROR|AUTOSENSE_VALID scsi_status=CHECK_CONDITION" in text
    done[12] = 0  # the end of a request for the controller's properties
    assert "srb_status" not in " ".join(words.fields(decode(bytes(done), layout)))


def test_versions_repeat_to_the_end() -> None:
    body = ic.negotiate_body(((1, 0), (3, 0)), ((3, 0), (1, 0)))
    decoded = decode(ic.build(0, body), device_layouts.PROTOCOLS[vmbus.HV_HEART_BEAT_GUID].payload)
    majors = [value.value for value in decoded.values if value.field.name == "major"]
    assert majors == [1, 3, 3, 1]


def test_time_is_read_by_the_version_that_was_agreed() -> None:
    layout = device_layouts.PROTOCOLS[vmbus.HV_TS_GUID].payload
    old = ic.build(4, ic.ictimesync_data.pack(5, 6, 7, 1), message=(3, 0))
    new = ic.build(4, ic.ictimesync_ref_data.pack(5, 6, 1, 0, 2), message=(4, 0))
    assert {value.field.name for value in decode(old, layout).values} >= {"childtime", "roundtriptime"}
    assert {value.field.name for value in decode(new, layout).values} >= {"vmreferencetime", "stratum"}


@given(st.binary(max_size=300), st.sampled_from([*device_layouts.PROTOCOLS, bytes(16)]), st.booleans())
def test_any_bytes_have_words(data: bytes, interface: bytes, whole: bool) -> None:
    lines = [*words.ring(interface, data, whole=whole), words.message(data)]
    assert all(len(line) < 4000 and line.isprintable() for line in lines)
    decoded = decode(data, device_layouts.protocol_of(interface).payload)
    assert decoded.rest <= len(data)


def test_a_message_that_is_cut_short_is_told_from_one_of_another_type() -> None:
    contact = vmbus_messages.build("INITIATE_CONTACT", version=0x50003)
    assert from_hex(contact.hex(), None).startswith("INITIATE_CONTACT version=5.3")
    cut = from_hex(contact[:24].hex(), None)
    assert cut.startswith("INITIATE_CONTACT has 40 bytes, and here are 24 bytes: 0e000000 ")
    other = b"\xff" + contact[1:]
    assert from_hex(other.hex(), None).startswith("no message of the table: type 255, 40 bytes: ")
    assert from_hex("00", None).startswith("no message of the table: 1 bytes")
