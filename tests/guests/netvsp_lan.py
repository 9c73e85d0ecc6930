"""A NIC with a scripted wire and a driver, in one process. One thread."""

from __future__ import annotations

from random import Random
from typing import Any

from saved_bus import swap

from hvkvm.devices.synth.netvsp import Netvsp
from hvkvm.testing.netvsc_driver import NetvscDriver
from hvkvm.testing.scripted_port import ScriptedPort
from hvkvm.testing.vmbus_loopback import Loopback

ADDRESS = bytes.fromhex("020304050607")


class Lan:
    """The loopback, the NIC on it, its wire, and the driver."""

    def __init__(
        self, random: Random | None = None, queues: int = 1, keep: bool = False, **port: Any
    ) -> None:
        """`keep`: completions may be kept back; where the order is left to `random`, they may."""
        self.loop = Loopback(random=random, pages=list(range(64, 1020)), vp_count=2)
        self.port = ScriptedPort(self.loop.call_soon, **port)
        self.queues = queues
        self.later = self.loop.call_later if keep or random is not None else None
        self.nic = self.make()
        self.loop.host.add(self.nic)
        self.port.start()
        self.driver = NetvscDriver(self.loop)

    def make(self) -> Netvsp:
        """A NIC on the wire, not on the bus yet."""
        nic = Netvsp(
            self.loop.memory,
            self.port,
            name="net0",
            address=ADDRESS,
            queues=self.queues,
            later=self.later,
        )
        self.port.attach(nic)
        return nic

    def go_on_with_another(self) -> None:
        """Save, and have another host and NIC go on. What the wire had is lost."""
        self.port.waiting.clear()
        self.nic = self.make()
        swap(self.loop, [self.nic])
        self.port.start()

    @property
    def complaints(self) -> dict[str, int]:
        """What the host says of the guest."""
        return self.loop.host.server.reports.counts

    def inject(self, *frames: bytes, **options: Any) -> list[tuple[bytes, dict[int, int]]]:
        """Frames for the guest; what it got."""
        before = len(self.driver.received)
        self.port.inject(*frames, **options)
        self.loop.run()
        return self.driver.received[before:]
