"""A guest that sends anything, at any time: no exception, no growth, one answer a request.

The state machine mixes valid steps (or nothing interesting would ever be
reached) with random bytes, mutated messages, host-side changes and garbage in
open rings.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import HVMSG_VMBUS, hv_post_message_input
from hvkvm.observe.bus_text import bus_lines
from hvkvm.testing.vmbus_client import gpadl_messages
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.vmbus.gpadl import MAX_UNFINISHED, MAX_VALUES
from hvkvm.vmbus.inbox import MAX_INBOX
from hvkvm.vmbus.offer import ChannelState
from hvkvm.vmbus.outbox import MAX_OUTBOX
from hvkvm.vmbus.server import MAX_TL_CONNECTS, BusState

# conftest.py cannot be imported by name here: its directory is no package.
_spec = importlib.util.spec_from_file_location("vmbus_devices", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
_devices = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_devices)

small = st.integers(0, 6)
word = st.one_of(small, st.sampled_from([0x7FFFFFFF, 0xFFFFFFFF, 2047, 2048]), st.integers(0, 0xFFFFFFFF))
gpadls = st.integers(1, 4)
ANSWERS = {
    wire.OPENCHANNEL: wire.OPENCHANNEL_RESULT,
    wire.MODIFYCHANNEL: wire.MODIFYCHANNEL_RESPONSE,
    wire.REQUESTOFFERS: wire.ALLOFFERS_DELIVERED,
}


class HostileGuest(RuleBasedStateMachine):
    """Feeds a host. `asked` and `answered` count requests of a connection, which must agree at rest."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loopback()
        self.loop.client.deliver = self._deliver  # type: ignore[method-assign]
        self.devices: list[Any] = []
        self.answered: Counter[int] = Counter()
        self.asked: Counter[int] = Counter()
        inner = self.loop.host.server.receive

        def receive(message: wire.Message) -> None:
            server = self.loop.host.server
            kind = message.kind
            if kind.type in (wire.INITIATE_CONTACT, wire.UNLOAD):
                self.asked.clear()
                self.answered.clear()
            elif server.state is BusState.CONNECTED:
                answer = wire.KINDS[ANSWERS.get(kind.type, kind.type)]
                self.asked[kind.type] += server.version >= max(kind.since, answer.since)
            inner(message)

        self.loop.host.server.receive = receive  # type: ignore[method-assign]

    def _deliver(self, payload: bytes) -> None:
        message = wire.parse(payload)
        assert message is not None
        assert not message.kind.to_host
        self.answered[message.kind.type] += 1

    def teardown(self) -> None:
        self.loop.close()

    def send(self, payload: bytes) -> None:
        message = hv_post_message_input(1, 0, HVMSG_VMBUS, len(payload))
        message.payload[: len(payload)] = payload
        self.loop.synic.handlers[1](message)

    @initialize()
    def begin(self) -> None:
        for number in range(3):
            self.add(number)

    # Valid steps.

    @rule(version=st.sampled_from([*vmbus.HOST_VERSIONS, vmbus.VERSION_WIN10_V5_3, 7]), packed=word)
    def contact(self, version: int, packed: int) -> None:
        page = 2 | packed << 32 if packed > 6 else packed
        if version < vmbus.VERSION_WIN8:
            page = packed << 12
        self.send(wire.build(wire.INITIATE_CONTACT, version=version, interrupt_page=page))

    @rule()
    def newest_contact_and_offers(self) -> None:
        self.send(wire.build(wire.INITIATE_CONTACT, version=vmbus.VERSION_WIN10_V5_3, interrupt_page=2))
        self.send(wire.build(wire.REQUESTOFFERS))

    @rule(
        relid=small, gpadl=gpadls, pages=st.integers(1, 90), first=st.integers(0, 1030), cut=st.integers(0, 3)
    )
    def gpadl(self, relid: int, gpadl: int, pages: int, first: int, cut: int) -> None:
        for payload in gpadl_messages(relid, gpadl, [(pages * 4096, 0, range(first, first + pages))])[cut:]:
            self.send(payload)

    @rule(relid=small, gpadl=gpadls, split=small, vp_index=st.sampled_from([0, 1, 2, vmbus.VP_INVALID]))
    def open(self, relid: int, gpadl: int, split: int, vp_index: int) -> None:
        self.send(
            wire.build(
                wire.OPENCHANNEL,
                relid=relid,
                openid=relid,
                ring_gpadl=gpadl,
                target_vp=vp_index,
                downstream_page_offset=split,
            )
        )

    @rule(
        number=st.sampled_from(
            [wire.CLOSECHANNEL, wire.RELID_RELEASED, wire.MODIFYCHANNEL, wire.GPADL_TEARDOWN, wire.UNLOAD]
        ),
        relid=small,
        gpadl=gpadls,
    )
    def change(self, number: int, relid: int, gpadl: int) -> None:
        values = {"relid": relid, "gpadl": gpadl, "target_vp": gpadl - 1}
        self.send(wire.build(number, **{n: values[n] for n in wire.KINDS[number].names}))

    # Junk.

    @rule(payload=st.binary(max_size=240))
    def junk(self, payload: bytes) -> None:
        self.send(payload)

    @rule(number=st.sampled_from(sorted(wire.KINDS)), words=st.lists(word, max_size=58))
    def mutated(self, number: int, words: list[int]) -> None:
        payload = number.to_bytes(4, "little") + bytes(4) + b"".join(w.to_bytes(4, "little") for w in words)
        self.send(payload[:240].ljust(wire.KINDS[number].size, b"\xff"))

    @rule(pfn=st.integers(0, 1023), words=st.lists(word, min_size=1, max_size=17))
    def scribble(self, pfn: int, words: list[int]) -> None:
        self.loop.memory.write(pfn * 4096, b"".join(w.to_bytes(4, "little") for w in words))

    @rule(relid=st.integers(1, 6))
    def signal(self, relid: int) -> None:
        self.loop.synic.signal(vmbus.CHANNEL_CONNECTION_ID_BASE | relid)

    @rule(data=st.binary(max_size=2048))
    def signal_by_page(self, data: bytes) -> None:
        """Any bits of the interrupt page, if there is one."""
        page = self.loop.host.server.interrupt_page
        if page:
            self.loop.memory.write(page + vmbus.SEND_HALF, data)
        self.loop.synic.signal(vmbus.VMBUS_EVENT_CONNECTION_ID)

    # The host.

    @rule(number=st.integers(0, 4))
    def add(self, number: int) -> None:
        channels = self.loop.host.server.channels.all
        device = _devices.Echo(number)
        if not any(c.offer.key == device.offer.key and not c.withdrawn for c in channels):
            self.loop.host.add(device)

    @rule(number=small)
    def remove(self, number: int) -> None:
        channels = self.loop.host.server.channels.all
        if number < len(channels):
            self.loop.host.remove(channels[number])

    @rule(steps=st.integers(1, 5))
    def some(self, steps: int) -> None:
        for _ in range(steps):
            self.loop.step()

    @rule()
    def rest(self) -> None:
        """Let everything happen: now every request of this connection has its one answer."""
        self.loop.run()
        for request, answer in ANSWERS.items():
            assert self.asked[request] == self.answered[answer], wire.KINDS[request].name
        headers, created = self.asked[wire.GPADL_HEADER], self.answered[wire.GPADL_CREATED]
        assert headers == created + self.loop.host.server.channels.gpadls.unfinished
        assert self.asked[wire.GPADL_TEARDOWN] == self.answered[wire.GPADL_TORNDOWN]

    # What always holds.

    @invariant()
    def nothing_grows(self) -> None:
        host = self.loop.host
        gpadls = host.server.channels.gpadls
        assert len(host.inbox) <= MAX_INBOX
        assert len(host.outbox) <= MAX_OUTBOX + len(host.server.channels.all) + MAX_UNFINISHED
        assert gpadls.unfinished <= MAX_UNFINISHED
        assert gpadls.values <= MAX_VALUES
        assert gpadls.values >= sum(gpadl.values for gpadl in gpadls)
        assert len(host.server.tl_connects) <= MAX_TL_CONNECTS
        assert len(host.server.channels.all) <= 5 + 2047
        assert len(host.server.reports.counts) < 32
        assert len(self.loop.notes.events) < 400

    @invariant()
    def channels_agree(self) -> None:
        host = self.loop.host
        channels = host.server.channels
        for channel in channels.all:
            known = channel.state is not ChannelState.HIDDEN
            assert bool(channel.relid) == known
            assert not known or channels.by_relid[channel.relid] is channel
        assert len(channels.by_relid) == sum(bool(c.relid) for c in channels.all)
        opened = {c for c in channels.all if c.state is ChannelState.OPEN}
        assert set(host.devices._open) == opened
        own = sum(c.connection_id != vmbus.VMBUS_EVENT_CONNECTION_ID for c in opened)
        assert len(self.loop.synic.events) == own + bool(host.server.interrupt_page)
        assert host.server.state is not BusState.RESETTING
        if host.server.state is BusState.DISCONNECTED:
            assert len(channels.gpadls) == 0
        assert bus_lines(host.snapshot())


HostileGuest.TestCase.settings = settings(
    deadline=None,
    max_examples=60,
    stateful_step_count=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestHostileGuest = HostileGuest.TestCase


def test_an_unload_before_3_0_ends_requests_too() -> None:
    state: Any = HostileGuest()
    state.begin()
    state.contact(version=vmbus.VERSION_WIN8, packed=0)
    state.open(gpadl=1, relid=0, split=0, vp_index=0)
    state.change(gpadl=1, number=wire.UNLOAD, relid=0)
    state.rest()
    state.teardown()
