"""The last lines of a console: bounded, and fit to print."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvkvm.backends.console_tail import ConsoleTail


def test_the_last_lines_with_the_open_one():
    tail = ConsoleTail(max_lines=3)
    tail.add(b"one\r\ntwo\r\nth")
    tail.add(b"ree\r\nfour\r\nlogin: ")
    assert tail.lines() == ["two", "three", "four", "login: "]
    assert tail.lines(2) == ["four", "login: "]
    assert tail.lines(0) == []


def test_escape_sequences_and_bad_text_do_not_reach_the_terminal():
    tail = ConsoleTail()
    tail.add(b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07 \xff\x00\x08ok\n\x1b[2J")
    assert tail.lines() == ["red ]0;title \ufffdok", ""]


def test_a_line_that_never_ends_is_cut_into_lines():
    tail = ConsoleTail(max_lines=4, max_length=10)
    tail.add(b"x" * 95)
    assert tail.lines() == ["x" * 10] * 4 + ["x" * 5]


@given(st.lists(st.binary(max_size=200)))
def test_it_is_bounded_and_printable_whatever_comes(pieces):
    tail = ConsoleTail(max_lines=5, max_length=20)
    for piece in pieces:
        tail.add(piece)
    lines = tail.lines()
    assert len(lines) <= 6
    assert all(len(line.encode("utf-8", "replace")) <= 60 for line in lines)
    assert all(ch >= " " or ch == "\t" for line in lines for ch in line)


@given(st.lists(st.text("ab\n", max_size=30)))
def test_the_cuts_do_not_matter(pieces):
    whole, cut = ConsoleTail(), ConsoleTail()
    whole.add("".join(pieces).encode())
    for piece in pieces:
        cut.add(piece.encode())
    assert cut.lines() == whole.lines()
