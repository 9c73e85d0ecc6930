"""Many members that share one turn of the I/O loop at a time, in rotation.

Why: a device whose connections a guest or a host program can multiply would
have a turn for each of them in every round of the loop. Members of a rotation
wait in one line instead, each at most once, and the line has one turn a round:
as many members as fit into its budget of work, at least one. So other devices
wait for one turn, whatever the number of members. Who is the first to ask in a
round, while nobody waits, has its turn at once: that is the usual case, and
spares it the way through the loop's queue.

Owner: the I/O loop.
"""

from __future__ import annotations

from typing import Protocol

from hvkvm.runtime.protocols import Rounds


class Member(Protocol):
    """Who waits for a turn; hashable by identity."""

    def turn(self) -> int:
        """Do some work, of bounded size, and say how much it was, in the rotation's units."""
        ...


class Rotation:
    """The line. A turn ends once `budget` units of work are done."""

    __slots__ = ("_asked", "_budget", "_line", "_loop", "_served")

    def __init__(self, loop: Rounds, budget: int) -> None:
        self._loop = loop
        self._budget = budget
        self._served = -1  # the round in which somebody had a turn at once
        self._line: dict[Member, None] = {}
        self._asked = False

    def ask(self, member: Member) -> None:
        """Give `member` a turn, now or behind those who wait already. Stopped after the loop's end."""
        number = self._loop.rounds
        if not self._line and self._served != number:
            self._served = number
            member.turn()
            return
        self._line[member] = None
        if not self._asked:
            self._loop.call_soon(self._turn)
            self._asked = True

    def forget(self, member: Member) -> None:
        """It needs none any more. Idempotent."""
        self._line.pop(member, None)

    def _turn(self) -> None:
        self._asked = False
        line, done = self._line, 0
        try:
            while line and done < self._budget:
                member = next(iter(line))
                del line[member]
                done += member.turn()
        finally:
            if line and not self._asked:
                self._loop.call_soon(self._turn)
                self._asked = True

    def __len__(self) -> int:
        return len(self._line)
