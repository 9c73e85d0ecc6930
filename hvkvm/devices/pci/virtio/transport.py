"""A virtio device on PCI: its registers, its queues, and the turns in which requests are taken and answered.

vCPU threads write registers under `_lock`; a notification asks for one turn of the I/O loop, which takes
requests and answers them. A queue that has been enabled rings by an ioeventfd, without an exit.

Reset (device_status = 0) is done at once where no request is in flight, since firmware does not wait for it;
else status reads as it was until the last worker has let go of guest memory. So no completion of a life
before a reset meets a queue of the next one.

`_lock` is for registers, queues and counts; the interrupts have locks of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from hvkvm.abi import virtio
from hvkvm.devices.pci import msix
from hvkvm.devices.pci.bell import BellMaker
from hvkvm.devices.pci.function import Bar, Function
from hvkvm.devices.pci.virtio import function as places
from hvkvm.devices.pci.virtio import saved
from hvkvm.devices.pci.virtio.bells import Bells
from hvkvm.devices.pci.virtio.device import Device
from hvkvm.devices.pci.virtio.function import VirtioFunction
from hvkvm.devices.pci.virtio.intake import take_chains
from hvkvm.devices.pci.virtio.interrupts import Interrupts
from hvkvm.devices.pci.virtio.registers import SIZE, Registers
from hvkvm.devices.pci.virtio.ring import Chain, Memory, Place, Ring
from hvkvm.devices.pci.virtio.saved import VirtioState
from hvkvm.devices.turn import Turn
from hvkvm.errors import GuestMemoryError
from hvkvm.runtime.guard import Guard, call_all
from hvkvm.runtime.protocols import Deferrer

MAX_IN_FLIGHT = 256
"""Requests of one device that may be unanswered."""


_FEATURES = (
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_RING_F_EVENT_IDX
    | 1 << virtio.VIRTIO_RING_F_INDIRECT_DESC
)


class Transport:
    """`device` in a slot. Made before the vCPUs run; it is stopped then. A `PciDevice`."""

    reads_when_failed = 0
    """device_status of a device that was reset: Linux waits for that without end when it powers off."""

    def __init__(
        self,
        memory: Memory,
        device: Device,
        io: Deferrer,
        router: msix.MsiRouter,
        *,
        make_bell: BellMaker | None = None,
        name: str = "virtio",
    ) -> None:
        self.name = name
        self.guard = Guard()
        self.device = device
        queues = len(device.queue_sizes)
        function = VirtioFunction(device.kind, device.class_code, queues, len(device.config))
        self.function: Function = function
        self.msix = msix.Msix(function, function.vectors, router)
        function.region = self
        function.on_msix = self._msix_written
        self._interrupts = Interrupts(self.msix)
        self.taken = 0
        """Requests taken so far."""
        self.broken = ""
        """How the last driver broke the rules, for people."""
        self._memory = memory
        turn = partial(self.guard.run, self._turn)
        self._turns = Turn(io, turn)
        self._signals = Turn(io, partial(self.guard.run, self._signal))
        self._lock = threading.Lock()
        self._registers = Registers(device.features | _FEATURES, device.queue_sizes, function.vectors)
        self._rings: dict[int, Ring] = {}
        self._in_flight = 0
        self._resetting = False
        self._base: int | None = None
        # The loop's own.
        self._stopped = True
        self._first = 0
        self._bells = Bells(make_bell, turn)
        self._dirty: set[int] = set()

    @property
    def on_intx(self) -> Callable[[bool], object] | None:
        """Drives the INTx of the slot that it is in."""
        return self._interrupts.on_intx

    @on_intx.setter
    def on_intx(self, drive: Callable[[bool], object]) -> None:
        self._interrupts.on_intx = drive

    # What a vCPU does.

    def region(self, _bar: Bar) -> Transport:
        """See `PciDevice.region`: there is one BAR."""
        return self

    def moved(self, _bar: Bar, gpa: int | None) -> None:
        """See `PciDevice.moved`: the loop moves the bells."""
        self._base = gpa
        self._turns.ask()

    def read(self, offset: int, size: int) -> int:
        """Registers, ISR status (which reading clears), device configuration, MSI-X."""
        area, at = offset & -places.AREA, offset & places.AREA - 1
        if area == places.COMMON and at < SIZE:
            with self._lock:
                return self._registers.read(at, size)
        if area == places.ISR and not at:
            return self._interrupts.take_isr()
        if area == places.DEVICE:
            return int.from_bytes(self.device.config[at : at + size], "little")
        if area == places.MSIX_TABLE:
            return self.msix.read(at, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers, notifications, MSI-X; the device's configuration cannot be written."""
        area, at = offset & -places.AREA, offset & places.AREA - 1
        if area == places.NOTIFY:
            self._turns.ask()
        elif area == places.MSIX_TABLE:
            self.msix.write(at, size, value)
        elif area == places.COMMON:
            with self._lock:
                if at == virtio.VIRTIO_PCI_COMMON_STATUS and size == 1:
                    self._set_status(value)
                elif at == virtio.VIRTIO_PCI_COMMON_Q_ENABLE and size == 2:
                    self._enable(value)
                else:
                    self._registers.write(at, size, value)
            self._interrupts.update_line()
            self._turns.ask()

    def _msix_written(self) -> None:
        self.msix.control_written()
        self._interrupts.update_line()  # a function with MSI-X on has no INTx

    def _set_status(self, value: int) -> None:
        registers = self._registers
        if not value:
            self._resetting = True
            if not self._in_flight:
                self._forget()
            return
        if self._resetting:
            return  # who writes now has not waited for its reset
        if not registers.status & virtio.VIRTIO_CONFIG_S_FEATURES_OK and not registers.agreed:
            value &= ~virtio.VIRTIO_CONFIG_S_FEATURES_OK
        kept = registers.status & virtio.VIRTIO_CONFIG_S_NEEDS_RESET
        registers.status = value & 0xBF | kept

    def _enable(self, value: int) -> None:
        queue = self._registers.chosen
        if value != 1 or queue is None or queue.enabled or self._resetting:
            return
        with suppress(ValueError, GuestMemoryError):  # the driver reads back that it is not enabled
            self._rings[self._registers.queue_select] = self._ring(queue.place)
            queue.enabled = True

    def _ring(self, place: Place) -> Ring:
        return Ring(self._memory, place, event_idx=self._registers.has(virtio.VIRTIO_RING_F_EVENT_IDX))

    def _forget(self) -> None:
        """The end of a reset. Under the lock; nothing is in flight."""
        self._registers.reset()
        self._rings.clear()
        self._interrupts.isr = 0
        self._resetting = False

    # The loop's turn.

    def _turn(self) -> None:
        with self._lock:
            taken, more = self._take() if not self._stopped else ([], False)
            self._in_flight += len(taken)
        for index, chain in taken:
            self.device.perform(chain, partial(self._done, index, chain.head))
        if taken:
            self.taken += len(taken)
            self.device.flush_answers()
        with self._lock:
            base, ringing = self._base, set(self._rings)
        self._bells.keep(base, ringing)
        if more:
            self._turns.ask()

    def _take(self) -> tuple[list[tuple[int, Chain]], bool]:
        """Requests of all queues in rotation, and whether there are more. Under the lock."""
        if not self._may_take:
            return [], False
        self._first += 1
        found = take_chains(self._rings, self._first, MAX_IN_FLIGHT - self._in_flight)
        if found.broken:
            self.broken = found.broken
            self._registers.status |= virtio.VIRTIO_CONFIG_S_NEEDS_RESET
        return found.taken, found.more

    @property
    def _may_take(self) -> bool:
        status = self._registers.status
        ready = virtio.VIRTIO_CONFIG_S_DRIVER_OK | virtio.VIRTIO_CONFIG_S_FEATURES_OK
        return (
            status & ready == ready
            and not status & virtio.VIRTIO_CONFIG_S_NEEDS_RESET
            and not self._resetting
            and self.function.is_master
        )

    def _done(self, index: int, head: int, written: int) -> None:
        """A request is answered."""
        with self._lock:
            was_full = self._in_flight >= MAX_IN_FLIGHT
            self._in_flight -= 1
            if self._resetting:  # nobody hears of it; the last one ends the reset
                if not self._in_flight:
                    self._forget()
                return
            self._rings[index].put(head, written)
        self._dirty.add(index)
        self._signals.ask()
        if was_full:
            self._turns.ask()

    def _signal(self) -> None:
        """Show the driver what was answered in this turn: one interrupt a queue at most."""
        dirty, self._dirty = self._dirty, set()
        vectors = []
        with self._lock:
            for index in dirty:
                ring = self._rings.get(index)  # a reset may have come in between
                if ring is not None and not self._resetting and ring.publish():
                    vectors.append(self._registers.queues[index].vector)
            if vectors:
                self._interrupts.note()
        self._interrupts.raise_vectors(vectors)

    # The machine.

    def start(self) -> None:
        """Go on; interrupts that may have been lost in a save come again."""
        self._stopped = False
        with self._lock:
            vectors = [self._registers.queues[index].vector for index in self._rings]
        self._interrupts.raise_vectors(vectors)
        self._turns.ask()

    def stop(self, done: Callable[[], object]) -> None:
        """Take no more; `done()` when everything taken is answered and no worker has guest memory."""
        self._stopped = True

        def rested() -> None:
            self.guard.run(self._signal)
            done()

        self.device.drain(rested)

    def drain(self, done: Callable[[], object]) -> None:
        """`done()` when no worker has guest memory: all that can be asked of a device that has failed."""
        self.device.drain(done)

    def reset(self) -> None:
        """Power-on state. Only while stopped."""
        self._bells.drop()
        self.msix.reset()
        with self._lock:
            self._in_flight = 0
            self._forget()
            self._base = None
        self._dirty.clear()

    def close(self) -> None:
        """Give back every bell and route. Nothing runs any more."""
        call_all([self._bells.drop, self.msix.close])

    def save(self) -> VirtioState:
        """All that the guest could tell apart. Only while stopped."""
        return saved.saved(self._registers, self._rings, self._interrupts.isr, self.msix.save())

    def load(self, state: VirtioState) -> None:
        """Take it, behind the function's registers. ValueError for what cannot be."""
        self._rings = saved.load(state, self._registers, self._ring)
        self._interrupts.isr = state.isr
        self.msix.load(state.msix)

    def inspect(self) -> dict[str, object]:
        """Registers, queues and what is behind them."""
        registers = self._registers
        return {
            "status": f"{registers.status:#x}",
            "features": f"{registers.driver_features:#x}",
            "queues": {str(index): ring.described() for index, ring in list(self._rings.items())},
            "in_flight": self._in_flight,
            "bells": len(self._bells),
            "requests": self.taken,
            "broken": self.broken,
            **self.device.inspect(),
        }
