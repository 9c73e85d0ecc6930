"""From what `--net` says to a wire: a backend, and what is laid on it, each imported where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvkvm.machine.nic_spec import NicSpec, forwards_of
from hvkvm.net.port import MAX_MTU

if TYPE_CHECKING:
    from hvkvm.events import Observer
    from hvkvm.net.wire import Wire
    from hvkvm.runtime.io_loop import IoLoop


def open_wire(io: IoLoop, spec: NicSpec, observer: Observer) -> Wire:
    """The wire. ConfigError, and then nothing is left. Any thread; may block."""
    wire = _backend(io, spec, observer)
    try:
        return _layers(io, spec, wire, observer)
    except BaseException:
        wire.close()
        raise


def _layers(io: IoLoop, spec: NicSpec, wire: Wire, observer: Observer) -> Wire:
    """`wire` with what is laid on it. A capture is next to the NIC: it shows what the guest sees."""
    if spec.has_faults:
        from hvkvm.net.faults import Faults, FaultyWire

        wire = FaultyWire(io, wire, Faults(*(getattr(spec, key) for key in Faults._fields)))
    if spec.pcap is not None:
        from hvkvm.net.capture import Capture

        wire = Capture(wire, spec.pcap, wire.kind, observer=observer)
    return wire


def _backend(io: IoLoop, spec: NicSpec, observer: Observer) -> Wire:
    mtu = spec.mtu if spec.mtu > 0 else None
    queues = 1 if spec.has_faults else max(1, spec.queues)  # a faulty wire has one
    if spec.backend == "user":
        from hvkvm.net.user import DEFAULT_MTU, Forward, start_user

        forwards = tuple(Forward(*each) for each in forwards_of(spec))
        return start_user(io, mtu=mtu or DEFAULT_MTU, forwards=forwards, observer=observer)
    if spec.socket is not None or spec.listen is not None:
        from hvkvm.net.stream import StreamPort
        from hvkvm.net.stream_peer import Answerer, Caller

        stream = StreamPort(io, mtu or MAX_MTU, observer=observer)
        if spec.listen is not None:
            Answerer(io, stream, spec.listen)
        elif spec.socket is not None:
            Caller(io, stream, spec.socket, observer=observer)
        return stream
    from hvkvm.net.tap import TapPort
    from hvkvm.net.tap_open import DEFAULT_MTU, open_tap, take_fd

    if spec.backend == "create":
        from hvkvm.net.tap_make import NewTap, host_mac, make_tap

        mac = host_mac(spec.mac) if spec.mac else ""
        tap = make_tap(NewTap(spec.name, mtu or DEFAULT_MTU, spec.ip, spec.bridge, spec.netns, queues, mac))
    elif spec.tap:
        tap = open_tap(spec.tap, mtu, queues)
    else:
        tap = take_fd(spec.fd, mtu)
    return TapPort(io, tap, observer=observer)
