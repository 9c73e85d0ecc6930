"""The UART's output batches, stops and resets, and properties of the whole chip."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polled_line import UnconnectedLine
from uart import FCR, IER, IIR, LCR, LSR, MCR, NO_INT, OUT2, RBR, SCR, THR, Uart

from hvkvm.devices.port.serial import Serial16550
from hvkvm.devices.port.serial_input import RX_LIMIT
from hvkvm.devices.port.serial_output import TX_BATCH, TX_INTERVAL, TX_LIMIT
from hvkvm.devices.port.serial_registers import FIFO_SIZE


@pytest.fixture
def uart(loop, line):
    return Uart(loop, line)


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


def test_what_waits_is_told_and_for_whom(uart):
    assert uart.serial.described() == ""
    uart.serial.output.hold(True)
    uart.print(b"hello\n")
    uart.serial.feed(b"abc")
    assert uart.serial.described() == (
        "6 bytes of output wait for a reader who takes no more; 3 bytes of input wait for the guest"
    )
    uart.serial.output.hold(False)
    assert uart.text() == b"hello\n"
    assert uart.serial.described() == "3 bytes of input wait for the guest"


def test_output_without_newlines_leaves_in_large_pieces(uart):
    uart.print(b"x" * (TX_BATCH - 1))
    assert uart.loop.soon == []
    uart.print(b"x")
    assert len(uart.loop.soon) == 1
    assert len(uart.text()) == TX_BATCH


def test_lines_of_a_stream_share_a_batch(uart, monkeypatch):
    """Each batch wakes the loop and whoever reads: a line for itself only after a pause."""
    now = 100.0
    monkeypatch.setattr("hvkvm.devices.port.serial_output.monotonic", lambda: now)
    uart.print(b"one\n")
    uart.loop.settle()
    now += TX_INTERVAL / 4
    uart.print(b"two\nthree\nfo")
    assert uart.loop.soon == []
    assert [seconds for seconds, *_ in uart.loop.later] == [pytest.approx(TX_INTERVAL * 3 / 4)]
    uart.loop.run_later()
    now += 2 * TX_INTERVAL
    uart.print(b"ur\n")
    assert len(uart.loop.soon) == 1
    assert uart.text() == b"one\ntwo\nthree\nfour\n"
    assert uart.out == [b"one\n", b"two\nthree\nfo", b"ur\n"]


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
    uart.print(b"B" * (FIFO_SIZE - 1))
    assert uart.serial.output.overruns == 0, "the last byte's driver saw THRE and may fill the FIFO"
    uart.print(b"Bx")
    assert uart.serial.output.overruns == 1
    uart.serial.output.hold(False)
    assert uart.text() == sent + b"B" * FIFO_SIZE
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


class OneAtATime(bytearray):
    """Notices two threads that change it at the same time: without a GIL that costs bytes, or the process."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.overlaps = 0

    def _change(self, change, *arguments):
        self.inside += 1
        self.overlaps += self.inside > 1
        time.sleep(0)  # another thread's turn
        try:
            return change(*arguments)
        finally:
            self.inside -= 1

    def append(self, value):
        self._change(super().append, value)

    def clear(self):
        self._change(super().clear)

    def __iadd__(self, more):
        return self._change(super().__iadd__, more)

    def __delitem__(self, where):
        self._change(super().__delitem__, where)


@pytest.mark.usefixtures("tiny_switch_interval")
def test_no_two_threads_change_the_bytes_that_wait_at_once(uart):
    output = uart.serial.output
    output._waiting = waiting = OneAtATime()

    def produce() -> None:
        for number in range(300):
            output.put(ord("x"))
            output.put_block(b"yz")
            if number % 16 == 0:
                output.flush()

    threads = [threading.Thread(target=produce) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    output.flush()
    assert waiting.overlaps == 0
    assert len(uart.text()) == 4 * 300 * 3


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
