"""A process that may open no more files says so of its sockets, with the remedy for that."""

from __future__ import annotations

import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvkvm.devices.synth.vsock_socket import ListeningSocket
from hvkvm.errors import HostExhausted
from hvkvm.events import Event, Observer, Warned
from hvkvm.machine.control_door import ControlDoor, open_door
from hvkvm.observe import control_path


@contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Told(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: Event) -> None:
        assert isinstance(event, Warned)
        self.texts.append(event.text)


def parts(control: str, observer: Observer) -> Any:
    config = SimpleNamespace(control=control, name="")
    return SimpleNamespace(name="vm", platform=SimpleNamespace(config=config, observer=observer))


def test_vsock_names_the_limit_of_files(tmp_path: Path) -> None:
    with no_more_files(), pytest.raises(HostExhausted) as caught:
        ListeningSocket(tmp_path / "v")
    assert str(caught.value).startswith(f"--vsock {tmp_path}/v: Too many open files; ")
    assert str(caught.value).endswith("raise `ulimit -n`")
    assert list(tmp_path.iterdir()) == []


def test_control_names_the_limit_of_files(tmp_path: Path) -> None:
    with no_more_files(), ExitStack() as stack, pytest.raises(HostExhausted, match=r"^--control .*ulimit -n"):
        open_door(parts(str(tmp_path / "c"), Told()), stack, stack)
    assert list(tmp_path.iterdir()) == []


def test_a_control_socket_that_nobody_asked_for_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(control_path, "folders", lambda: [tmp_path])
    with no_more_files(), ExitStack() as stack:
        assert open_door(parts("auto", told), stack, stack) is None
    [text] = told.texts
    assert text.startswith("no control socket: Too many open files; ")
    assert text.endswith("raise `ulimit -n`")


def test_the_first_client_waits_while_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who answers is imported when somebody comes, and an import opens files: it ended the machine."""
    later: list[Any] = []
    handle = SimpleNamespace(remove=lambda: None)
    io = SimpleNamespace(
        add_reader=lambda _fd, _callback: handle, call_later=lambda _seconds, fn: later.append(fn)
    )
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "c"))
    listening.listen()
    told = Told()
    platform = SimpleNamespace(io=io, observer=told)
    door = ControlDoor(SimpleNamespace(platform=platform), listening.detach(), tmp_path / "c")  # type: ignore[arg-type]
    with monkeypatch.context() as patch, no_more_files():
        patch.delitem(sys.modules, "hvkvm.machine.control", raising=False)
        door._open()
    assert later == [door._watch]
    assert told.texts == [], "somebody may close one"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "hvkvm.machine.control", None)
        door._open()
        door._open()
    assert len(told.texts) == 1
    assert told.texts[0].startswith("the control socket does not answer: ")
    door.close()
    door.tell_the_end()
