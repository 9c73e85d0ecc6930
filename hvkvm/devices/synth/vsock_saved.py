"""Streams that outlive their machine: those of a guest's command, which the next run takes over.

Why: every other stream of hvsock is reset when a guest goes on from a file, because its program is not
there. A command's are the run's own standard streams (`abi.guest_command`), and the next run has such, too.

Owner: the I/O loop, while the machine is at rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hvkvm.abi import guest_command, hvsock, vmbus
from hvkvm.devices.synth.hvsock import HvsockConnection, HvsockState
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.offer import Channel, Offer

PORTS = frozenset(
    {
        guest_command.VSOCK_CONTROL,
        guest_command.VSOCK_INPUT,
        guest_command.VSOCK_OUTPUT,
        guest_command.VSOCK_ERROR,
    }
)


class SavedStream(NamedTuple):
    """A connection of the guest to `port`, by the GUID of its own end."""

    port: int
    endpoint: bytes
    state: HvsockState


def offer_to_port(port: int, endpoint: bytes, silo_id: bytes = bytes(vmbus.GUID_BYTES)) -> Offer:
    """What a guest is offered that has connected to `port` of the host."""
    return Offer(
        hvsock.service_guid(port),
        endpoint,
        f"vsock to host port {port}",
        flags=hvsock.OFFER_FLAGS,
        user_defined=hvsock.offer_parameters(to_guest=False, silo_id=silo_id),
    )


def saved_streams(live: Mapping[HvsockConnection, Channel | None]) -> tuple[SavedStream, ...]:
    """Those of `live` that go on in another machine."""
    found = []
    for connection, channel in live.items():
        offer = connection.offer
        port = hvsock.port_of(offer.interface)
        to_host = offer == offer_to_port(port or 0, offer.instance, offer.user_defined[-vmbus.GUID_BYTES :])
        if channel is not None and port in PORTS and to_host:
            found.append(SavedStream(port, offer.instance, connection.save()))
    return tuple(found)


def check(streams: Iterable[SavedStream]) -> None:
    """ValueError for what no command has."""
    seen = set()
    for stream in streams:
        if stream.port not in PORTS or stream.port in seen or len(stream.endpoint) != vmbus.GUID_BYTES:
            raise ValueError(f"its stream to port {stream.port} is none of a command")
        seen.add(stream.port)
