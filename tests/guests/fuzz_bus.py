"""A VMBus host with all of its devices, and a guest that does anything: the bench of the fuzzer.

A step is a tuple of a name and plain values, so that a sequence of them can be printed,
shortened and kept as a test. What a value means depends on the moment: channel 3 is the third
that the guest knows by then, so that a shorter sequence still means something.

Nothing here raises for a step; what raises is the host's fault. One thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from struct import pack, unpack_from
from typing import Any

from fuzz_faults import ERRNOS, NAMES, Faults

from hvkvm.abi import hvsock as abi_hvsock
from hvkvm.abi import ic, keyboard, kvp, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import HVMSG_VMBUS, hv_post_message_input
from hvkvm.abi.ring import Packet
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.ic import IntegrationComponent
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.devices.synth.vsock import Vsock
from hvkvm.devices.synth.vss import Vss
from hvkvm.testing.vmbus_client import gpadl_messages
from hvkvm.testing.vmbus_loopback import Loopback
from hvkvm.testing.vsock_loopback import LoopbackIo
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

Step = tuple[Any, ...]
Patch = tuple[int, bytes]
"""Where to write, and what."""
Mutation = tuple[int | None, tuple[Patch, ...]]
"""A new length or None, and patches."""
AS_IT_IS: Mutation = (None, ())

PAGE = 4096
FIRST_PAGE, PAGES = 64, 960
"""PFNs of the loopback's RAM that rings may lie on."""
INTERRUPT_PAGE = 0x1000
"""Its address, for versions that have one."""
LISTENING = 9
"""The port that a program of the host's listens on."""
PATH_PORT = 10
"""The port that PATH_10 serves, by a program that takes nobody."""
MOST_SOCKETS = 8


def mutated(payload: bytes, mutation: Mutation) -> bytes:
    """`payload` changed."""
    length, patches = mutation
    changed = bytearray(payload)
    if length is not None:
        changed = changed[:length].ljust(length, b"\xa5")
    for where, data in patches:
        if changed:
            at = where % len(changed)
            changed[at : at + len(data)] = data[: len(changed) - at]
    return bytes(changed)


class Known:
    """A channel as the guest knows it."""

    def __init__(self, offer: wire.Message) -> None:
        self.relid: int = offer["relid"]
        self.interface: bytes = offer["interface"]
        self.connection_id: int = offer["connection_id"]
        self.gpadl = 0
        self.pages: list[int] = []
        self.out_pages = 0
        self.rescinded = False
        self.opened: int | None = None
        """The status of the last OPENCHANNEL_RESULT."""


class Bench:
    """Host, devices and guest. `path`: of the vsock's socket, in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.loop = Loopback()
        self.loop.client.deliver = self._deliver  # type: ignore[method-assign]
        self.io = LoopbackIo(self.loop.call_soon)
        self.faults = Faults()
        self.faults.install(self.loop.synic)
        later = self.io.call_later
        self.heartbeat = Heartbeat(later)
        self.shutdown = Shutdown()
        self.timesync = TimeSync(later, lambda: 1)
        self.kvp = Kvp()
        self.vss = Vss(later)
        self.keyboard = Keyboard()
        self.components: tuple[IntegrationComponent, ...] = (
            self.heartbeat,
            self.shutdown,
            self.timesync,
            self.kvp,
            self.vss,
        )
        for device in (*self.components, self.keyboard):
            self.loop.host.add(device)
        self.path = path
        self.vsock = Vsock(self.loop.host, self.io, path, observer=self.loop.notes)
        self.vsock.start()
        self.vsock.listen(LISTENING, self._took)
        self._deaf = socket.socket(socket.AF_UNIX)
        self._deaf.bind(f"{path}_{PATH_PORT}")
        self._deaf.listen(1)
        self.programs: list[socket.socket] = []
        self.known: dict[int, Known] = {}
        self.answers = 0
        """Replies that the host's callers got, for requests that said they would."""
        self.asked = 0
        self.next_page = 0
        self.next_gpadl = 1000
        self.most_packets = self.most_messages = 0
        """Most that one callback of the loop handled."""
        receive = self.loop.host.server.receive
        self._messages = 0

        def counted(message: wire.Message) -> None:
            self._messages += 1
            receive(message)

        self.loop.host.server.receive = counted  # type: ignore[method-assign]
        self._steps: dict[str, Callable[..., object]] = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }

    def _took(self, sock: socket.socket) -> None:
        self._keep(sock)

    def _keep(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.programs.append(sock)
        if len(self.programs) > MOST_SOCKETS:
            self.programs.pop(0).close()

    def _deliver(self, payload: bytes) -> None:
        message = wire.parse(payload)
        assert message is not None, payload.hex()
        assert not message.kind.to_host, str(message)
        if message.kind.type == wire.OFFERCHANNEL:
            assert message["relid"] not in self.known, f"relid {message['relid']} offered twice"
            self.known[message["relid"]] = Known(message)
        elif message.kind.type == wire.RESCIND_CHANNELOFFER:
            if (one := self.known.get(message["relid"])) is not None:
                one.rescinded = True
        elif message.kind.type == wire.OPENCHANNEL_RESULT:
            if (one := self.known.get(message["relid"])) is not None:
                one.opened = message["status"]
        elif message.kind.type in (wire.VERSION_RESPONSE, wire.UNLOAD_RESPONSE):
            self.known.clear()  # what comes before it is of the connection before

    # Steps.

    def do(self, step: Step) -> None:
        """Take one step."""
        before = self._packets()
        self._steps[step[0]](*step[1:])
        if step[0] == "ask":  # which is served in a turn of its own
            self.most_packets = max(self.most_packets, self._packets() - before)

    def channel(self, index: int) -> Known | None:
        """The channel that `index` means now."""
        found = list(self.known.values())
        return found[index % len(found)] if found else None

    def ring(self, channel: Known) -> None:
        """The channel's doorbell."""
        page = self.loop.host.server.interrupt_page
        if page and channel.connection_id == vmbus.VMBUS_EVENT_CONNECTION_ID:
            at = page + vmbus.SEND_HALF + channel.relid // 8
            self.loop.memory.write(at, bytes([self.loop.memory.read(at, 1)[0] | 1 << channel.relid % 8]))
        self.loop.synic.signal(channel.connection_id)

    def post(self, payload: bytes, *, kind: int = HVMSG_VMBUS, size: int | None = None) -> int:
        """HvPostMessage of these bytes; the status."""
        payload = payload[:240]
        message = hv_post_message_input(1, 0, kind, len(payload) if size is None else min(size, 240))
        message.payload[: len(payload)] = payload
        return self.loop.synic.handlers[1](message)

    def do_contact(self, version: int, packed: int, mutation: Mutation) -> None:
        """INITIATE_CONTACT."""
        page = packed if version >= vmbus.VERSION_WIN10_V5 else INTERRUPT_PAGE
        payload = wire.build(wire.INITIATE_CONTACT, version=version, interrupt_page=page)
        self.post(mutated(payload, mutation))

    def do_marks(self, at: int, data: bytes) -> None:
        """Any bits of the interrupt page, and its doorbell."""
        data = data[: PAGE - at % PAGE]
        self.loop.memory.write(INTERRUPT_PAGE + at % PAGE, data)
        self.loop.synic.signal(vmbus.VMBUS_EVENT_CONNECTION_ID)

    def do_message(self, number: int, index: int, gpadl: int, value: int, mutation: Mutation) -> None:
        """A message whose fields mean something, but for the mutation."""
        channel = self.channel(index)
        relid = index & 0xFFFFFFFF if channel is None else channel.relid
        if not gpadl and channel is not None:
            gpadl = channel.gpadl
        kind = wire.KINDS[number]
        values: dict[str, Any] = {
            "relid": relid,
            "openid": value,
            "gpadl": gpadl,
            "ring_gpadl": gpadl,
            "target_vp": value % 3,
            "downstream_page_offset": value % 9,
            "service_id": abi_hvsock.service_guid(LISTENING + value % 3),
            "endpoint_id": abi_hvsock.service_guid(0xC0000000 + index % 8),
            "range_buflen": 8 * (value % 40),
            "rangecount": value % 4,
        }
        payload = wire.build(number, **{name: values[name] for name in kind.names if name in values})
        self.post(mutated(payload, mutation))
        if number == wire.RELID_RELEASED and channel is not None:
            self.known.pop(channel.relid, None)

    def do_post(self, data: bytes, kind: int, size: int) -> None:
        """Any bytes."""
        self.post(data, kind=kind, size=size)

    def do_gpadl(
        self, index: int, gpadl: int, pages: int, skip: int, mutation: Mutation, step: int = 1
    ) -> None:
        """Describe pages for rings, with a new id for 0.

        `skip` leaves that message out, a mutation goes into the first. With `step` they are
        no neighbours: each `step`th first, then those between.
        """
        channel = self.channel(index)
        if channel is None:
            return
        if not gpadl:
            self.next_gpadl += 1
            gpadl = self.next_gpadl
        first = FIRST_PAGE + self.next_page % PAGES
        self.next_page += pages
        pfns = [FIRST_PAGE + (first - FIRST_PAGE + n) % PAGES for n in range(pages)]
        pfns = [pfn for begin in range(step) for pfn in pfns[begin::step]]
        for pfn in pfns:
            self.loop.memory.zero(pfn * PAGE, PAGE)
        channel.gpadl, channel.pages = gpadl, pfns
        for number, payload in enumerate(gpadl_messages(channel.relid, gpadl, [(pages * PAGE, 0, pfns)])):
            if number != skip:
                self.post(mutated(payload, mutation) if not number else payload)

    def do_open(
        self,
        index: int,
        split: int,
        vp_index: int,
        mutation: Mutation,
        signals: tuple[int, int] | None = None,
    ) -> None:
        """OPENCHANNEL on what was described last; `signals`: connection id and event flag of the guest's."""
        channel = self.channel(index)
        if channel is None:
            return
        channel.out_pages, channel.opened = split, None
        payload = wire.build(
            wire.OPENCHANNEL,
            relid=channel.relid,
            openid=7,
            ring_gpadl=channel.gpadl,
            target_vp=vp_index,
            downstream_page_offset=split,
            **({} if signals is None else {"connection_id": signals[0], "event_flag": signals[1]}),
        )
        self.post(mutated(payload, mutation))

    def _rings(self, channel: Known | None) -> tuple[RingWriter, RingReader] | None:
        if channel is None or not 2 <= channel.out_pages <= len(channel.pages) - 2:
            return None
        memory, pages = self.loop.memory, channel.pages
        return RingWriter(memory, pages[: channel.out_pages]), RingReader(memory, pages[channel.out_pages :])

    def do_packet(self, index: int, kind: int, data: bytes, trans_id: int, flags: int, ring: bool) -> None:
        """A packet that is framed well, whatever it says."""
        channel = self.channel(index)
        rings = self._rings(channel)
        if rings is None or channel is None or not rings[0].fits(len(data)):
            return
        rings[0].put(kind, data, trans_id=trans_id, flags=flags)
        rings[0].flush()
        if ring:
            self.ring(channel)

    def do_burst(self, index: int, count: int, data: bytes) -> None:
        """Many packets, one doorbell."""
        for _ in range(count):
            self.do_packet(index, 6, data, 0, 0, False)
        self.do_ring(index)

    def do_word(self, index: int, to_host: bool, word: int, value: int) -> None:
        """Write a control word of a ring."""
        rings = self._rings(self.channel(index))
        if rings is not None:
            rings[0 if to_host else 1].words[word] = value & 0xFFFFFFFF

    def do_scribble(self, page: int, at: int, data: bytes) -> None:
        """Write anywhere in the pages of rings."""
        self.loop.memory.write((FIRST_PAGE + page % PAGES) * PAGE + at % (PAGE - 64), data[:64])

    def do_ring(self, index: int) -> None:
        """HvSignalEvent."""
        if (channel := self.channel(index)) is not None:
            self.ring(channel)

    def do_serve(self, index: int, status: int, count: int, choice: int, mutation: Mutation) -> None:
        """Read up to `count` packets of the host and answer as a driver does, but for the mutation."""
        channel = self.channel(index)
        rings = self._rings(channel)
        if rings is None or channel is None:
            return
        writer, reader = rings
        requests: list[Packet] = []
        while len(requests) < count and (packet := reader.get()) is not None:
            requests.append(packet)
        reader.publish()
        for packet in requests:
            answer = mutated(self._answer(packet.payload, status, choice), mutation)
            if writer.fits(len(answer)):
                writer.put(6, answer, trans_id=packet.trans_id)
        writer.flush()
        self.ring(channel)

    def _answer(self, payload: bytes, status: int, choice: int) -> bytes:
        if len(payload) < ic.ICMSG_HDR + 8:
            return payload
        changed = bytearray(payload)
        changed[20:24] = pack("<I", status & 0xFFFFFFFF)
        changed[25] = ic.ICMSGHDRFLAG_TRANSACTION | ic.ICMSGHDRFLAG_RESPONSE
        if unpack_from("<H", payload, 12)[0] == ic.ICMSGTYPE_NEGOTIATE:
            frames, messages = unpack_from("<HH", payload, 28)
            if 36 + 4 * (frames + messages) <= len(payload) and messages:
                version = payload[36 + 4 * (frames + choice % messages) :][:4]
                changed[28:44] = pack("<HHIHH", 1, 1, 0, 3, 0) + version
        return bytes(changed)

    # The host's programs and people.

    def _heard(self, *_: object) -> None:
        self.answers += 1

    def do_ask(self, what: str, value: int) -> None:
        """Something that `hvkvm ctl` can ask."""
        heard, before = self._heard, self.answers
        pool = value % (kvp.KVP_POOL_COUNT + 1)
        match what:
            case "get":
                self.kvp.get(pool, "OSName", heard)
            case "get_directly":
                self.kvp.get_directly(pool, "OSName", heard)
            case "set":
                self.kvp.set(pool, "k" * (value % 300), "v" * (value % 1100), heard)
            case "delete":
                self.kvp.delete(pool, "k", heard)
            case "enumerate":
                self.kvp.enumerate(pool, heard)
            case "ip":
                self.kvp.ip_info(None if value % 2 else "AA:BB:CC:DD:EE:FF", heard)
            case "set_ip":
                self.kvp.set_ip_info(kvp.IpInfo("{GUID}"), heard)
            case "check":
                self.vss.check(heard)
            case "freeze":
                self.vss.freeze(heard)
            case "thaw":
                self.vss.thaw(heard)
            case "sync":
                self.asked += self.timesync.sync(heard)
                return
            case "shutdown":
                self.asked += self.shutdown.request("hibernate", heard)
                return
            case "type":
                self.asked += self.keyboard.type("Hello" * (value % 900 + 1), heard)
                return
        assert self.answers - before in (0, 1)
        self.asked += 1

    def do_call(self, port: int, data: bytes) -> None:
        """A program of this process calls the guest."""
        try:
            sock = self.vsock.connect(port)
        except OSError:
            return  # the program's own to hear
        self._keep(sock)
        sock.send(data)

    def do_caller(self, line: bytes) -> None:
        """A program connects to the vsock's path."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        self._keep(sock)
        sock.send(line)

    def do_program(self, index: int, what: str, count: int) -> None:
        """A program sends, reads, shuts down or leaves."""
        if not self.programs:
            return
        sock = self.programs[index % len(self.programs)]
        try:
            match what:
                case "send":
                    sock.send(bytes(count), socket.MSG_NOSIGNAL)
                case "read":
                    sock.recv(count + 1)
                case "shut":
                    sock.shutdown(socket.SHUT_WR)
                case "close":
                    self.programs.remove(sock)
                    sock.close()
        except OSError:
            return

    def do_storm(self, count: int, port: int) -> None:
        """Many programs of the guest connect at once."""
        for number in range(count):
            self.post(
                wire.build(
                    wire.TL_CONNECT_REQUEST,
                    endpoint_id=abi_hvsock.service_guid(0xC0000000 + number),
                    service_id=abi_hvsock.service_guid(port),
                )
            )

    def do_fault(self, name: int, number: int, times: int) -> None:
        """Let host calls fail from now on."""
        self.faults.arm(NAMES[name % len(NAMES)], ERRNOS[number % len(ERRNOS)], times)

    def do_page(self, on: bool) -> None:
        """Switch the message page."""
        self.loop.synic.message_page = on

    def do_reset(self) -> None:
        """The machine is reset."""
        self.known.clear()
        self.loop.host.reset()

    def do_wait(self, seconds: float) -> None:
        """Let time pass."""
        self.io.advance(seconds)
        self.loop.advance(seconds)

    def do_order(self, seed: int) -> None:
        """What is queued happens in an order of its own from now on, in the usual one for 0."""
        self.loop.random = Random(seed) if seed else None

    def do_turns(self, count: int) -> None:
        """Let up to `count` things happen on the I/O loop, and what sockets have to say."""
        for _ in range(count):
            if not self.turn():
                return

    def turn(self) -> bool:
        """One of them; False if there is none."""
        before, self._messages = self._packets(), 0
        moved = self.loop.step() or self.io.poll()
        self.most_packets = max(self.most_packets, self._packets() - before)
        self.most_messages = max(self.most_messages, self._messages)
        return moved

    def _packets(self) -> int:
        return sum(
            opened.io.reader.packets + opened.io.writer.packets
            for opened in self.loop.host.devices._open.values()
        )

    def rest(self, limit: int = 20_000) -> None:
        """Until nothing is left. AssertionError if it never ends."""
        for _ in range(limit):
            if not self.turn():
                return
        raise AssertionError(f"the host is not at rest after {limit} turns")

    def settle(self) -> None:
        """As at power-on, as far as a reset, time and the leaving of programs bring it there."""
        self.faults.clear()
        self.do_page(True)
        self.do_order(0)
        while self.programs:
            self.programs.pop().close()
        self.do_reset()
        self.do_wait(60.0)
        self.rest()
        while self.programs:
            self.programs.pop().close()
        self.rest()
        self.next_page = 0
        for mapping in self.loop.memory._maps:
            mapping._prune()  # it forgets views that are gone now and then; here, each time
        synic = self.loop.synic
        for recorded in (synic.flags_set, synic.rung, self.loop.notes.events):
            recorded.clear()

    # Afterwards: a guest that behaves is served by every device.

    def recover(self) -> None:
        """Connect anew and use every device as a driver does. AssertionError for what does not answer."""
        self.faults.clear()
        self.do_page(True)
        self.do_order(0)
        self.rest()
        self.do_contact(vmbus.VERSION_WIN10_V5_3, 2, AS_IT_IS)
        self.rest()
        self.do_message(wire.REQUESTOFFERS, 0, 0, 0, AS_IT_IS)
        self.rest()
        self.next_page = 0
        for device in (*self.components, self.keyboard):
            index = next(
                (n for n, one in enumerate(self.known.values()) if one.interface == device.INTERFACE), None
            )
            assert index is not None, f"{device.NAME} is not offered"
            channel = self.channel(index)
            assert channel is not None
            self.do_gpadl(index, 100 + index, 8, -1, AS_IT_IS)
            self.do_open(index, 4, 0, AS_IT_IS)
            self.rest()
            assert channel.opened == 0, f"{device.NAME} does not open: {channel.opened}"
            if device is self.keyboard:
                request = keyboard.protocol_request.pack(
                    keyboard.SYNTH_KBD_PROTOCOL_REQUEST, keyboard.SYNTH_KBD_VERSION
                )
                self.do_packet(index, 6, request, 1, 0, True)
            for _ in range(100):
                self.rest()
                self.do_serve(index, 0, 1, -1, AS_IT_IS)
            self.rest()
            assert device.ready_for_requests, f"{device.NAME} does not answer"
        assert self.heartbeat.beats, "no heartbeat"
        self._recover_vsock()
        assert self.answers == self.asked, f"{self.asked} asked, {self.answers} told"

    def _recover_vsock(self) -> None:
        before = set(self.known)
        while self.programs:
            self.programs.pop().close()
        self.do_wait(60.0)
        self.rest()
        self.do_storm(1, LISTENING)
        self.rest()
        came = [n for n, relid in enumerate(self.known) if relid not in before]
        assert len(came) == 1, "a connect to the host is not offered"
        self.do_gpadl(came[0], 200, 12, -1, AS_IT_IS)
        self.do_open(came[0], 6, 0, AS_IT_IS)
        self.rest()
        assert len(self.programs) == 1, "nobody took the connect"
        data = b"as it should be!"
        self.do_packet(came[0], 6, abi_hvsock.pipe_header.pack(1, len(data)) + data, 0, 0, True)
        self.rest()
        assert self.programs[0].recv(100) == data

    def close(self) -> None:
        """End everything."""
        self.vsock.close()
        self._deaf.close()
        Path(f"{self.path}_{PATH_PORT}").unlink()
        for sock in self.programs:
            sock.close()
        self.loop.close()
        self.faults.close()
