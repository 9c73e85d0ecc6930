"""Random sequences of steps for `fuzz_bus`: valid ones mostly, or nothing of interest would be reached.

The same seed makes the same sequence.
"""

from __future__ import annotations

from random import Random
from typing import Any

from fuzz_bus import AS_IT_IS, LISTENING, PATH_PORT, Mutation, Step
from fuzz_faults import ERRNOS, NAMES

from hvkvm.abi import hvsock, ic, keyboard, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import HVMSG_VMBUS

ODD = (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 0x7F, 0x80, 0xFF, 0x100, 511, 512, 4088, 4096, 4104, 0x7FFF, 0x8000)
LARGE = (0xFFF8, 0xFFFF, 0x10000, 0xFFFFFF, 0x1000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFF)
WORDS = ODD + LARGE
VERSIONS = (*vmbus.HOST_VERSIONS, vmbus.VERSION_WIN10_V5_3, vmbus.VERSION_WIN10_V5_3, 7)
TO_HOST = [number for number, kind in wire.KINDS.items() if kind.to_host]
RING_PAGES = (2, 2, 3, 4, 6, 9, 40)
"""Pages of a ring, its control page among them; 1 is a ring without data."""
KEYBOARD_REQUEST = keyboard.protocol_request.pack(
    keyboard.SYNTH_KBD_PROTOCOL_REQUEST, keyboard.SYNTH_KBD_VERSION
)
ASKED = (
    "get",
    "get_directly",
    "set",
    "delete",
    "enumerate",
    "ip",
    "set_ip",
    "check",
    "freeze",
    "thaw",
    "sync",
    "shutdown",
    "type",
)
STATUSES = (0, 0, 0, ic.HV_E_FAIL, ic.HV_S_CONT, 1, 0xFFFFFFFF)


class Steps:
    """Makes steps from `random`."""

    def __init__(self, random: Random) -> None:
        self.random = random
        makers: dict[Any, int] = {
            self._connect: 3,
            self._message: 8,
            self._post: 1,
            self._open: 14,
            self._stream: 4,
            self._packet: 10,
            self._burst: 2,
            self._word: 4,
            self._scribble: 3,
            self._ring: 4,
            self._serve: 24,
            self._ask: 6,
            self._converse: 10,
            self._flood: 2,
            self._call: 4,
            self._program: 8,
            self._storm: 2,
            self._churn: 1,
            self._fault: 4,
            self._page: 1,
            self._marks: 2,
            self._reset: 1,
            self._wait: 6,
            self._turns: 20,
            self._change: 6,
        }
        self._makers, self._weights = list(makers), list(makers.values())

    def sequence(self, length: int) -> list[Step]:
        """At least `length` steps, behind those that connect and open some channels."""
        order = self.random.choice((0, self.random.randrange(1 << 16)))
        steps: list[Step] = [("order", order), *self._good_connect(), ("turns", 200), *self._warm()]
        length += len(steps)
        while len(steps) < length:
            (maker,) = self.random.choices(self._makers, self._weights)
            steps += maker()
            if self.random.random() < 0.02:  # what grows a little each time
                steps += steps[-self.random.randrange(1, 6) :] * self.random.choice((3, 10, 30))
        return steps

    # Values.

    def _index(self) -> int:
        return self.random.choice((*range(7), -1, -1, -2))  # the last ones are streams

    def _word_value(self) -> int:
        random = self.random
        return random.choice((random.choice(ODD), random.choice(WORDS), random.getrandbits(32)))

    def _data(self) -> bytes:
        random = self.random
        return random.randbytes(random.choice((0, 1, 8, 16, 28, 60, 300, random.randrange(9000))))

    def _mutation(self, odds: float = 0.3) -> Mutation:
        random = self.random
        if random.random() > odds:
            return AS_IT_IS
        length = random.choice((None, None, random.choice(ODD[:14]), random.randrange(260)))
        patches = []
        for _ in range(random.randrange(4)):
            size = random.choice((1, 2, 4, 8))
            value = random.choice((self._word_value(), random.getrandbits(64))) & (1 << 8 * size) - 1
            patches.append((random.choice((random.randrange(48), random.randrange(300))), value))
            patches[-1] = (patches[-1][0], value.to_bytes(size, "little"))  # type: ignore[assignment]
        return length, tuple(patches)  # type: ignore[arg-type]

    # Steps.

    def _good_connect(self) -> list[Step]:
        old = self.random.random() < 0.15
        version = self.random.choice(vmbus.HOST_VERSIONS[:2] if old else VERSIONS[5:-1])
        return [
            ("contact", version, 2 | self.random.getrandbits(5) << 32, AS_IT_IS),
            ("message", wire.REQUESTOFFERS, 0, 0, 0, AS_IT_IS),
        ]

    def _connect(self) -> list[Step]:
        if self.random.random() < 0.6:
            return self._good_connect()
        packed = self.random.choice((2, self._word_value(), self.random.getrandbits(64)))
        return [("contact", self.random.choice(VERSIONS), packed, self._mutation())]

    def _message(self) -> list[Step]:
        number = self.random.choice(TO_HOST)
        if number in (wire.UNLOAD, wire.INITIATE_CONTACT) and self.random.random() < 0.8:
            number = wire.GPADL_HEADER
        return [("message", number, self._index(), self._gpadl(), self._word_value(), self._mutation(0.5))]

    def _change(self) -> list[Step]:
        gpadl = self.random.choice((0, 0, self._gpadl()))
        kinds = (
            wire.CLOSECHANNEL,
            wire.GPADL_TEARDOWN,
            wire.RELID_RELEASED,
            wire.MODIFYCHANNEL,
            wire.REQUESTOFFERS,
        )
        number = self.random.choice(kinds)
        return [("message", number, self._index(), gpadl, self.random.randrange(4), AS_IT_IS)]

    def _post(self) -> list[Step]:
        kind = self.random.choice((HVMSG_VMBUS, HVMSG_VMBUS, self._word_value() | 1))
        return [("post", self._data()[:240], kind, self.random.choice((0, 8, 240, 255)))]

    def _gpadl(self) -> int:
        return self.random.choice((*range(1, 9), self._word_value()))

    def _warm(self) -> list[Step]:
        """Most devices open, on rings of any size, and most of them asked already."""
        steps: list[Step] = []
        for index in range(6):
            if self.random.random() < 0.7:
                pages = self.random.choice(RING_PAGES[1:])
                steps += [
                    ("gpadl", index, 0, 4 + pages, -1, AS_IT_IS, self.random.choice((1, 2))),
                    ("open", index, 4, self.random.randrange(2), AS_IT_IS),
                    ("turns", 50),
                    ("packet", index, 6, KEYBOARD_REQUEST, 1, 1, True),
                    ("turns", 20),
                ]
                steps += [("serve", index, 0, 1, -1, AS_IT_IS), ("turns", 20)] * self.random.randrange(4)
        if self.random.random() < 0.5:
            steps += self._stream()
        return steps

    def _stream(self) -> list[Step]:
        """A stream in either direction."""
        begin = self.random.choice((("storm", 1, LISTENING), ("call", 5, b"hello")))
        pages = self.random.choice(RING_PAGES)
        return [
            begin,
            ("turns", 30),
            ("gpadl", -1, 0, 6 + pages, -1, AS_IT_IS, self.random.choice((1, 2))),
            ("open", -1, 6, 0, AS_IT_IS),
            ("turns", 30),
            ("packet", -1, 6, self._stream_packet(), 0, 0, True),
            ("turns", 30),
        ]

    def _open(self) -> list[Step]:
        """Mostly to the point of an open channel."""
        random, index = self.random, self._index()
        gpadl = 0 if random.random() < 0.8 else self._gpadl()
        out, into = random.choice(RING_PAGES), random.choice(RING_PAGES)
        if random.random() < 0.1:
            out = random.choice((0, 1, into, 200))
        skip = random.choice((-1, -1, -1, -1, 0, 1))
        signals = random.choice(
            (
                None,
                (0x3000 + index % 8, random.randrange(2049)),
                (self._word_value(), self._word_value() & 0xFFFF),
            )
        )
        steps: list[Step] = [
            ("gpadl", index, gpadl, max(1, out + into), skip, self._mutation(0.1), random.choice((1, 2, 3))),
            ("open", index, out, random.choice((0, 0, 1, 2, vmbus.VP_INVALID)), self._mutation(0.1), signals),
            ("turns", random.choice((0, 3, 50))),
        ]
        for _ in range(random.choice((0, 1, 1, 2))):
            steps += [("serve", index, 0, 3, -1, AS_IT_IS), ("turns", 20)]
        return steps

    def _packet(self) -> list[Step]:
        random = self.random
        made = random.choice(
            (
                self._data(),
                keyboard.protocol_request.pack(
                    keyboard.SYNTH_KBD_PROTOCOL_REQUEST,
                    random.choice((keyboard.SYNTH_KBD_VERSION, keyboard.SYNTH_KBD_VERSION, 7)),
                ),
                keyboard.led_indicators.pack(keyboard.SYNTH_KBD_LED_INDICATORS, self._word_value() & 0xFFFF),
                self._stream_packet(),
                self._stream_packet(),
                ic.build(random.randrange(7), self._data()[:200], transaction=random.randrange(4)),
            )
        )
        kind = random.choice((6, 6, 6, 6, 7, 8, 9, 10, 11, 0, 0xFFFF))
        trans_id = random.choice((0, 1, 2, 2**64 - 1))
        return [("packet", self._index(), kind, made, trans_id, random.choice((0, 1)), random.random() < 0.8)]

    def _stream_packet(self) -> bytes:
        random = self.random
        data = self._data()
        length = random.choice((len(data), len(data), len(data), 0, self._word_value()))
        return hvsock.pipe_header.pack(random.choice((1, 1, 1, 1, 0, 2)), length) + data

    def _burst(self) -> list[Step]:
        data = self.random.choice((self._stream_packet()[:2000], b"", bytes(32)))
        return [("burst", self._index(), self.random.choice((3, 40, 400)), data)]

    def _word(self) -> list[Step]:
        word = self.random.choice((0, 0, 1, 1, 2, 3, 3, 16))
        return [("word", self._index(), self.random.random() < 0.5, word, self._word_value())]

    def _scribble(self) -> list[Step]:
        data = self._data()[:64] or b"\xff" * 16
        at = self.random.choice((0, 0, self.random.randrange(4096)))
        return [("scribble", self.random.randrange(200), at, data)]

    def _ring(self) -> list[Step]:
        return [("ring", self._index())]

    def _serve(self) -> list[Step]:
        random = self.random
        choice = random.choice((-1, -1, 0, 1, 2))
        mutation = self._mutation(0.15)
        return [
            ("serve", self._index(), random.choice(STATUSES), random.choice((1, 3)), choice, mutation),
            ("turns", random.choice((0, 2, 30))),
        ]

    def _ask(self) -> list[Step]:
        return [("ask", self.random.choice(ASKED), self.random.randrange(1200))]

    def _converse(self) -> list[Step]:
        """Something is asked, and the driver answers it, well or badly."""
        what = self.random.choice(ASKED)
        index = {"sync": 2, "check": 4, "freeze": 4, "thaw": 4, "shutdown": 1, "type": 5}.get(what, 3)
        steps: list[Step] = [("ask", what, self.random.randrange(1200)), ("turns", 5)]
        for _ in range(self.random.randrange(1, 4)):
            steps += [
                ("serve", index, self.random.choice(STATUSES), 2, -1, self._mutation(0.3)),
                ("turns", 9),
            ]
        return steps

    def _flood(self) -> list[Step]:
        """More than a program reads, or than a guest does."""
        data = hvsock.pipe_header.pack(1, 4000) + bytes(4000)
        one: list[Step] = [("burst", -1, 40, data), ("turns", 20)]
        other: list[Step] = [("program", self._index(), "send", 200_000), ("turns", 20), ("ring", -1)]
        return self.random.choice((one, other, one + other)) * self.random.choice((3, 12))

    def _call(self) -> list[Step]:
        random = self.random
        port = random.choice((5, 6, self._word_value()))
        if random.random() < 0.5:
            return [("call", port, self._data())]
        line = random.choice((b"CONNECT %d\n" % port, b"CONNECT 5\nmore", self._data()[:40]))
        return [("caller", line)]

    def _program(self) -> list[Step]:
        what = self.random.choice(("send", "send", "read", "read", "shut", "close"))
        return [("program", self._index(), what, self.random.choice((0, 10, 5000, 200_000)))]

    def _storm(self) -> list[Step]:
        return [
            ("storm", self.random.choice((1, 3, 70, 300)), self.random.choice((LISTENING, PATH_PORT, 11)))
        ]

    def _churn(self) -> list[Step]:
        """Much is begun, and left for a new connection."""
        begun = self.random.choice((self._storm, self._storm, self._open, self._ask, self._call))
        round_: list[Step] = [*self._good_connect(), ("turns", 200)]
        for _ in range(self.random.choice((1, 4))):
            round_ += begun()
        return [*round_, ("turns", 300)] * self.random.choice((2, 5))

    def _fault(self) -> list[Step]:
        random = self.random
        times = random.choice((1, 1, 2, 5, 50))
        return [("fault", random.randrange(len(NAMES)), random.randrange(len(ERRNOS)), times)]

    def _page(self) -> list[Step]:
        return [("page", False), *self._turns(), ("page", True)]

    def _marks(self) -> list[Step]:
        at = self.random.choice((0, vmbus.SEND_HALF, vmbus.SEND_HALF + 256, self.random.randrange(4096)))
        return [("marks", at, self.random.choice((b"\xff" * 300, b"\x7e", self._data()[:300])))]

    def _reset(self) -> list[Step]:
        return [("reset",), *self._good_connect()]

    def _wait(self) -> list[Step]:
        return [("wait", self.random.choice((0.001, 0.06, 2.1, 6.0, 40.0)))]

    def _turns(self) -> list[Step]:
        return [("turns", self.random.choice((1, 3, 20, 300)))]
