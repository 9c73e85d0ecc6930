"""Requests out of a device's queues, a bounded number a turn.

Owner: whoever holds the transport's lock. Nothing here raises for guest bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from hvkvm.devices.pci.virtio.ring import Broken, Chain, Ring
from hvkvm.tuples import NamedTuple

BUDGET = 64
"""Requests taken in one turn."""
SEGMENTS = 1024
"""Buffers of the requests taken in one turn, give or take one request."""


class Taken(NamedTuple):
    """What one turn has taken."""

    taken: list[tuple[int, Chain]]
    """By the queue's index."""
    more: bool
    """Whether another turn is due without anybody asking."""
    broken: str = ""
    """How the driver broke the rules; empty if it did not."""


def take_chains(rings: Mapping[int, Ring], first: int, room: int) -> Taken:
    """Requests of all queues in rotation, the `first` one of them first, up to `room`."""
    taken: list[tuple[int, Chain]] = []
    queues = sorted(rings)
    segments = 0
    for at in range(len(queues)):
        index = queues[(first + at) % len(queues)]
        ring = rings[index]
        try:
            while True:
                if len(taken) >= BUDGET or segments >= SEGMENTS:
                    return Taken(taken, True)
                if len(taken) >= room:
                    return Taken(taken, False)  # an answer asks for the next turn
                chain = ring.take()
                if chain is None:
                    if ring.more():
                        continue
                    break
                segments += 1 + chain.pieces
                taken.append((index, chain))
        except Broken as error:
            return Taken(taken, False, str(error))
    return Taken(taken, False)
