"""What hyperv-testdev remembers, apart from the device: a machine without one need not load it."""

from __future__ import annotations

from hvkvm.tuples import NamedTuple


class Target(NamedTuple):
    """A SINT of a VP."""

    vp_index: int
    sint: int


class Connection(NamedTuple):
    """A message or event connection, and the SINT that its answers come on."""

    conn_id: int
    target: Target


class Echo(NamedTuple):
    """A message that the guest posted and whose echo has not reached it."""

    conn_id: int
    message_type: int
    payload: bytes


class TestdevState(NamedTuple):
    """The routes and connections that the guest has made, in the order of their making."""

    routes: tuple[Target, ...]
    messages: tuple[Connection, ...]
    events: tuple[Connection, ...]
    waiting: tuple[Echo, ...]
