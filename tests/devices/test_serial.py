"""The UART against its data sheet and against what Linux's 8250 driver does to it."""

from __future__ import annotations

import pytest
from uart import DLL, DLM, FCR, IER, IIR, LCR, LSR, MCR, MSR, NO_INT, OUT2, RBR, RTS, SCR, THR, Uart

from hvkvm.devices.port.serial_input import RX_LIMIT


@pytest.fixture
def uart(loop, line):
    return Uart(loop, line)


# --- Linux's autoconfig, step by step (drivers/tty/serial/8250/8250_port.c) -----------------------


def test_linux_autoconfig_finds_a_16550a(uart):
    # IER keeps four bits.
    uart.w(IER, 0)
    assert uart.r(IER) & 0x0F == 0
    uart.w(IER, 0x0F)
    assert uart.r(IER) & 0x0F == 0x0F
    uart.w(IER, 0)
    # Loopback: OUT2 and RTS come back as DCD and CTS.
    saved = uart.r(MCR)
    uart.w(MCR, 0x10 | 0x0A)
    assert uart.r(MSR) & 0xF0 == 0x90
    uart.w(MCR, saved)
    # No EFR at LCR 0xbf, FIFOs that say so with both bits.
    uart.w(LCR, 0xBF)
    uart.w(2, 0)
    uart.w(LCR, 0)
    uart.w(FCR, 0x01)
    assert uart.r(IIR) >> 6 == 3
    uart.w(LCR, 0x80)
    assert uart.r(IIR) != 0, "reads as a 16C650's EFR"
    uart.w(LCR, 0)
    # No XScale UART enable bit.
    uart.w(IER, 0x40)
    assert not uart.r(IER) & 0x40
    # Scratch.
    for value in (0x55, 0xAA):
        uart.w(SCR, value)
        assert uart.r(SCR) == value


def test_linux_thre_test_sees_the_interrupt_each_time_it_is_enabled(uart):
    uart.w(FCR, 0x01)
    uart.w(IER, 0x02)
    first = uart.r(IIR)
    uart.w(IER, 0)
    uart.w(IER, 0x02)
    second = uart.r(IIR)
    uart.w(IER, 0)
    assert (first, second) == (0xC2, 0xC2), "else Linux works around a bug with a timer (UART_BUG_THRE)"


def test_linux_startup_sees_no_tx_enable_bug(uart):
    uart.w(IER, 0x02)
    assert uart.r(LSR) & 0x40
    assert not uart.r(IIR) & 0x01


# --- interrupts -----------------------------------------------------------------------------------


def test_out2_gates_the_interrupt(uart):
    uart.w(IER, 0x02)
    assert uart.line.pulses == 0
    uart.w(MCR, OUT2)
    assert uart.line.taken() == 1


def test_an_interrupt_that_nobody_has_looked_at_comes_again_in_a_restored_machine(uart):
    """KVM may not have raised it yet when it was saved; the line, up for ever, would have raised no other."""
    uart.open(0x01)
    uart.serial.load(uart.serial.save())
    assert uart.line.taken() == 0
    uart.serial.feed(b"x")
    assert uart.line.taken() == 1
    uart.serial.load(uart.serial.save()._replace(wire=b""))
    assert uart.line.taken() == 1
    assert uart.r(RBR) == ord("x")
    uart.serial.load(uart.serial.save())
    assert uart.line.taken() == 0


def test_reading_iir_clears_thre_and_the_next_byte_raises_it_again(uart):
    uart.open(0x02)
    assert uart.line.taken() == 1
    assert uart.r(IIR) == 0xC2
    assert uart.r(IIR) == NO_INT
    uart.print(b"sixteen byte run")
    assert uart.line.taken() == 1, "one edge for a burst"
    assert uart.r(IIR) == 0xC2
    uart.w(THR, 0x21)
    assert uart.line.taken() == 1


def test_writing_ier_again_with_thri_still_on_raises_nothing(uart):
    uart.open(0x02)
    uart.r(IIR)
    uart.line.taken()
    uart.w(IER, 0x03)
    assert uart.line.pulses == 0


def test_without_thri_output_raises_nothing(uart):
    uart.open(0x01)
    uart.print(b"quiet\n")
    assert uart.line.pulses == 0
    assert uart.r(IIR) == NO_INT


def test_receive_interrupt_ids_follow_the_trigger(uart):
    uart.open(0x01)
    uart.serial.feed(b"1234567")
    assert uart.r(IIR) == 0xCC, "below the trigger the time-out tells"
    uart.serial.feed(b"8")
    assert uart.r(IIR) == 0xC4
    assert uart.line.taken() == 1
    assert uart.r(RBR) == ord("1")
    assert uart.r(IIR) == 0xCC
    while uart.r(LSR) & 1:
        uart.r(RBR)
    assert uart.r(IIR) == NO_INT


def test_every_arrival_in_an_empty_fifo_is_an_edge(uart):
    uart.open(0x01)
    for byte in b"abc":
        uart.serial.feed(bytes((byte,)))
        assert uart.line.taken() == 1
        assert uart.r(RBR) == byte


@pytest.mark.parametrize("chunk", [1, 4, 8, 14, 16])
def test_a_driver_that_trusts_edges_gets_all_of_a_long_input(uart, chunk):
    """Reads `chunk` bytes an interrupt and never loops on IIR: each edge must bring the next."""
    trigger = {1: 0x01, 4: 0x41, 8: 0x81, 14: 0xC1, 16: 0xC1}[chunk]
    uart.w(FCR, trigger)
    uart.w(MCR, 0x0B)
    uart.w(IER, 0x01)
    data = bytes(range(200))
    uart.serial.feed(data)
    got = bytearray()
    while uart.line.taken():
        for _ in range(chunk):
            if uart.r(LSR) & 1:
                got.append(uart.r(RBR))
    assert got == data


def test_enabling_the_receive_interrupt_late_tells_what_waits(uart):
    uart.w(MCR, 0x0B)
    uart.serial.feed(b"x")
    assert uart.line.pulses == 0
    uart.w(IER, 0x01)
    assert uart.line.taken() == 1


def test_line_status_outranks_receive_outranks_transmit_outranks_modem(uart):
    uart.w(FCR, 0x01)
    uart.w(IER, 0x0F)
    uart.w(MCR, 0x10)  # all four lines change, and what is sent comes back
    for _ in range(17):
        uart.w(THR, 0x55)
    assert uart.r(IIR) == 0xC6
    assert uart.r(LSR) & 0x02
    assert uart.r(IIR) == 0xC4
    for _ in range(16):
        uart.r(RBR)
    assert uart.r(IIR) == 0xC2
    assert uart.r(IIR) == 0xC0
    uart.r(MSR)
    assert uart.r(IIR) == NO_INT


# --- loopback, modem lines, divisor ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("mcr", "msr"), [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0)]
)
def test_loopback_reflects_the_modem_outputs(uart, mcr, msr):
    uart.w(MCR, mcr)
    assert uart.r(MSR) & 0xF0 == msr


def test_msr_deltas_are_told_once_and_ring_only_when_it_ends(uart):
    uart.w(MCR, 0x10)
    assert uart.r(MSR) == 0x0B  # CTS, DSR, DCD have gone
    assert uart.r(MSR) == 0x00
    uart.w(MCR, 0x14)
    assert uart.r(MSR) == 0x40
    uart.w(MCR, 0x10)
    assert uart.r(MSR) == 0x04


def test_loopback_keeps_output_in_and_input_out(uart):
    uart.w(FCR, 0x01)
    uart.w(MCR, 0x10)
    uart.serial.feed(b"outside")
    uart.print(b"inside")
    assert bytes(uart.r(RBR) for _ in range(6)) == b"inside"
    assert not uart.r(LSR) & 1
    uart.w(MCR, RTS)
    assert bytes(uart.r(RBR) for _ in range(7)) == b"outside"
    assert uart.text() == b""


def test_divisor_latch_hides_data_and_ier(uart):
    uart.w(LCR, 0x83)
    uart.w(DLL, 0x0C)
    uart.w(DLM, 0x01)
    assert (uart.r(DLL), uart.r(DLM)) == (0x0C, 0x01)
    uart.w(LCR, 0x03)
    assert uart.r(IER) == 0
    assert uart.text() == b""


# --- input ----------------------------------------------------------------------------------------


def test_input_is_bounded_and_asks_for_more_when_half_is_read(uart):
    asked = []
    uart.serial.on_rx_room = lambda: asked.append(uart.serial.rx_room())
    assert uart.serial.feed(bytes(RX_LIMIT + 10)) == RX_LIMIT
    assert uart.serial.feed(b"more") == 0
    assert uart.serial.rx_room() == 0
    uart.w(FCR, 0x01)
    for _ in range(RX_LIMIT // 2 - 1):
        uart.r(RBR)
    uart.loop.settle()
    assert asked == []
    uart.r(RBR)
    uart.loop.settle()
    assert asked == [RX_LIMIT // 2]
    for _ in range(100):
        uart.r(RBR)
    uart.loop.settle()
    assert len(asked) == 1


def test_a_full_feed_that_was_not_cut_asks_nobody(uart):
    uart.serial.on_rx_room = lambda: pytest.fail("nobody waits")
    uart.serial.feed(bytes(RX_LIMIT))
    for _ in range(RX_LIMIT):
        uart.r(RBR)
    uart.loop.settle()


@pytest.mark.parametrize("earlyprintk", [True, False])
def test_input_typed_before_linux_opens_the_port_survives_its_startup(uart, earlyprintk):
    """uart_configure_port drops RTS; serial8250_do_startup clears FIFOs and reads RX before dtr_rts."""
    if earlyprintk:
        uart.w(MCR, 0x03)
    uart.serial.feed(b"root\nls\n")
    uart.w(MCR, 0x1A)  # autoconfig
    uart.w(MCR, 0x01)
    for _ in range(3):
        uart.w(FCR, 0x01)
        uart.w(FCR, 0x07)
        uart.w(FCR, 0x00)
    uart.r(LSR), uart.r(RBR), uart.r(IIR), uart.r(MSR)
    uart.w(FCR, 0x81)
    uart.w(MCR, 0x0B)
    uart.w(IER, 0x05)
    got = bytearray()
    while uart.r(LSR) & 1:
        got.append(uart.r(RBR))
    assert got == b"root\nls\n"


def test_a_guest_that_never_writes_mcr_hears_all_the_same(uart):
    uart.serial.feed(b"x")
    assert uart.r(LSR) & 1
    assert uart.r(RBR) == ord("x")


def test_clearing_the_receive_fifo_drops_at_most_what_it_held(uart):
    uart.open(0x01)
    uart.serial.feed(bytes(range(20)))
    uart.w(FCR, 0x83)
    assert uart.r(RBR) == 16


def test_without_fifos_one_byte_shows_at_a_time(uart):
    uart.w(MCR, 0x0B)
    uart.w(IER, 0x01)
    uart.serial.feed(b"ab")
    assert uart.r(IIR) == 0x04
    assert uart.r(RBR) == ord("a")
    assert uart.r(IIR) == 0x04
    assert uart.r(RBR) == ord("b")
    assert uart.r(IIR) == 0x01


# --- a break ---------------------------------------------------------------------------------------


BI, DR = 0x10, 0x01


def test_a_break_is_a_nul_that_lsr_marks_once_when_it_is_at_the_top(uart):
    uart.open(0x05)
    uart.serial.feed(b"a")
    assert uart.serial.feed_break()
    uart.serial.feed(b"b")
    assert uart.r(LSR) & (BI | DR) == DR
    assert uart.r(RBR) == ord("a")
    assert uart.r(IIR) & 0x0F == 0x06, "a line status interrupt"
    assert uart.r(LSR) & (BI | DR) == BI | DR
    assert uart.r(LSR) & (BI | DR) == DR, "reading it clears it"
    assert uart.r(RBR) == 0
    assert uart.r(LSR) & (BI | DR) == DR
    assert uart.r(RBR) == ord("b")
    assert uart.r(LSR) & (BI | DR) == 0


def test_a_break_whose_status_nobody_read_says_nothing_of_the_next_byte(uart):
    uart.open(0x01)
    uart.serial.feed_break()
    uart.serial.feed(b"b\0")
    assert [uart.r(RBR), uart.r(RBR)] == [0, ord("b")]
    assert uart.r(LSR) & (BI | DR) == DR, "a NUL is no break"


def test_a_break_interrupts_a_driver_that_listens(uart, line):
    uart.open(0x05)
    before = line.pulses if hasattr(line, "pulses") else len(line.edges)
    uart.serial.feed_break()
    after = line.pulses if hasattr(line, "pulses") else len(line.edges)
    assert after == before + 1
    assert uart.r(IIR) & 0x0F == 0x06


def test_two_breaks_are_two(uart):
    uart.open(0x05)
    uart.serial.feed_break()
    uart.serial.feed_break()
    for _ in range(2):
        assert uart.r(LSR) & BI
        assert not uart.r(LSR) & BI
        assert uart.r(RBR) == 0


def test_a_break_waits_for_the_driver_as_keys_do_and_goes_with_the_fifo(uart):
    uart.w(MCR, 0)
    uart.serial.feed_break()
    assert not uart.r(LSR) & (BI | DR)
    uart.open(0x05)
    assert uart.r(LSR) & (BI | DR) == BI | DR
    uart.serial.feed_break()
    uart.w(FCR, 0x83)
    assert not uart.r(LSR) & (BI | DR)
    uart.serial.feed(b"x")
    assert uart.r(LSR) & (BI | DR) == DR


def test_breaks_are_bounded_as_all_input_is(uart):
    taken = sum(uart.serial.feed_break() for _ in range(RX_LIMIT + 10))
    assert taken == RX_LIMIT
    assert len(uart.serial._input.breaks) == RX_LIMIT
    uart.open(0x05)
    for _ in range(RX_LIMIT):
        assert uart.r(LSR) & BI
        assert uart.r(RBR) == 0
    assert not uart.r(LSR) & (BI | DR)
    assert not uart.serial._input.breaks
