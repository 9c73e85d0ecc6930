"""What a UART remembers: every register, and the input that its guest has not read yet."""

from __future__ import annotations

from hvkvm.tuples import NamedTuple


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
