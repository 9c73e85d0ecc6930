"""A 16550A's registers: what each access does to them, and when they interrupt.

No lock, no thread: `serial.Serial16550` derives from this and makes every call under its lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

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
from hvkvm.devices.port.serial_state import POWER_ON, SerialState

if TYPE_CHECKING:
    from hvkvm.devices.port.serial_input import InputWire
    from hvkvm.devices.port.serial_output import OutputBatch

READY = LSR_THRE | LSR_TEMT


class IrqLine(Protocol):
    """An edge-triggered interrupt line, as ISA's are here: it can only pulse. `kvm.irqfd.Irqfd` is one."""

    def pulse(self) -> object:
        """Raise and lower it. Any thread; must not block."""


class UartCore:
    """Registers and FIFO between `wire` and `output`; edges go to `irq`."""

    def __init__(self, irq: IrqLine, wire: InputWire, output: OutputBatch) -> None:
        self.output = output
        """Where THR writes go; `output.hold` and `output.flush` are for the sink's owner."""
        self._irq = irq
        self._input = wire
        self._looped = bytearray()  # bytes in the FIFO that came through loopback
        self.thr_is_output = True
        """Whether a write to the first port is output now: no divisor, no loopback."""
        self.thr_writes_are_silent = True
        """Whether it is output and raises no interrupt either."""
        self._load(POWER_ON)

    def _save(self) -> SerialState:
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
            bytes(self._input.waiting),
            self._input.breaks,
            self._break_told,
        )

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

    def _note_mode(self) -> None:
        """After a change of IER, LCR or MCR."""
        self.thr_is_output = not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP)
        self.thr_writes_are_silent = self.thr_is_output and not self._ier & IER_THRI

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
            level += len(self._input.waiting)
        return min(level, depth)

    def _take(self, count: int) -> None:
        """Bytes leave the wire, and with them the breaks among them."""
        if self._input.take(count):
            self._break_told = False
            self._lsr_errors &= ~LSR_BI  # it is about the byte at the top, and that is another one now

    def _note_break(self) -> None:
        """A break at the top of the FIFO sets BI, once."""
        at_top = self._input.break_is_next and not self._looped
        if at_top and not self._break_told and self._level():
            self._break_told = True
            self._lsr_errors |= LSR_BI

    def _receive(self) -> int:
        if not self._level():
            return 0
        if self._looped:
            value = self._looped.pop(0)
        else:
            value = self._input.waiting[0]
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
            value |= READY
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
