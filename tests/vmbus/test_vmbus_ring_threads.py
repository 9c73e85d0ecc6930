"""Both ends of a channel on threads of their own, as guest and host are: no packet and no wake-up is lost."""

from __future__ import annotations

import threading

import pytest

from hvkvm.abi.ring import Packet
from hvkvm.memory.guest import GuestMemory
from hvkvm.testing.vmbus_loopback import NoSlots
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.ring_reader import RingReader
from hvkvm.vmbus.ring_writer import RingWriter

STUCK_SECONDS = 100
PACKETS = 2000


class End(threading.Thread):
    """One end: wakes when it is rung, drains, sends what fits, and is done when all has come and gone."""

    def __init__(self, memory: GuestMemory, incoming: list[int], outgoing: list[int], to_send: int) -> None:
        super().__init__(daemon=True)
        self.bell = threading.Event()
        self.bell.set()
        self.peer: End | None = None
        self.left = to_send
        self.number = 0
        self.got: list[int] = []
        self.stuck = False
        self.io = ChannelIo(
            RingReader(memory, incoming),
            RingWriter(memory, outgoing),
            self._ring,
            lambda reason: None,
            self.bell.set,
        )

    def _ring(self) -> None:
        assert self.peer is not None
        self.peer.bell.set()

    def _received(self, packet: Packet) -> None:
        self.got.append(packet.trans_id)

    def run(self) -> None:
        while self.left or len(self.got) < PACKETS:
            if not self.bell.wait(STUCK_SECONDS):
                self.stuck = True
                return
            self.bell.clear()
            self.io.drain(self._received, budget=7)
            with self.io:
                while self.left and self.io.send(bytes(8 * (self.number % 60)), trans_id=self.number):
                    self.left -= 1
                    self.number += 1


@pytest.mark.parametrize("repeat", range(3))
@pytest.mark.usefixtures("tiny_switch_interval")
def test_nobody_sleeps_for_ever(repeat: int) -> None:
    with GuestMemory(NoSlots(), 1 << 20) as memory:
        guest = End(memory, [1, 2], [8, 5], PACKETS)
        host = End(memory, [8, 5], [1, 2], PACKETS)
        guest.peer, host.peer = host, guest
        guest.start()
        host.start()
        guest.join()
        host.join()
        assert not guest.stuck, guest.io.reader.snapshot()
        assert not host.stuck, host.io.reader.snapshot()
        assert guest.got == host.got == list(range(PACKETS))
        del guest, host
