"""Bits of the 16550A's registers, and the modem line arithmetic of its loopback mode.

Numbers follow the National PC16550D data sheet; the names are those of
<linux/serial_reg.h> without its UART_ prefix. Pure; for `serial` and its tests.
"""

from __future__ import annotations

FIFO_SIZE = 16
FIFO_TRIGGER = (1, 4, 8, 14)  # by FCR bits 7:6

IER_RDI = 0x01
IER_THRI = 0x02
IER_RLSI = 0x04
IER_MSI = 0x08
IER_MASK = 0x0F  # the rest reads back 0: Linux takes a sticky bit 6 for an XScale UART

IIR_NO_INT = 0x01
IIR_MSI = 0x00
IIR_THRI = 0x02
IIR_RDI = 0x04
IIR_RLSI = 0x06
IIR_RX_TIMEOUT = 0x0C
IIR_FIFO = 0xC0  # both bits: FIFOs present, on, and not the 16550's broken ones

FCR_ENABLE = 0x01
FCR_CLEAR_RX = 0x02

LCR_DLAB = 0x80

MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08  # on a PC: connects the interrupt output
MCR_LOOP = 0x10
MCR_MASK = 0x1F

LSR_DR = 0x01
LSR_OE = 0x02
LSR_BI = 0x10
LSR_THRE = 0x20
LSR_TEMT = 0x40

MSR_DCTS = 0x01
MSR_DDSR = 0x02
MSR_TERI = 0x04
MSR_DDCD = 0x08
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD
MSR_DELTAS = MSR_DCTS | MSR_DDSR | MSR_TERI | MSR_DDCD


def loopback_msr(mcr: int) -> int:
    """MSR's line bits in loopback: the four modem outputs come back as the four inputs."""
    return (
        (MSR_DSR if mcr & MCR_DTR else 0)
        | (MSR_CTS if mcr & MCR_RTS else 0)
        | (MSR_RI if mcr & MCR_OUT1 else 0)
        | (MSR_DCD if mcr & MCR_OUT2 else 0)
    )


def msr_deltas(before: int, after: int) -> int:
    """MSR's low four bits for a change of its line bits. RI tells only its trailing edge."""
    changed = before ^ after
    return (
        (MSR_DCTS if changed & MSR_CTS else 0)
        | (MSR_DDSR if changed & MSR_DSR else 0)
        | (MSR_TERI if changed & before & MSR_RI else 0)
        | (MSR_DDCD if changed & MSR_DCD else 0)
    )
