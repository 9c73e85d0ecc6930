"""Ctrl-a commands, however the input is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.backends.escape_keys import Command, EscapeKeys


@pytest.mark.parametrize(
    ("typed", "guest", "commands"),
    [
        (b"plain", b"plain", []),
        (b"\x01x", b"", [Command.QUIT]),
        (b"a\x01bc", b"ac", [Command.BREAK]),
        (b"a\x01hb", b"ab", [Command.HELP]),
        (b"\x01\x01", b"\x01", []),
        (b"\x01\x01x", b"\x01x", []),
        (b"\x01e", b"\x01e", []),
        (b"\x01", b"", []),
        (b"\x01x\x01h\x01x", b"", [Command.QUIT, Command.HELP, Command.QUIT]),
        (b"x\x03\x1a", b"x\x03\x1a", []),
    ],
)
def test_keys(typed, guest, commands):
    assert EscapeKeys().feed(typed) == (guest, commands)


@given(st.lists(st.binary(max_size=5) | st.sampled_from((b"\x01", b"x", b"h"))))
def test_the_cuts_do_not_matter(pieces):
    keys, guest, commands = EscapeKeys(), b"", []
    for piece in pieces:
        some, said = keys.feed(piece)
        guest += some
        commands += said
    assert (guest, commands) == EscapeKeys().feed(b"".join(pieces))


def test_a_command_stands_where_it_was_typed():
    keys = EscapeKeys()
    assert keys.pieces(b"x\x01") == [b"x"]
    assert keys.pieces(b"bh\x01b\x01ht") == [Command.BREAK, b"h", Command.BREAK, Command.HELP, b"t"]
    assert keys.pieces(b"") == []
