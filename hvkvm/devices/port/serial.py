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
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from hvkvm.abi.board import COM1_PORT, COM1_SIZE
from hvkvm.devices.port.serial_output import OutputBatch
from hvkvm.devices.port.serial_registers import (
    FCR_CLEAR_RX,
    FCR_ENABLE,
    FIFO_SIZE,
    FIFO_TRIGGER,
    IER_MASK,
    IER_MSI,
    IER_RDI,
    IER_RLSI,
    IER_THRI,
    IIR_FIFO,
    IIR_MSI,
    IIR_NO_INT,
    IIR_RDI,
    IIR_RLSI,
    IIR_RX_TIMEOUT,
    IIR_THRI,
    LCR_DLAB,
    LSR_BI,
    LSR_DR,
    LSR_OE,
    LSR_TEMT,
    LSR_THRE,
    MCR_LOOP,
    MCR_MASK,
    MCR_OUT2,
    MCR_RTS,
    MSR_CONNECTED,
    MSR_DELTAS,
    loopback_msr,
    msr_deltas,
)
from hvkvm.errors import Stopped

if TYPE_CHECKING:
    from hvkvm.devices.port.bus import PortBus
    from hvkvm.devices.port.irq_line import IrqLine
    from hvkvm.runtime.io_loop import IoLoop

RX_LIMIT = 4096
"""Bytes of input that wait for the guest; a feeder with more must wait for `on_rx_room`."""
_READY = LSR_THRE | LSR_TEMT
_CONGESTED_POLL = 0.001


class SerialState(NamedTuple):
    """Every register of a UART, and the input that its guest has not read yet."""

    ier: int = 0
    lcr: int = 0
    mcr: int = 0
    scr: int = 0
    divisor: int = 1
    msr_delta: int = 0
    lsr_errors: int = 0
    fifo_on: bool = False
    trigger: int = 1
    mcr_used: bool = False
    read_since_dip: int = 0
    thre_pending: bool = False
    line: bool = False
    """Whether it asserts its interrupt: edges are made of changes of this."""
    looped: bytes = b""
    wire: bytes = b""
    breaks: tuple[int, ...] = ()
    """Which bytes of `wire` are breaks."""
    break_told: bool = False


POWER_ON = SerialState()


class Serial16550:
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
        self.output = OutputBatch(sink, io, on_room=self._thr_emptied)
        """Where THR writes go; `output.hold` and `output.flush` are for the sink's owner."""
        self._put = self.output.put
        self.on_rx_room = on_rx_room
        self._irq = irq
        self._io = io
        self._lock = threading.RLock()
        self._wire = bytearray()  # input the guest has not read yet, but for loopback
        self._taken = 0  # how many bytes have left _wire
        self._breaks: deque[int] = deque()  # the NULs in it that are breaks, counted from the first byte ever
        self._looped = bytearray()  # bytes in the FIFO that came through loopback
        self._feeder_waits = False
        self.thr_is_output = True
        """Whether a write to the first port is output now: no divisor, no loopback."""
        self.thr_writes_are_silent = True
        """Whether it is output and raises no interrupt either."""
        self.reset()

    def reset(self) -> None:
        """Power-on registers. Output and input that wait stay. Any thread."""
        with self._lock:
            self._load(POWER_ON)

    def save(self) -> SerialState:
        """All but the output, which is the sink's already. Any thread."""
        with self._lock:
            return SerialState(
                self._ier,
                self._lcr,
                self._mcr,
                self._scr,
                self._dll | self._dlm << 8,
                self._msr_delta,
                self._lsr_errors,
                self._fifo_on,
                self._trigger,
                self._mcr_used,
                self._read_since_dip,
                self._thre_pending,
                self._line,
                bytes(self._looped),
                bytes(self._wire),
                tuple(place - self._taken for place in self._breaks),
                self._break_told,
            )

    def load(self, state: SerialState) -> None:
        """Take the registers of `state`, and its input before what waits here. Pulses nothing. Any thread."""
        with self._lock:
            self._load(state)
            wire = state.wire[:RX_LIMIT]
            behind = [place + len(wire) for place in self._breaks]
            before = [self._taken + place for place in sorted(state.breaks) if 0 <= place < len(wire)]
            self._wire[:0] = wire
            self._breaks = deque([*before, *behind])
            self._break_told = state.break_told

    def _load(self, state: SerialState) -> None:
        """All but the input."""
        self._ier, self._lcr = state.ier & IER_MASK, state.lcr & 0xFF
        self._mcr, self._scr = state.mcr & MCR_MASK, state.scr & 0xFF
        self._dll, self._dlm = state.divisor & 0xFF, state.divisor >> 8 & 0xFF
        self._msr_delta, self._lsr_errors = state.msr_delta & MSR_DELTAS, state.lsr_errors & (LSR_OE | LSR_BI)
        self._note_mode()
        self._fifo_on = state.fifo_on
        self._trigger = state.trigger if state.trigger in FIFO_TRIGGER else 1
        self._mcr_used = state.mcr_used
        self._read_since_dip = state.read_since_dip & 0xFF
        self._thre_pending = state.thre_pending
        self._line = state.line
        self._break_told = False
        self._looped[:] = state.looped[:FIFO_SIZE]

    def attach(self, bus: PortBus, port: int = COM1_PORT) -> None:
        """Claim the UART's eight ports; ConfigError when any is taken."""
        bus.add(port, COM1_SIZE, self, width=1)

    def _note_mode(self) -> None:
        """After a change of IER, LCR or MCR."""
        self.thr_is_output = not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP)
        self.thr_writes_are_silent = self.thr_is_output and not self._ier & IER_THRI

    @property
    def receive_interrupt_enabled(self) -> bool:
        """Whether the guest wants to hear of input: something there reads the console. Any thread."""
        return bool(self._ier & IER_RDI)

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
                return _READY  # most of all reads: a console's driver asks before every byte
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

    # All below, up to the host's side, runs under the lock.

    def _transmit(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        else:
            self.output.put(value)
        self._thr_written()

    def _thr_written(self) -> None:
        """What was written has left at once: THR is empty again."""
        if self._ier & IER_THRI:
            self._thre_pending = True
            self._update_irq()

    def _loop_back(self, value: int) -> None:
        if len(self._looped) < (FIFO_SIZE if self._fifo_on else 1):
            self._looped.append(value)
        else:
            self._lsr_errors |= LSR_OE
        self._update_irq()

    def _level(self) -> int:
        """How many bytes the receive FIFO shows."""
        depth = FIFO_SIZE if self._fifo_on else 1
        level = len(self._looped)
        if not self._mcr & MCR_LOOP and (self._mcr & MCR_RTS or not self._mcr_used):
            level += len(self._wire)
        return min(level, depth)

    def _take(self, count: int) -> None:
        """Bytes leave the wire, and with them the breaks among them."""
        del self._wire[:count]
        self._taken += count
        while self._breaks and self._breaks[0] < self._taken:
            self._breaks.popleft()
            self._break_told = False
            self._lsr_errors &= ~LSR_BI  # it is about the byte at the top, and that is another one now
        self._tell_feeder()

    def _note_break(self) -> None:
        """A break at the top of the FIFO sets BI, once."""
        at_top = bool(self._breaks) and self._breaks[0] == self._taken and not self._looped
        if at_top and not self._break_told and self._level():
            self._break_told = True
            self._lsr_errors |= LSR_BI

    def _receive(self) -> int:
        if not self._level():
            return 0
        if self._looped:
            value = self._looped.pop(0)
        else:
            value = self._wire[0]
            self._take(1)
        self._read_since_dip += 1
        if self._read_since_dip >= self._trigger:
            # On a real line the level falls under the trigger here before more arrives. Without this dip a
            # driver that reads one trigger's worth an interrupt would never see another edge.
            self._read_since_dip = 0
            self._line = False
        self._update_irq()
        return value

    def _write_ier(self, value: int) -> None:
        if value & ~self._ier & IER_THRI:
            # Enabling the interrupt while THR is empty raises it, each time: Linux's THRE test counts on it.
            self._thre_pending = True
        self._ier = value
        self._note_mode()
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        if bool(value & FCR_ENABLE) != self._fifo_on:
            self._fifo_on = not self._fifo_on
            self._looped.clear()
        self._trigger = FIFO_TRIGGER[value >> 6] if self._fifo_on else 1
        if value & FCR_CLEAR_RX:
            visible = self._level() - len(self._looped)
            self._looped.clear()
            if visible > 0:
                self._take(visible)
        self._update_irq()

    def _write_mcr(self, value: int) -> None:
        before = self._modem_lines()
        self._mcr = value
        self._note_mode()
        self._mcr_used = True
        self._msr_delta |= msr_deltas(before, self._modem_lines())
        self._update_irq()

    def _modem_lines(self) -> int:
        return loopback_msr(self._mcr) if self._mcr & MCR_LOOP else MSR_CONNECTED

    def _read_msr(self) -> int:
        value = self._modem_lines() | self._msr_delta
        self._msr_delta = 0
        self._update_irq()
        return value

    def _read_lsr(self) -> int:
        self._note_break()
        value = self._lsr_errors
        if not self.output.full:
            value |= _READY
        if self._level():
            value |= LSR_DR
        if self._lsr_errors:
            self._lsr_errors = 0
            self._update_irq()
        return value

    def _interrupt_id(self) -> int:
        self._note_break()
        ier = self._ier
        if ier & IER_RLSI and self._lsr_errors:
            return IIR_RLSI
        if ier & IER_RDI:
            level = self._level()
            if level >= self._trigger:
                return IIR_RDI
            if level:
                return IIR_RX_TIMEOUT
        if ier & IER_THRI and self._thre_pending and not self.output.full:
            return IIR_THRI
        if ier & IER_MSI and self._msr_delta:
            return IIR_MSI
        return IIR_NO_INT

    def _read_iir(self) -> int:
        value = self._interrupt_id()
        if value == IIR_THRI:
            self._thre_pending = False
            self._update_irq()
        return value | IIR_FIFO if self._fifo_on else value

    def _update_irq(self) -> None:
        line = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 and self._interrupt_id() != IIR_NO_INT
        if line and not self._line:
            self._irq.pulse()
        self._line = line

    def _tell_feeder(self) -> None:
        if not self._feeder_waits or len(self._wire) > RX_LIMIT // 2:
            return
        self._feeder_waits = False
        if self.on_rx_room is None:
            return
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
        return RX_LIMIT - len(self._wire)

    def feed_break(self) -> bool:
        """Offer a break; whether it was taken. If not wait for `on_rx_room`. Any thread."""
        with self._lock:
            self._breaks.append(self._taken + len(self._wire))
            if self.feed(b"\0"):
                return True
            self._breaks.pop()
            return False

    def drop_input(self) -> None:
        """Forget input that the guest has not read. Any thread."""
        with self._lock:
            self._wire.clear()
            self._breaks.clear()
            self._tell_feeder()

    def feed(self, data: bytes) -> int:
        """Offer input; the number of bytes taken. After a short answer wait for `on_rx_room`. Any thread."""
        with self._lock:
            taken = data[: max(0, RX_LIMIT - len(self._wire))]
            self._wire += taken
            self._feeder_waits = self._feeder_waits or len(taken) < len(data)
            self._update_irq()
            return len(taken)
