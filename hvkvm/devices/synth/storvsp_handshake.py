"""The handshake of a storage controller: a version, its properties, and from then on requests.

Linux asks BEGIN, QUERY_PROTOCOL_VERSION (again with an older one when refused),
QUERY_PROPERTIES and END, on the primary channel; it may begin anew at any time.

Owner: the I/O loop.
"""

from __future__ import annotations

from enum import Enum

from hvkvm.abi import storvsp as wire

MAX_TRANSFER_BYTES = 1 << 20
"""Of one request, as the guest is told; its packet then takes 2 KiB of the ring."""


class Phase(Enum):
    """How far the guest's driver has come."""

    NEW = "new"
    BEGUN = "begun"
    AGREED = "agreed on a version"
    READY = "ready"


class Handshake:
    """Of a controller that may have `sub_channels`."""

    def __init__(self, sub_channels: int) -> None:
        self._sub_channels = sub_channels
        self.phase = Phase.NEW
        self.version = 0
        """What the guest's driver and we speak; 0 while nothing is agreed."""

    @property
    def ready(self) -> bool:
        """Whether it is over, so that requests are taken."""
        return self.phase is Phase.READY

    def begin_anew(self) -> None:
        """The channel was closed, or opened."""
        self.phase, self.version = Phase.NEW, 0

    def answer(self, operation: int, payload: bytes) -> bytes:
        """The answer to a step of it, or to what is none."""
        status, body = wire.STATUS_INVALID_DEVICE_STATE, b""
        if operation == wire.BEGIN_INITIALIZATION:
            self.phase, self.version, status = Phase.BEGUN, 0, wire.STATUS_SUCCESS
        elif operation == wire.QUERY_PROTOCOL_VERSION and self.phase in (Phase.BEGUN, Phase.AGREED):
            version = wire.version_of(payload)
            status = wire.STATUS_REVISION_MISMATCH
            if version in wire.VERSIONS:
                self.phase, self.version, status = Phase.AGREED, version, wire.STATUS_SUCCESS
        elif operation == wire.QUERY_PROPERTIES and self.phase is Phase.AGREED:
            status = wire.STATUS_SUCCESS
            body = wire.properties_body(self._sub_channels, MAX_TRANSFER_BYTES)
        elif operation == wire.END_INITIALIZATION and self.phase is Phase.AGREED:
            self.phase, status = Phase.READY, wire.STATUS_SUCCESS
        elif operation not in wire.OPERATIONS or operation == wire.FCHBA_DATA:
            status = wire.STATUS_INVALID_DEVICE_REQUEST
        return wire.answer(status, body)

    def load(self, phase: str, version: int) -> None:
        """Be as a saved one. ValueError for what no driver has come to."""
        found = {one.value: one for one in Phase}.get(phase)
        versions = wire.VERSIONS if found in (Phase.AGREED, Phase.READY) else (0,)
        if found is None or version not in versions:
            raise ValueError(f"no driver has come to {phase[:20]!r} like that")
        self.phase, self.version = found, version
