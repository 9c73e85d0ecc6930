"""Offers and channels: what the host has, and how far the guest has come with it.

Owner: `server.Server` changes channels; others read them, on the I/O loop.
"""

from __future__ import annotations

from enum import Enum

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.tuples import NamedTuple


class Offer(NamedTuple):
    """A device's channel as it is offered. GUIDs are wire bytes; (interface, instance, index) is unique."""

    interface: bytes
    instance: bytes
    name: str
    flags: int = 0
    user_defined: bytes = b""
    sub_channel_index: int = 0
    mmio_megabytes: int = 0
    mmio_megabytes_optional: int = 0

    @property
    def key(self) -> tuple[bytes, bytes, int]:
        """What must not be offered twice at a time."""
        return self.interface, self.instance, self.sub_channel_index


def only_instance(interface: bytes) -> bytes:
    """The instance of a device of which a machine has one: the same at each boot."""
    return interface[:15] + bytes([interface[15] ^ 0xFF])


class ChannelState(Enum):
    """How far the guest is with a channel."""

    HIDDEN = "hidden"
    """The guest of this connection does not know it."""
    OFFERED = "offered"
    OPENING = "opening"
    """The device was asked to start."""
    OPEN = "open"
    CLOSING = "closing"
    """The device was asked to stop."""


class Channel:
    """One offer and its state. `relid` is 0 while it is hidden."""

    __slots__ = (
        "broken",
        "connection_id",
        "event_flag",
        "held_torndown",
        "offer",
        "openid",
        "released",
        "relid",
        "ring_gpadl",
        "split",
        "state",
        "target_vp",
        "withdrawn",
    )

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.relid = 0
        self.connection_id = 0
        """The guest's doorbell. VMBUS_EVENT_CONNECTION_ID: with a bit of the interrupt page (0.13)."""
        self.event_flag = 0
        self.state = ChannelState.HIDDEN
        self.withdrawn = False
        """The host took it back; it lives on until the guest releases the relid and the device stopped."""
        self.broken = False
        """Withdrawn for what this guest did: the next connection is offered it again."""
        self.released = False
        """The guest gave the relid back, and only the device is waited for."""
        self.openid = 0
        self.ring_gpadl = 0
        self.split = 0
        """Where the host's ring begins in it, in pages."""
        self.target_vp = vmbus.VP_INVALID
        self.held_torndown: list[int] = []
        """GPADL ids whose teardown is answered when the device has stopped."""

    @property
    def in_use(self) -> bool:
        """Whether a device may touch guest memory for it."""
        return self.state in (ChannelState.OPENING, ChannelState.OPEN, ChannelState.CLOSING)

    def offer_message(self) -> bytes:
        """Its OFFERCHANNEL: no monitor page, and a doorbell of its own where the version has such."""
        offer = self.offer
        return wire.build(
            wire.OFFERCHANNEL,
            interface=offer.interface,
            instance=offer.instance,
            flags=offer.flags,
            mmio_megabytes=offer.mmio_megabytes,
            mmio_megabytes_optional=offer.mmio_megabytes_optional,
            user_defined=offer.user_defined,
            sub_channel_index=offer.sub_channel_index,
            relid=self.relid,
            monitorid=vmbus.MONITOR_ID_NONE,
            is_dedicated=int(self.connection_id != vmbus.VMBUS_EVENT_CONNECTION_ID),
            connection_id=self.connection_id,
        )

    def snapshot(self) -> dict[str, object]:
        """Its offer and state as values. Any thread."""
        return {
            "name": self.offer.name,
            "relid": self.relid,
            "state": self.state.value,
            "withdrawn": self.withdrawn,
            "interface": vmbus.guid_text(self.offer.interface),
            "instance": vmbus.guid_text(self.offer.instance),
            "sub_channel_index": self.offer.sub_channel_index,
            "connection_id": self.connection_id,
            "target_vp": None if self.target_vp == vmbus.VP_INVALID else self.target_vp,
        }

    def __str__(self) -> str:
        index = self.offer.sub_channel_index
        sub = f".{index}" if index else ""
        gone = ", withdrawn" if self.withdrawn else ""
        return f"{self.offer.name}{sub} (relid {self.relid}, {self.state.value}{gone})"
