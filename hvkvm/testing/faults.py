"""Faults on a channel's way to the guest: packets that are lost, late, doubled, out of order or changed.

Rules apply in the order in which they were made, each to so many packets; what no
rule takes goes its way. Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hvkvm.abi.ring import VM_PKT_DATA_INBAND


class Outgoing(NamedTuple):
    """A packet for the guest, not yet in the ring."""

    payload: bytes
    kind: int = VM_PKT_DATA_INBAND
    trans_id: int = 0
    flags: int = 0
    header: bytes = b""


Deliver = Callable[[Outgoing], object]
Later = Callable[..., object]
Change = Callable[[bytes], bytes]


def flip_first_bit(payload: bytes) -> bytes:
    """The change of those who do not care which."""
    return bytes([payload[0] ^ 1]) + payload[1:] if payload else payload


class _Rule:
    """One fault, for `left` more packets."""

    def __init__(self, left: int, act: Callable[[Outgoing], object]) -> None:
        self.left = left
        self.act = act


class Faults:
    """The rules of one channel. `deliver(packet)` puts it into the ring, `later(s, fn, *args)` waits."""

    def __init__(self, deliver: Deliver, later: Later) -> None:
        self._deliver = deliver
        self._later = later
        self._rules: list[_Rule] = []
        self._held: list[Outgoing] = []
        self._stalled = False
        self._waiting: list[Outgoing] = []

    @property
    def stalled(self) -> bool:
        """Whether nothing goes either way."""
        return self._stalled

    def drop(self, count: int = 1) -> None:
        """Lose the next `count` packets."""
        self._rules.append(_Rule(count, lambda packet: None))

    def duplicate(self, count: int = 1) -> None:
        """Send each of the next `count` packets twice."""

        def twice(packet: Outgoing) -> None:
            self._deliver(packet)
            self._deliver(packet)

        self._rules.append(_Rule(count, twice))

    def delay(self, seconds: float, count: int = 1) -> None:
        """Send each of the next `count` packets so much later; those behind them overtake."""
        self._rules.append(_Rule(count, lambda packet: self._later(seconds, self._deliver, packet)))

    def reorder(self, count: int = 2) -> None:
        """Keep the next `count` packets until the last has come, and send them in reverse."""

        def hold(packet: Outgoing) -> None:
            self._held.append(packet)
            if len(self._held) == count:
                held, self._held = self._held, []
                for one in reversed(held):
                    self._deliver(one)

        self._rules.append(_Rule(count, hold))

    def corrupt(self, change: Change = flip_first_bit, count: int = 1) -> None:
        """Send `change(payload)` in place of each of the next `count` payloads."""
        self._rules.append(
            _Rule(count, lambda packet: self._deliver(packet._replace(payload=change(packet.payload))))
        )

    def stall(self) -> None:
        """Send nothing until `resume`: what is sent waits."""
        self._stalled = True

    def resume(self) -> None:
        """Send what has waited, and go on."""
        self._stalled = False
        waiting, self._waiting = self._waiting, []
        for packet in waiting:
            self.send(packet)

    def clear(self) -> None:
        """Forget all rules and what they keep."""
        self._rules.clear()
        self._held.clear()
        self._waiting.clear()
        self._stalled = False

    def send(self, packet: Outgoing) -> None:
        """Send a packet as the rules have it."""
        if self._stalled:
            self._waiting.append(packet)
            return
        if not self._rules:
            self._deliver(packet)
            return
        rule = self._rules[0]
        rule.left -= 1
        if rule.left <= 0:
            del self._rules[0]
        rule.act(packet)
