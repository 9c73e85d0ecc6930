"""Keyboard: types into the guest's virtual consoles, by scan code.

Not an integration component: the guest speaks first, with the protocol version
it wants, and afterwards only takes events. What finds no room in the ring waits
in a bounded queue; the guest's doorbell moves it on. Keys that nobody waits for any
more are not typed, unless the guest has some of them: half a word would be worse.
Linux drops keys that come before its input layer has taken the driver's port,
shortly after the version.

Owner: the I/O loop, for every method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from hvkvm.abi import keyboard as wire
from hvkvm.abi import vmbus
from hvkvm.abi.ring import VM_PKT_DATA_INBAND, Packet
from hvkvm.runtime.guard import call_all
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import Done
from hvkvm.vmbus.offer import Offer, only_instance

MAX_WAITING = 16384
"""Events that may wait for room; a shifted character is four."""

TURN_EVENTS = 64
"""Most that go at a time: a guest chooses how large its ring is, and other devices have their turn too."""

Typed = Callable[[bool], object]
"""typed(whole): all of it lies in the ring; False if the guest left before, or it was dropped."""

Wanted = Callable[[], bool]
"""Whether somebody still waits for `typed`."""


class _Block:
    """The keys of one request that have yet to go."""

    __slots__ = ("begun", "events", "typed", "wanted")

    def __init__(self, events: Iterable[bytes], typed: Typed | None, wanted: Wanted | None) -> None:
        self.events = deque(events)
        self.typed = typed
        self.wanted = wanted
        self.begun = False

    @property
    def is_dropped(self) -> bool:
        """Whether it need not go, and none of it has."""
        return not self.begun and self.wanted is not None and not self.wanted()

    def end(self, *, whole: bool) -> None:
        """Tell who typed it."""
        if self.typed is not None:
            self.typed(whole)


class KeyboardState(NamedTuple):
    """What was agreed, and the keys that wait for room: those who pressed them are not told any more."""

    version: int | None
    response: bytes
    waiting: tuple[bytes, ...]
    events: int
    leds: int


class Keyboard:
    """`events` counts what the ring took, `leds` is what the guest last said of its LEDs."""

    NAME = "keyboard"
    INTERFACE = vmbus.HV_KBD_GUID
    State = KeyboardState

    def __init__(self) -> None:
        self.events = 0
        self.leds = 0
        self.version: int | None = None
        """The protocol version agreed with a driver; None while none is there."""
        self._io: ChannelIo | None = None
        self._waiting: deque[_Block] = deque()
        self._count = 0  # events in those, and one more for each, since an empty one takes room as well
        self._response = b""

    @property
    def offer(self) -> Offer:
        """The instance is the same at each boot."""
        flags = vmbus.VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE
        return Offer(self.INTERFACE, only_instance(self.INTERFACE), self.NAME, flags=flags)

    @property
    def ready_for_requests(self) -> bool:
        """Whether a guest's driver has taken the device."""
        return self.version is not None

    @property
    def waiting(self) -> int:
        """Events that wait for room, and one more for each request."""
        return self._count

    def type(self, text: str, typed: Typed | None = None) -> bool:
        """Type `text` on a US keyboard: all of it, or False when no driver is there or too much waits.

        `typed` is called once if this returned True. ValueError for a character that is on no key.
        """
        return self.send_events(wire.text_events(text), typed)

    def press(self, keys: str | list[wire.Key], typed: Typed | None = None) -> bool:
        """Press together, by name ("ctrl-alt-delete") or as `Key`s. As `type`; ValueError: no such key."""
        chord = wire.parse_chord(keys) if isinstance(keys, str) else keys
        return self.send_events(wire.chord_events(chord), typed)

    def send_events(
        self, events: list[bytes], typed: Typed | None = None, wanted: Wanted | None = None
    ) -> bool:
        """Send events that `abi.keyboard` made; as `type`.

        If `wanted()` is false when the first of them could go, none of them does: `typed(False)`.
        """
        if self.version is None or self._count + len(events) >= MAX_WAITING:
            return False
        self._append(_Block(events, typed, wanted))
        self.ready()
        return True

    def _append(self, block: _Block) -> None:
        self._waiting.append(block)
        self._count += len(block.events) + 1

    # vmbus.device.SavedDevice

    def save(self) -> KeyboardState:
        """See `vmbus.device.SavedDevice`."""
        waiting = tuple(event for block in self._waiting if not block.is_dropped for event in block.events)
        return KeyboardState(self.version, self._response, waiting, self.events, self.leds)

    def load(self, io: ChannelIo | None, state: KeyboardState) -> None:
        """See `vmbus.device.SavedDevice`."""
        if state.version not in (None, wire.SYNTH_KBD_VERSION) or len(state.waiting) > MAX_WAITING:
            raise ValueError("the keyboard speaks a version that this host does not")
        if any(len(entry) != wire.event.size for entry in state.waiting):
            raise ValueError("a key that waits is none")
        if io is None:
            return
        self._io, self.version = io, state.version
        self._response = state.response[: wire.protocol_response.size]
        if state.waiting:
            self._append(_Block(state.waiting, None, None))
        self.events, self.leds = max(0, state.events), state.leds

    # vmbus.device.Device

    def opened(self, io: ChannelIo) -> None:
        """The guest speaks first."""
        self._io = io

    def received(self, packet: Packet) -> None:
        """A version, or LEDs; anything else is ignored."""
        io, payload = self._io, packet.payload
        if io is None or packet.type != VM_PKT_DATA_INBAND or len(payload) < wire.message_type.size:
            return
        (kind,) = wire.message_type.unpack_from(payload)
        if kind == wire.SYNTH_KBD_PROTOCOL_REQUEST and len(payload) >= wire.protocol_request.size:
            _kind, version = wire.protocol_request.unpack_from(payload)
            accepted = version == wire.SYNTH_KBD_VERSION
            self._leave()
            self.version = version if accepted else None
            # Only the last one is owed an answer: a guest that asks without reading makes nothing grow.
            self._response = wire.protocol_response.pack(
                wire.SYNTH_KBD_PROTOCOL_RESPONSE, wire.PROTOCOL_ACCEPTED if accepted else 0
            )
            io.complete(packet)
            self.ready()
        elif kind == wire.SYNTH_KBD_LED_INDICATORS and len(payload) >= wire.led_indicators.size:
            _kind, self.leds = wire.led_indicators.unpack_from(payload)

    def ready(self) -> None:
        """Send what waits while there is room, with one signal for all of a turn's share."""
        io = self._io
        if io is None:
            return
        with io:
            if self._response:
                if not io.send(self._response):
                    return
                self._response = b""
            for _ in range(TURN_EVENTS):
                if not self._waiting or self._io is not io:
                    return
                block = self._waiting[0]
                if block.events and not block.is_dropped:
                    if not io.send(block.events[0]):
                        return
                    block.begun = True
                    block.events.popleft()
                    self._count -= 1
                    self.events += 1
                else:
                    self._waiting.popleft()
                    self._count -= len(block.events) + 1
                    block.end(whole=not block.events)
            if self._waiting:
                io.again()

    def _leave(self) -> None:
        """The driver of before is gone: its keys are dropped, and whoever waits is told."""
        waiting, self._waiting = self._waiting, deque()
        self._count = 0
        self.version = None
        call_all(partial(block.end, whole=False) for block in waiting)

    def close(self, done: Done) -> None:
        """Nobody types into a closed channel."""
        self._io = None
        self._response = b""
        self._leave()
        done()
