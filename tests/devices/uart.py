"""A UART behind its registers, for the tests of the serial port."""

from __future__ import annotations

from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.serial import Serial16550

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
NO_INT = 0xC1
OUT2 = 0x08
RTS = 0x02


class Uart:
    """A UART on a bus, seen through its registers."""

    def __init__(self, loop, line) -> None:
        self.loop = loop
        self.line = line
        self.out: list[bytes] = []
        self.serial = Serial16550(line, self.out.append, loop)
        self.bus = PortBus()
        self.serial.attach(self.bus)

    def r(self, register: int) -> int:
        return self.bus.read(0x3F8 + register, 1)

    def w(self, register: int, value: int) -> None:
        self.bus.write(0x3F8 + register, 1, value)

    def print(self, data: bytes) -> None:
        for byte in data:
            self.w(THR, byte)

    def text(self) -> bytes:
        self.loop.settle()
        return b"".join(self.out)

    def open(self, ier: int) -> None:
        """What a driver does to listen: FIFOs on, trigger 8, lines up, interrupts connected."""
        self.w(FCR, 0x81)
        self.w(MCR, 0x0B)
        self.w(IER, ier)
