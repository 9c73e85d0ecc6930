"""The UART against its data sheet and against what Linux's 8250 driver does to it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.devices.port.bus import PortBus
from hvkvm.devices.port.irq_line import UnconnectedLine
from hvkvm.devices.port.serial import RX_LIMIT, Serial16550
from hvkvm.devices.port.serial_output import TX_BATCH, TX_LIMIT

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


# --- output ---------------------------------------------------------------------------------------


def test_a_line_is_one_write(uart):
    uart.print(b"hello, world\n")
    assert uart.text() == b"hello, world\n"
    assert len(uart.out) == 1


def test_a_prompt_waits_for_its_timer_only(uart):
    uart.print(b"login: ")
    assert uart.loop.soon == []
    assert len(uart.loop.later) == 1, "one timer for all bytes"
    uart.loop.run_later()
    assert uart.out == [b"login: "]
    uart.print(b"x")
    assert uart.text() == b"login: x"


def test_output_without_newlines_leaves_in_large_pieces(uart):
    uart.print(b"x" * (TX_BATCH - 1))
    assert uart.loop.soon == []
    uart.print(b"x")
    assert len(uart.loop.soon) == 1
    assert len(uart.text()) == TX_BATCH


def test_held_output_fills_up_takes_thre_away_and_resumes_with_an_interrupt(uart, monkeypatch):
    monkeypatch.setattr("hvkvm.devices.port.serial.time.sleep", lambda seconds: None)
    uart.open(0x02)
    uart.serial.output.hold(True)
    sent = bytes(i & 0x7F for i in range(TX_LIMIT))
    uart.print(sent[:-1])
    uart.r(IIR)
    assert uart.r(LSR) & 0x60 == 0x60
    uart.print(sent[-1:])
    assert uart.r(LSR) & 0x60 == 0
    assert uart.r(IIR) == NO_INT, "a full transmitter is no reason to interrupt"
    uart.line.taken()
    assert uart.text() == b""
    uart.w(THR, 0x41)
    assert uart.serial.output.overruns == 1
    uart.serial.output.hold(False)
    assert uart.text() == sent
    assert uart.line.taken() == 1
    assert uart.r(IIR) == 0xC2
    assert uart.r(LSR) & 0x60 == 0x60


def test_output_of_the_last_moment_is_found_by_the_last_flush(uart):
    uart.loop.stopped = True
    uart.print(b"Kernel panic\nend")
    uart.serial.output.hold(True)
    uart.serial.output.flush(even_if_held=True)
    assert uart.out == [b"Kernel panic\nend"]


def test_input_and_resets_survive_a_stopped_loop(uart):
    uart.serial.feed(bytes(RX_LIMIT + 1))
    uart.serial.on_rx_room = lambda: None
    uart.loop.stopped = True
    for _ in range(RX_LIMIT):
        uart.r(RBR)


def test_reset_forgets_registers_but_no_bytes(uart):
    uart.open(0x0F)
    uart.w(SCR, 0x77)
    uart.print(b"before")
    uart.serial.feed(b"typed")
    uart.serial.reset()
    assert [uart.r(i) for i in (IER, IIR, LCR, MCR, SCR)] == [0, 0x01, 0, 0, 0]
    assert uart.text() == b"before"
    assert uart.r(RBR) == ord("t")


def test_bytes_of_several_vcpus_and_flushers_are_neither_lost_nor_doubled(new_loop):
    for _ in range(20):
        out: list[bytes] = []
        serial = Serial16550(UnconnectedLine(), out.append, new_loop())
        stop = threading.Event()

        def flusher(serial=serial, stop=stop):
            while not stop.is_set():
                serial.output.flush()

        def writer(first: int, serial=serial):
            for i in range(500):
                serial.write(THR, 1, first + i % 100)

        flushers = [threading.Thread(target=flusher) for _ in range(2)]
        writers = [threading.Thread(target=writer, args=(first,)) for first in (0, 100)]
        for thread in flushers + writers:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in flushers:
            thread.join()
        serial.output.flush()
        got = b"".join(out)
        for first in (0, 100):
            mine = bytes(b for b in got if first <= b < first + 100)
            assert mine == bytes(first + i % 100 for i in range(500))


# --- properties -----------------------------------------------------------------------------------

OPERATION = st.one_of(
    st.tuples(st.just("w"), st.integers(0, 7), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("r"), st.integers(0, 7), st.sampled_from((1, 2, 4)), st.just(0)),
    st.tuples(st.just("feed"), st.integers(0, 40), st.just(0), st.just(0)),
    st.tuples(st.just("hold"), st.integers(0, 1), st.just(0), st.just(0)),
    st.tuples(st.just("turn"), st.just(0), st.just(0), st.just(0)),
)


@settings(max_examples=300)
@given(operations=st.lists(OPERATION, max_size=60))
def test_no_sequence_of_accesses_raises_and_every_answer_is_a_byte(operations, new_loop, new_line):
    uart = Uart(new_loop(), new_line())
    for name, a, size, value in operations:
        if name == "w":
            uart.bus.write(0x3F8 + a, size, value & (1 << 8 * size) - 1)
        elif name == "r":
            assert 0 <= uart.bus.read(0x3F8 + a, size) < 1 << 8 * size
        elif name == "feed":
            assert 0 <= uart.serial.feed(bytes(a)) <= a
        elif name == "hold":
            uart.serial.output.hold(bool(a))
        else:
            uart.loop.run_soon()
            uart.loop.run_later()
        iir = uart.serial._interrupt_id()
        asserted = iir != 1 and uart.serial._mcr & 0x18 == OUT2
        assert not asserted or uart.serial._line, "an interrupt is due and no edge was made for it"


@settings(max_examples=200)
@given(
    pieces=st.lists(
        st.one_of(st.binary(max_size=30), st.sampled_from(("soon", "later", "hold", "release", "thri"))),
        max_size=40,
    )
)
def test_output_is_what_was_written_whatever_the_loop_does(pieces, new_loop, new_line):
    uart = Uart(new_loop(), new_line())
    written = b""
    for piece in pieces:
        if isinstance(piece, bytes):
            uart.print(piece)
            written += piece
        elif piece == "soon":
            uart.loop.run_soon()
        elif piece == "later":
            uart.loop.run_later()
        elif piece == "thri":
            uart.w(IER, 0x02)
        else:
            uart.serial.output.hold(piece == "hold")
    uart.serial.output.hold(False)
    assert uart.text() == written
    assert b"" not in uart.out


@settings(max_examples=200)
@given(
    data=st.binary(min_size=1, max_size=400), trigger=st.sampled_from((0x01, 0x41, 0x81, 0xC1)), cut=st.data()
)
def test_a_linux_like_driver_receives_everything_by_edges(data, trigger, cut, new_loop, new_line):
    uart = Uart(new_loop(), new_line())
    uart.w(FCR, trigger)
    uart.w(MCR, 0x0B)
    uart.w(IER, 0x05)
    got = bytearray()
    rest = data
    while rest:
        size = cut.draw(st.integers(1, len(rest)))
        assert uart.serial.feed(rest[:size]) == size
        rest = rest[size:]
        while uart.line.taken():
            while not uart.r(IIR) & 1:
                while uart.r(LSR) & 1:
                    got.append(uart.r(RBR))
    assert got == data
