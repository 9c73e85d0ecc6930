"""hvsock, AF_VSOCK over VMBus: which GUID stands for which port, offers, and the header of stream packets.

Why: the device, its tests and a guest must agree on them. Layout only; anyone
may import it. `port_of` takes a guest's bytes and raises nothing.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.abi import vmbus

SERVICE_TEMPLATE = vmbus.guid("00000000-facb-11e6-bd58-64006a7986d3")
"""The first four bytes are the AF_VSOCK port."""

MAX_LISTEN_PORT = 0x7FFFFFFF
"""Ports above are ephemeral: Linux neither listens on them nor connects to them."""

OFFER_FLAGS = (
    vmbus.VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE
    | vmbus.VMBUS_CHANNEL_NAMED_PIPE_MODE
    | vmbus.VMBUS_CHANNEL_TLNPI_PROVIDER_OFFER
)

_user_defined = Struct("<IBBI16s")
"""pipe_mode, is_for_guest_accept, is_for_container, version, silo_id."""
_PARAMETERS_VERSION = 1

pipe_header = Struct("<II")
"""struct vmpipe_proto_header: pkt_type, data_size. In front of each packet's data."""
VMPIPE_TYPE_DATA = 1

MAX_DATA_BYTES = 16384
"""Most data of one packet (HVS_MTU_SIZE), either way. A packet without data says that no more comes."""


def service_guid(port: int) -> bytes:
    """The wire bytes of the GUID of `port`, 0 to 2**32-1."""
    return port.to_bytes(4, "little") + SERVICE_TEMPLATE[4:]


def port_of(guid: bytes) -> int | None:
    """The port that a GUID stands for; None if it is another kind of GUID."""
    return int.from_bytes(guid[:4], "little") if guid[4:] == SERVICE_TEMPLATE[4:] else None


def offer_parameters(*, to_guest: bool, silo_id: bytes = bytes(vmbus.GUID_BYTES)) -> bytes:
    """The user-defined bytes of an offer: a byte pipe, for a listener of the guest if `to_guest`."""
    return _user_defined.pack(vmbus.VMBUS_PIPE_TYPE_BYTE, int(to_guest), 0, _PARAMETERS_VERSION, silo_id)
