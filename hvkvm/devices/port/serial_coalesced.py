"""Console output at a fifth of its price: KVM queues THR writes in its coalesced ring.

An OUT that leaves the kernel costs about 11 us, one that KVM queues 2 (measured
on 6.18). While the first port means output (no DLAB, no loopback) the kernel may
keep the bytes until somebody looks; each register access drains the ring first,
so the order of bytes and register effects is the guest's.

With the THRE interrupt on there is one thing that the guest waits for while it
makes no access. A driver of an edge-triggered UART asks IIR again after each
burst (it would miss other interrupts otherwise), and that drains; so Linux's
does. One that does not is found by the timer: bytes queued, and no access and no
further byte for PATIENCE. From then on there is a zone only while the THRE
interrupt is off.

Two things are not free. Making or ending a zone makes KVM wait for an SRCU grace
period, some 4 ms (measured), the price of 400 plain writes. So a zone is made
only after that many in a row, and after each zone that had to end twice as many.
And a guest that prints and halts makes no exit: while there is a zone, a timer
on the I/O loop drains too.

Everything runs under one lock, on vCPU threads and the I/O loop; that makes
this the ring's only reader, on which the order of bytes depends.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from hvkvm.abi.board import COM1_PORT, COM1_SIZE
from hvkvm.abi.kvm import KVM_CAP_COALESCED_PIO
from hvkvm.errors import CapabilityMissing, HvkvmError, Stopped
from hvkvm.kvm.coalesced import CoalescedPio, CoalescedRing

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus
    from hvkvm.devices.port.serial import Serial16550
    from hvkvm.kvm.vcpu import Vcpu
    from hvkvm.kvm.vm import Vm
    from hvkvm.runtime.io_loop import IoLoop

FIRST_THRESHOLD = 512
"""THR writes with nothing to wait for that must have exited before a zone is made."""
LAST_THRESHOLD = 1 << 16
POLL_MIN = 0.005
POLL_MAX = 0.040
"""Seconds between two looks at the ring from the I/O loop: longer the longer it stays empty."""
PATIENCE = 0.020
"""Seconds of silence after which a guest with bytes in the ring is taken to wait for the THRE interrupt."""


class CoalescedSerial:
    """The port device that stands before a `Serial16550`. Attach this instead of the UART.

    `vcpu` is any vCPU of `vm`: the ring is mapped with each of them. Raises
    CapabilityMissing where KVM cannot queue port writes; then use the UART alone.
    """

    def __init__(
        self, serial: Serial16550, vm: Vm, vcpu: Vcpu, io: IoLoop, *, first_threshold: int = FIRST_THRESHOLD
    ) -> None:
        if not vm.check_extension(KVM_CAP_COALESCED_PIO):
            raise CapabilityMissing("KVM_CAP_COALESCED_PIO: this kernel's KVM cannot queue port writes")
        self.serial = serial
        self.zones_made = 0
        self.bytes_coalesced = 0
        self._vm = vm
        self._vcpu = vcpu
        self._io = io
        self._lock = threading.RLock()
        self._zone: CoalescedPio | None = None
        self._ring: CoalescedRing | None = None  # there whenever _zone is
        self._threshold = first_threshold
        self._exited = 0
        self._accesses = 0
        self._suspect: tuple[int, int] | None = None
        self._waits_for_thre = False
        self._closed = False
        self._poll_delay = POLL_MIN
        self._bus: PortBus | None = None
        self._port = COM1_PORT

    def attach(self, bus: PortBus, port: int = COM1_PORT) -> None:
        """Claim the UART's eight ports; ConfigError when any is taken."""
        bus.add(port, COM1_SIZE, self, width=1)
        self._bus, self._port = bus, port

    @property
    def zone_is_open(self) -> bool:
        """Whether KVM queues THR writes now."""
        return self._zone is not None

    def read(self, offset: int, size: int) -> int:
        """A register's value, after all writes before it. vCPU threads."""
        ring = self._ring
        self._accesses += 1
        if ring is not None and not ring.empty:
            with self._lock:
                self._drain()
        # Not under the lock: a read may wait a moment for the sink. What another vCPU queues meanwhile
        # has no order to this read anyway.
        return self.serial.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A register write, after all writes before it. vCPU threads."""
        serial = self.serial
        if offset == 0 and self._zone is None:
            # Without the lock: if another vCPU makes a zone meanwhile, this vCPU's next write comes after it.
            serial.write(0, size, value)
            if self._may_queue:
                self._exited += 1
                if self._exited >= self._threshold:
                    with self._lock:
                        self._open_zone()
            return
        with self._lock:
            self._accesses += 1
            self._drain()
            serial.write(offset, size, value)
            if self._zone is not None and not self._may_queue:
                # Before the guest goes on: its next THR write must exit.
                self._end_zone_early()

    @property
    def _may_queue(self) -> bool:
        serial = self.serial
        return serial.thr_writes_are_silent or (serial.thr_is_output and not self._waits_for_thre)

    def drain(self) -> None:
        """Take what KVM has queued. Any thread."""
        with self._lock:
            self._drain()

    def close(self) -> None:
        """End the zone and take its last bytes: before the vCPUs close. Idempotent, any thread."""
        with self._lock:
            self._close_zone()
            self._closed = True

    def reset(self) -> None:
        """Power-on state. Every vCPU is out of KVM_RUN."""
        with self._lock:
            self._close_zone()
            self._exited = 0
            self._waits_for_thre = False
            self.serial.reset()

    # --- under the lock --------------------------------------------------------------------------

    def _drain(self) -> int:
        """Hand over what the ring holds; how many writes that was."""
        ring = self._ring
        if self._zone is None or ring is None or ring.empty:
            return 0
        thr = ring.take_bytes(self._port)
        if thr is not None:
            self.bytes_coalesced += len(thr)
            self.serial.transmit_block(thr)
            return len(thr)
        mixed = ring.take_writes()
        for queued in mixed:
            if queued.pio and queued.address == self._port:
                self.bytes_coalesced += 1
                self.serial.transmit_block(queued.data)
            elif queued.pio and self._bus is not None:  # another zone of this VM: all share the ring
                self._bus.write(queued.address, len(queued.data), int.from_bytes(queued.data, "little"))
        return len(mixed)

    def _open_zone(self) -> None:
        self._exited = 0
        # Looked at again under the lock: another vCPU may have made the zone or changed what THR means.
        if self._closed or self._zone is not None or not self._may_queue:
            return
        try:
            zone = CoalescedPio(self._vm, self._port, 1)
        except HvkvmError:  # out of kernel memory or zones: the plain way always works
            self._threshold = min(2 * self._threshold, LAST_THRESHOLD)
            return
        self._zone, self._ring = zone, CoalescedRing(self._vm, self._vcpu)
        self.zones_made += 1
        self._poll_delay = POLL_MIN
        self._poll_later(zone)

    def _close_zone(self) -> None:
        zone = self._zone
        if zone is None:
            return
        # Unregistered first, drained second: when the ioctl has returned KVM queues nothing more.
        zone.close()
        self._drain()
        self._zone = self._ring = None

    def _end_zone_early(self) -> None:
        self._close_zone()
        self._threshold = min(2 * self._threshold, LAST_THRESHOLD)

    def _poll_later(self, zone: CoalescedPio) -> None:
        with suppress(Stopped):
            self._io.call_later(self._poll_delay, self._poll, zone)

    def _poll(self, zone: CoalescedPio) -> None:
        """Fetch what a guest printed before it halted. I/O loop."""
        with self._lock:
            # Told by its zone when it is stale, and not cancelled: cancelling waits for a running callback,
            # and this one may be waiting for the lock.
            ring = self._ring
            if self._zone is not zone or ring is None:
                return
            if ring.empty or self.serial.thr_writes_are_silent:
                self._suspect = None
                self._poll_delay = POLL_MIN if self._drain() else min(2 * self._poll_delay, POLL_MAX)
            else:
                # In the middle of a burst, or waiting for the interrupt: time tells.
                now = self._accesses, ring.last
                if self._suspect == now:
                    self._waits_for_thre = True
                    self._end_zone_early()
                    return
                self._suspect = now
                self._poll_delay = PATIENCE
            self._poll_later(zone)
