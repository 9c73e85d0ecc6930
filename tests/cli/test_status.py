"""The line that says a guest runs: who erases it does not wait for who draws it, nor the other way round."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.cli import status
from hvkvm.runtime.io_loop import IoLoop

SECONDS = 100.0


class Terminal:
    """What `Teller` is to the line; `on_write(text)` hears each text, on its writer's thread."""

    gone = waiting = False

    def __init__(self, on_write: Callable[[str], object]) -> None:
        self.write: Any = on_write

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass


def until(condition: Callable[[], object]) -> None:
    end = monotonic() + SECONDS
    while not condition():
        assert monotonic() < end
        sleep(0.001)


def test_it_is_erased_while_it_is_to_be_drawn_again(io: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the main thread, which asks for a dump or has run out of time: it stood here for ever."""
    monkeypatch.setattr(status, "REDRAW_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    texts: list[str] = []

    def on_write(text: str) -> None:
        texts.append(text)
        if threading.current_thread() is eraser:
            until(lambda: "_draw" in io.state)

    board = SimpleNamespace(on_first_output=None)
    machine: Any = SimpleNamespace(
        board=board, platform=SimpleNamespace(io=io), exit_counts=lambda: {"KVM_EXIT_HLT": 7}
    )
    terminal: Any = Terminal(on_write)
    line = status.StatusLine(machine, terminal, enabled=True)
    eraser = threading.Thread(target=line.clear, daemon=True)
    line.start()
    assert board.on_first_output == line.clear
    until(lambda: texts)
    assert "7 exits" in texts[0]
    eraser.start()
    eraser.join(SECONDS)
    assert not eraser.is_alive()
    drawn = len(texts)
    assert texts[-1] == status.ERASE
    line.clear()
    sleep(0.05)
    assert len(texts) == drawn
