"""The layouts of what VMBus devices say to each other over their rings, by interface type.

For those who look at traffic: `hvkvm explain`, the Wireshark dissector, a failing
test's report. The devices have their own structs; a test holds both together.
Names are those of Linux's headers (include/linux/hyperv.h, hyperv_net.h,
storvsc_drv.c). A device's payload behind the ring's packet header begins with its
row in PROTOCOLS. Layouts only; anyone may import this.
"""

from __future__ import annotations

from hvkvm.abi import hvsock, ic, kvp, nvsp, rndis, storvsp, vmbus, vss
from hvkvm.abi.layout import Layout, Names, layout
from hvkvm.tuples import NamedTuple

SYNTH_IDE_GUID = vmbus.guid("32412632-86cb-44a2-9b5c-50d1417354f5")
SYNTH_MOUSE_GUID = vmbus.guid("cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a")


class Protocol(NamedTuple):
    """What is spoken on channels of one interface type."""

    name: str
    """A word, as Wireshark's fields begin with it."""
    title: str
    payload: Layout | None
    """None: bytes without meaning to the bus."""
    pointed: Layout | None = None
    """The device's own messages in guest memory that its packets point to."""


_STATUS: Names = {
    ic.HV_S_OK: "HV_S_OK",
    ic.HV_E_FAIL: "HV_E_FAIL",
    ic.HV_S_CONT: "HV_S_CONT",
    ic.HV_ERROR_NOT_SUPPORTED: "HV_ERROR_NOT_SUPPORTED",
    ic.HV_ERROR_DEVICE_NOT_CONNECTED: "HV_ERROR_DEVICE_NOT_CONNECTED",
}

_version_pair = layout("ic_version", "major:H minor:H", repeats=True)
_negotiate = layout("icmsg_negotiate", "icframe_vercnt:H icmsg_vercnt:H reserved:I", then=_version_pair)
_heartbeat = layout("heartbeat_msg_data", "seq_num:Q reserved:32s")
_shutdown = layout("shutdown_msg_data", "reason_code:I timeout_seconds:I flags:I display_message:2048s")
_timesync_data = layout(
    "ictimesync_data",
    "parenttime:Q childtime:Q roundtriptime:Q flags:B",
    volatile=("parenttime", "childtime", "roundtriptime"),
)
_timesync_ref = layout(
    "ictimesync_ref_data",
    "parenttime:Q vmreferencetime:Q flags:B leapflags:b stratum:B reserved:3s",
    volatile=("parenttime", "vmreferencetime"),
)
_timesync = layout(
    "timesync", switch="icvermsg_major", cases={1: _timesync_data, 3: _timesync_data, 4: _timesync_ref}
)
_kvp = layout(
    "hv_kvp_hdr",
    "operation:B pool:B",
    names={
        "operation": {
            kvp.KVP_OP_GET: "KVP_OP_GET",
            kvp.KVP_OP_SET: "KVP_OP_SET",
            kvp.KVP_OP_DELETE: "KVP_OP_DELETE",
            kvp.KVP_OP_ENUMERATE: "KVP_OP_ENUMERATE",
            kvp.KVP_OP_GET_IP_INFO: "KVP_OP_GET_IP_INFO",
            kvp.KVP_OP_SET_IP_INFO: "KVP_OP_SET_IP_INFO",
        }
    },
)
_vss = layout(
    "hv_vss_msg",
    "operation:B reserved:7s flags:I",
    names={
        "operation": {
            vss.VSS_OP_HOT_BACKUP: "VSS_OP_HOT_BACKUP",
            vss.VSS_OP_GET_DM_INFO: "VSS_OP_GET_DM_INFO",
            vss.VSS_OP_FREEZE: "VSS_OP_FREEZE",
            vss.VSS_OP_THAW: "VSS_OP_THAW",
        }
    },
)

_ICMSGTYPES: Names = {
    ic.ICMSGTYPE_NEGOTIATE: "ICMSGTYPE_NEGOTIATE",
    ic.ICMSGTYPE_HEARTBEAT: "ICMSGTYPE_HEARTBEAT",
    ic.ICMSGTYPE_KVPEXCHANGE: "ICMSGTYPE_KVPEXCHANGE",
    ic.ICMSGTYPE_SHUTDOWN: "ICMSGTYPE_SHUTDOWN",
    ic.ICMSGTYPE_TIMESYNC: "ICMSGTYPE_TIMESYNC",
    ic.ICMSGTYPE_VSS: "ICMSGTYPE_VSS",
}
_icmsg = layout(
    "icmsg_hdr",
    "pipe_flags:I pipe_msgsize:I icverframe_major:H icverframe_minor:H icmsgtype:H icvermsg_major:H "
    "icvermsg_minor:H icmsgsize:H status:I ictransaction_id:B icflags:B reserved:H",
    switch="icmsgtype",
    cases={
        ic.ICMSGTYPE_NEGOTIATE: _negotiate,
        ic.ICMSGTYPE_HEARTBEAT: _heartbeat,
        ic.ICMSGTYPE_KVPEXCHANGE: _kvp,
        ic.ICMSGTYPE_SHUTDOWN: _shutdown,
        ic.ICMSGTYPE_TIMESYNC: _timesync,
        ic.ICMSGTYPE_VSS: _vss,
    },
    names={"icmsgtype": _ICMSGTYPES, "status": _STATUS},
)

_keyboard = layout(
    "synth_kbd_msg_hdr",
    "type:I",
    switch="type",
    cases={
        1: layout("synth_kbd_protocol_request", "version_requested:I"),
        2: layout("synth_kbd_protocol_response", "proto_status:I"),
        3: layout("synth_kbd_keystroke", "make_code:H reserved0:H info:I"),
        4: layout("synth_kbd_led_indicators", "led_flags:H"),
    },
    names={
        "type": {
            1: "SYNTH_KBD_PROTOCOL_REQUEST",
            2: "SYNTH_KBD_PROTOCOL_RESPONSE",
            3: "SYNTH_KBD_EVENT",
            4: "SYNTH_KBD_LED_INDICATORS",
        }
    },
)

_SCSI_COMMANDS: Names = {
    0x00: "TEST_UNIT_READY",
    0x03: "REQUEST_SENSE",
    0x12: "INQUIRY",
    0x1A: "MODE_SENSE",
    0x1B: "START_STOP",
    0x1E: "ALLOW_MEDIUM_REMOVAL",
    0x25: "READ_CAPACITY",
    0x28: "READ_10",
    0x2A: "WRITE_10",
    0x35: "SYNCHRONIZE_CACHE",
    0x41: "WRITE_SAME",
    0x42: "UNMAP",
    0x43: "READ_TOC",
    0x46: "GET_CONFIGURATION",
    0x4A: "GET_EVENT_STATUS_NOTIFICATION",
    0x5A: "MODE_SENSE_10",
    0x88: "READ_16",
    0x8A: "WRITE_16",
    0x91: "SYNCHRONIZE_CACHE_16",
    0x93: "WRITE_SAME_16",
    0x9E: "SERVICE_ACTION_IN_16",
    0xA0: "REPORT_LUNS",
    0xA8: "READ_12",
    0xAA: "WRITE_12",
}
_SRB_STATUS: Names = {
    storvsp.SRB_STATUS_SUCCESS: "SRB_STATUS_SUCCESS",
    storvsp.SRB_STATUS_ABORTED: "SRB_STATUS_ABORTED",
    storvsp.SRB_STATUS_ERROR: "SRB_STATUS_ERROR",
    storvsp.SRB_STATUS_BUSY: "SRB_STATUS_BUSY",
    storvsp.SRB_STATUS_INVALID_REQUEST: "SRB_STATUS_INVALID_REQUEST",
    storvsp.SRB_STATUS_INVALID_LUN: "SRB_STATUS_INVALID_LUN",
    storvsp.SRB_STATUS_ERROR | storvsp.SRB_STATUS_AUTOSENSE_VALID: "SRB_STATUS_ERROR|AUTOSENSE_VALID",
}
_DATA_IN: Names = {0: "WRITE_TYPE", 1: "READ_TYPE", 2: "UNKNOWN_TYPE"}
_SENSE_KEYS: Names = {
    1: "RECOVERED_ERROR",
    2: "NOT_READY",
    3: "MEDIUM_ERROR",
    4: "HARDWARE_ERROR",
    5: "ILLEGAL_REQUEST",
    6: "UNIT_ATTENTION",
    7: "DATA_PROTECT",
    0xB: "ABORTED_COMMAND",
    0xE: "MISCOMPARE",
}
_SCSI_STATUS: Names = {0: "GOOD", 2: "CHECK_CONDITION", 8: "BUSY"}
_srb = layout(
    "vmscsi_request",
    "length:H srb_status:B scsi_status:B port_number:B path_id:B target_id:B lun:B cdb_length:B "
    "sense_info_length:B data_in:B reserved:B data_transfer_length:I cdb_opcode:B cdb_rest:19s reserve:H "
    "queue_tag:B queue_action:B srb_flags:I time_out_value:I queue_sort_ey:I",
    names={
        "cdb_opcode": _SCSI_COMMANDS,
        "data_in": _DATA_IN,
    },
)
_SRB_BYTES = 52
_completed = layout(
    # Of a request; what completes anything else has another length here.
    "vmscsi_request_length",
    "length:H",
    switch="length",
    cases={
        _SRB_BYTES: layout(
            "vmscsi_request_completed",
            "srb_status:B scsi_status:B port_number:B path_id:B target_id:B lun:B cdb_length:B "
            "sense_info_length:B data_in:B reserved:B data_transfer_length:I sense_response_code:B "
            "sense_segment:B sense_key:B sense_information:4s sense_additional_length:B sense_specific:4s "
            "sense_asc:B sense_ascq:B sense_rest:6s",
            names={
                "srb_status": _SRB_STATUS,
                "scsi_status": _SCSI_STATUS,
                "sense_key": _SENSE_KEYS,
                "data_in": _DATA_IN,
            },
        )
    },
)
_vstor = layout(
    "vstor_packet",
    "operation:I flags:I status:I",
    switch="operation",
    cases={
        storvsp.COMPLETE_IO: _completed,
        storvsp.EXECUTE_SRB: _srb,
        storvsp.QUERY_PROTOCOL_VERSION: layout("vmstorage_protocol_version", "major_minor:H revision:H"),
        storvsp.CREATE_SUB_CHANNELS: layout("vmstorage_sub_channels", "sub_channel_count:H"),
    },
    names={"operation": {number: f"VSTOR_OPERATION_{name}" for number, name in storvsp.OPERATIONS.items()}},
)

_NVSP_STATUS: Names = {1: "NVSP_STAT_SUCCESS", 2: "NVSP_STAT_FAIL"}
_nvsp = layout(
    "nvsp_message_header",
    "msg_type:I",
    switch="msg_type",
    cases={
        1: layout("nvsp_message_init", "min_protocol_ver:I max_protocol_ver:I"),
        2: layout(
            "nvsp_message_init_complete",
            "negotiated_protocol_ver:I max_mdl_chain_len:I status:I",
            names={"status": _NVSP_STATUS},
        ),
        100: layout("nvsp_1_message_send_ndis_version", "ndis_major_ver:I ndis_minor_ver:I"),
        101: layout("nvsp_1_message_send_receive_buffer", "gpadl_handle:I id:H"),
        102: layout(
            "nvsp_1_message_send_receive_buffer_complete",
            "status:I num_sections:I offset:I sub_alloc_size:I num_sub_allocs:I end_offset:I",
            names={"status": _NVSP_STATUS},
        ),
        103: layout("nvsp_1_message_revoke_receive_buffer", "id:H"),
        104: layout("nvsp_1_message_send_send_buffer", "gpadl_handle:I id:H"),
        105: layout(
            "nvsp_1_message_send_send_buffer_complete",
            "status:I section_size:I",
            names={"status": _NVSP_STATUS},
        ),
        106: layout("nvsp_1_message_revoke_send_buffer", "id:H"),
        107: layout(
            "nvsp_1_message_send_rndis_packet",
            "channel_type:I send_buf_section_index:I send_buf_section_size:I",
            names={"channel_type": {0: "RMC_DATA", 1: "RMC_CONTROL"}},
        ),
        108: layout("nvsp_1_message_send_rndis_packet_complete", "status:I", names={"status": _NVSP_STATUS}),
        125: layout("nvsp_2_vsc_capability", "mtu:I reserved:I data:Q"),
        128: layout("nvsp_4_send_vf_association", "allocated:I serial:I"),
        129: layout("nvsp_4_sw_datapath", "active_datapath:I"),
        133: layout("nvsp_5_subchannel", "op_or_status:I num_subchannels:I"),
        134: layout("nvsp_5_send_indirect_table", "count:I offset:I"),
    },
    names={
        "msg_type": {
            1: "NVSP_MSG_TYPE_INIT",
            2: "NVSP_MSG_TYPE_INIT_COMPLETE",
            100: "NVSP_MSG1_TYPE_SEND_NDIS_VER",
            101: "NVSP_MSG1_TYPE_SEND_RECV_BUF",
            102: "NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE",
            103: "NVSP_MSG1_TYPE_REVOKE_RECV_BUF",
            104: "NVSP_MSG1_TYPE_SEND_SEND_BUF",
            105: "NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE",
            106: "NVSP_MSG1_TYPE_REVOKE_SEND_BUF",
            107: "NVSP_MSG1_TYPE_SEND_RNDIS_PKT",
            108: "NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE",
            125: "NVSP_MSG2_TYPE_SEND_NDIS_CONFIG",
            128: "NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION",
            129: "NVSP_MSG4_TYPE_SWITCH_DATA_PATH",
            133: "NVSP_MSG5_TYPE_SUBCHANNEL",
            134: "NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE",
        }
    },
)

_OIDS: Names = {
    value: name.removeprefix("RNDIS_")
    for name, value in vars(rndis).items()
    if name.startswith(("OID_", "RNDIS_OID_"))
}
_RNDIS_STATUS: Names = {
    value: name for name, value in vars(rndis).items() if name.startswith("RNDIS_STATUS_")
}
_oid_request = layout(
    "rndis_oid_request",
    "req_id:I oid:I info_buflen:I info_buf_offset:I dev_vc_handle:I",
    names={"oid": _OIDS},
)
_done = layout("rndis_complete", "req_id:I status:I", names={"status": _RNDIS_STATUS})
_per_packet_info = layout(
    # All that Linux and we send have four bytes of value.
    "rndis_per_packet_info",
    "size:I type:I ppi_offset:I value:I",
    repeats=True,
    names={
        "type": {
            rndis.TCPIP_CHKSUM_PKTINFO: "TCPIP_CHKSUM_PKTINFO",
            rndis.TCP_LARGESEND_PKTINFO: "TCP_LARGESEND_PKTINFO",
            rndis.IEEE_8021Q_INFO: "IEEE_8021Q_INFO",
            rndis.NBL_HASH_VALUE: "NBL_HASH_VALUE",
        }
    },
)
_COMPLETION = rndis.RNDIS_MSG_COMPLETION
_rndis = layout(
    "rndis_message",
    "ndis_msg_type:I msg_len:I",
    switch="ndis_msg_type",
    cases={
        rndis.RNDIS_MSG_PACKET: layout(
            "rndis_packet",
            "data_offset:I data_len:I oob_data_offset:I oob_data_len:I num_oob_data_elements:I "
            "per_pkt_info_offset:I per_pkt_info_len:I vc_handle:I reserved:I",
            then=_per_packet_info,
        ),
        rndis.RNDIS_MSG_INIT: layout(
            "rndis_initialize_request", "req_id:I major_ver:I minor_ver:I max_xfer_size:I"
        ),
        rndis.RNDIS_MSG_INIT | _COMPLETION: layout(
            "rndis_initialize_complete",
            "req_id:I status:I major_ver:I minor_ver:I dev_flags:I medium:I max_pkt_per_msg:I "
            "max_xfer_size:I pkt_alignment_factor:I af_list_offset:I af_list_size:I",
            names={"status": _RNDIS_STATUS},
        ),
        rndis.RNDIS_MSG_HALT: layout("rndis_halt_request", "req_id:I"),
        rndis.RNDIS_MSG_QUERY: _oid_request,
        rndis.RNDIS_MSG_QUERY | _COMPLETION: layout(
            "rndis_query_complete",
            "req_id:I status:I info_buflen:I info_buf_offset:I",
            names={"status": _RNDIS_STATUS},
        ),
        rndis.RNDIS_MSG_SET: _oid_request,
        rndis.RNDIS_MSG_SET | _COMPLETION: _done,
        rndis.RNDIS_MSG_RESET: layout("rndis_reset_request", "reserved:I"),
        rndis.RNDIS_MSG_RESET | _COMPLETION: layout(
            "rndis_reset_complete", "status:I addr_reset:I", names={"status": _RNDIS_STATUS}
        ),
        rndis.RNDIS_MSG_INDICATE: layout(
            "rndis_indicate_status",
            "status:I status_buflen:I status_buf_offset:I",
            names={"status": _RNDIS_STATUS},
        ),
        rndis.RNDIS_MSG_KEEPALIVE: layout("rndis_keepalive_request", "req_id:I"),
        rndis.RNDIS_MSG_KEEPALIVE | _COMPLETION: _done,
    },
    names={
        "ndis_msg_type": {
            number | done: f"RNDIS_MSG_{word}{'_C' if done else ''}"
            for number, word in enumerate(
                ("PACKET", "INIT", "HALT", "QUERY", "SET", "RESET", "INDICATE", "KEEPALIVE"), 1
            )
            for done in (0, _COMPLETION)
        }
    },
)

_hid = layout(
    "synthhid_msg_hdr",
    "pipe_type:I pipe_size:I type:I size:I",
    names={
        "type": {
            0: "SYNTH_HID_PROTOCOL_REQUEST",
            1: "SYNTH_HID_PROTOCOL_RESPONSE",
            2: "SYNTH_HID_INITIAL_DEVICE_INFO",
            3: "SYNTH_HID_INITIAL_DEVICE_INFO_ACK",
            4: "SYNTH_HID_INPUT_REPORT",
        }
    },
)
_hvsock = layout("vmpipe_proto_header", "pkt_type:I data_size:I")

PROTOCOLS: dict[bytes, Protocol] = {
    vmbus.HV_HEART_BEAT_GUID: Protocol("heartbeat", "Heartbeat", _icmsg),
    vmbus.HV_SHUTDOWN_GUID: Protocol("shutdown", "Shutdown", _icmsg),
    vmbus.HV_TS_GUID: Protocol("timesync", "Time synchronization", _icmsg),
    vmbus.HV_KVP_GUID: Protocol("kvp", "Key-value exchange", _icmsg),
    vmbus.HV_VSS_GUID: Protocol("vss", "Volume snapshot", _icmsg),
    vmbus.HV_KBD_GUID: Protocol("kbd", "Synthetic keyboard", _keyboard),
    SYNTH_MOUSE_GUID: Protocol("hid", "Synthetic mouse", _hid),
    storvsp.SCSI: Protocol("storvsp", "Synthetic SCSI", _vstor),
    SYNTH_IDE_GUID: Protocol("storvsp", "Synthetic IDE", _vstor),
    nvsp.HV_NIC_GUID: Protocol("netvsp", "Synthetic network", _nvsp, _rndis),
}
"""By the 16 wire bytes of the interface type."""

HVSOCK = Protocol("hvsock", "Socket", _hvsock)
UNKNOWN = Protocol("data", "Unknown device", None)


def protocol_of(interface: bytes) -> Protocol:
    """What is spoken on channels of this interface type; UNKNOWN for one that is not in the table."""
    found = PROTOCOLS.get(interface)
    if found is not None:
        return found
    return UNKNOWN if hvsock.port_of(interface) is None else HVSOCK
