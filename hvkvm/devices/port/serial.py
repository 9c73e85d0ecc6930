"""A 16550A UART: a login shell's console, and enough truth for Linux's 8250 autoconfig.

Time does not exist here: a byte written to THR has left at once, a received
byte waits no character times, so THRE is always ready, the receive timeout
interrupt comes with the byte, and a break that the guest sends is ignored.

Output goes through `serial_output`; while that is full the UART does not say
THRE, as a UART under flow control would. Input waits in a bounded queue in
front of the FIFO and enters it only while the guest asserts RTS (unless it has
never written MCR at all), so nothing typed before the guest's driver opened the
port is lost to the driver's FIFO resets and trial reads.

A break that the guest receives is a NUL among the input. When it comes to the
top of the FIFO, LSR says BI until it is read, and stays silent for what follows.

Register calls come from vCPU threads; `feed` from any thread. One lock guards
the registers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hvkvm.abi.board import COM1_PORT, COM1_SIZE
from hvkvm.devices.port.serial_core import READY, UartCore
from hvkvm.devices.port.serial_input import InputWire
from hvkvm.devices.port.serial_output import OutputBatch
from hvkvm.devices.port.serial_registers import (
    IER_MASK,
    IER_RDI,
    LCR_DLAB,
    MCR_LOOP,
    MCR_MASK,
)
from hvkvm.devices.port.serial_state import POWER_ON, SerialState
from hvkvm.errors import Stopped

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus
    from hvkvm.devices.port.serial_core import IrqLine
    from hvkvm.runtime.io_loop import IoLoop

_CONGESTED_POLL = 0.001


class Serial16550(UartCore):
    """One UART. `sink(data)` receives output on the I/O loop, in order, never empty and never twice.

    `on_rx_room()` is called on the I/O loop when there is room again after a
    `feed` that was cut short.
    """

    def __init__(
        self,
        irq: IrqLine,
        sink: Callable[[bytes], object],
        io: IoLoop,
        *,
        on_rx_room: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(irq, InputWire(self._tell_feeder), OutputBatch(sink, io, on_room=self._thr_emptied))
        self._put = self.output.put
        self._wire = self._input.waiting  # looked at without a call, at every poll of a console's driver
        self.on_rx_room = on_rx_room
        self._io = io
        self._lock = threading.RLock()

    def reset(self) -> None:
        """Power-on registers. Output and input that wait stay. Any thread."""
        with self._lock:
            self._load(POWER_ON)

    def save(self) -> SerialState:
        """All but the output, which is the sink's already. Any thread."""
        with self._lock:
            return self._save()

    def load(self, state: SerialState) -> None:
        """Take the registers of `state`, and its input before what waits here. Any thread.

        A line that is up pulses again: KVM raises the interrupt of an irqfd on a thread of its own, which may
        have come too late for the file, and without it the guest would hear of nothing any more.
        """
        with self._lock:
            self._load(state)
            self._input.put_before(state.wire, state.breaks)
            self._break_told = state.break_told
            if self._line:
                self._irq.pulse()

    def attach(self, bus: PortBus, port: int = COM1_PORT) -> None:
        """Claim the UART's eight ports; ConfigError when any is taken."""
        bus.add(port, COM1_SIZE, self, width=1)

    @property
    def receive_interrupt_enabled(self) -> bool:
        """Whether the guest wants to hear of input: something there reads the console. Any thread."""
        return bool(self._ier & IER_RDI)

    def described(self) -> str:
        """What waits in it, in words; "" where nothing does. Any thread."""
        output, words = self.output, []
        if output.waiting:
            held = " for a reader who takes no more" if output.held else ""
            words.append(f"{output.waiting} bytes of output wait{held}")
        if output.overruns:
            words.append(f"{output.overruns} bytes of output are lost, which the guest sent all the same")
        if self._wire:
            words.append(f"{len(self._wire)} bytes of input wait for the guest")
        return "; ".join(words)

    # --- the guest's side ------------------------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a register write. vCPU threads."""
        # Most of all writes touch no register: THRE is off, or (in a burst) raised already.
        if offset == 0 and (
            self.thr_writes_are_silent or (self._thre_pending and self._line and self.thr_is_output)
        ):
            self._put(value)
            return
        with self._lock:
            if offset == 0:
                if self._lcr & LCR_DLAB:
                    self._dll = value
                else:
                    self._transmit(value)
            elif offset == 1:
                if self._lcr & LCR_DLAB:
                    self._dlm = value
                else:
                    self._write_ier(value & IER_MASK)
            elif offset == 2:
                self._write_fcr(value)
            elif offset == 3:
                self._lcr = value
                self._note_mode()
            elif offset == 4:
                self._write_mcr(value & MCR_MASK)
            elif offset == 7:
                self._scr = value
            # LSR (5) and MSR (6) take writes only in a chip's factory test.

    def read(self, offset: int, size: int) -> int:
        """Give a register's value. vCPU threads."""
        if offset == 5:
            if self.output.full:
                # A guest polls for THRE here, and every poll is an exit: give the sink's thread the time.
                time.sleep(_CONGESTED_POLL)
            elif not (self._wire or self._looped or self._lsr_errors):
                return READY  # most of all reads: a console's driver asks before every byte
        with self._lock:
            if offset == 5:
                return self._read_lsr()
            if offset == 0:
                return self._dll if self._lcr & LCR_DLAB else self._receive()
            if offset == 1:
                return self._dlm if self._lcr & LCR_DLAB else self._ier
            if offset == 2:
                return self._read_iir()
            if offset == 3:
                return self._lcr
            if offset == 4:
                return self._mcr
            if offset == 6:
                return self._read_msr()
            return self._scr

    def transmit_block(self, data: bytes | bytearray) -> None:
        """Take bytes that were written to THR one by one, at once. The bytes of a coalesced ring."""
        if self.thr_writes_are_silent:
            self.output.put_block(data)
            return
        with self._lock:
            if self._mcr & MCR_LOOP:
                for value in data:
                    self._loop_back(value)
            else:
                self.output.put_block(data)
            self._thr_written()

    def _tell_feeder(self) -> None:
        """There is room for input again."""
        if self.on_rx_room is not None:
            with suppress(Stopped):
                self._io.call_soon(self.on_rx_room)

    def _thr_emptied(self) -> None:
        """Output that was full has room again. The flusher's thread."""
        with self._lock:
            self._thre_pending = True
            self._line = False  # it fell when output was full, which nobody looked at then
            self._update_irq()

    # --- the host's side -------------------------------------------------------------------------

    def rx_room(self) -> int:
        """Bytes that `feed` would take now."""
        return self._input.room

    def feed_break(self) -> bool:
        """Offer a break; whether it was taken. If not wait for `on_rx_room`. Any thread."""
        with self._lock:
            taken = self._input.add_break()
            self._update_irq()
            return taken

    def drop_input(self) -> None:
        """Forget input that the guest has not read. Any thread."""
        with self._lock:
            self._input.drop()

    def feed(self, data: bytes) -> int:
        """Offer input; the number of bytes taken. After a short answer wait for `on_rx_room`. Any thread."""
        with self._lock:
            taken = self._input.add(data)
            self._update_irq()
            return taken
