"""The socket that --vsock names: made, refused with a remedy, and removed again."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hvkvm.devices.synth.vsock_caller import parse_connect
from hvkvm.devices.synth.vsock_socket import ListeningSocket, connect
from hvkvm.errors import ConfigError
from hvkvm.runtime.unix_listener import MAX_PATH


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short relative names, whatever the length of the temporary folder's."""
    monkeypatch.chdir(tmp_path)


def test_it_listens_and_is_removed() -> None:
    path = Path("v")
    listening = ListeningSocket(path)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect("v")
        listening.socket.accept()[0].close()
    listening.close()
    listening.close()
    assert not path.exists()


def test_a_stale_socket_makes_way() -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind("v")
    listening = ListeningSocket(Path("v"))
    assert connect(Path("."), 1) is None
    listening.close()


def test_a_socket_that_another_has_put_there_meanwhile_stays() -> None:
    listening = ListeningSocket(Path("v"))
    os.unlink("v")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("v")
        listening.close()
        assert Path("v").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere/v", "no folder nowhere; create it, or name another"),
        ("file", "exists and is no socket; remove it, or name another"),
        ("folder", "exists and is no socket; remove it, or name another"),
        ("link", "exists and is no socket; remove it, or name another"),
        ("busy", "another program listens there; end it, or name another"),
        ("x" * 97, "longer than the 96 bytes that leave room for _PORT; choose a shorter path"),
    ],
)
def test_what_cannot_be_is_told_with_a_remedy(name: str, reason: str) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    Path("link").symlink_to("busy")
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind("busy")
        busy.listen()
        with pytest.raises(ConfigError) as caught:
            ListeningSocket(Path(name))
    assert str(caught.value) == f"--vsock {name}: {reason}"


def test_the_longest_path_leaves_room_for_the_longest_port() -> None:
    path = Path("x" * 96)
    listening = ListeningSocket(path)
    with socket.socket(socket.AF_UNIX) as service:
        name = f"{path}_{0x7FFFFFFF}"
        assert len(name) == MAX_PATH
        service.bind(name)
        service.listen()
        found = connect(path, 0x7FFFFFFF)
        assert found is not None
        found.close()
    listening.close()


def test_a_full_queue_is_told_from_nobody() -> None:
    with socket.socket(socket.AF_UNIX) as service:
        service.bind("v_7")
        service.listen(0)
        first = connect(Path("v"), 7)
        assert first is not None
        with pytest.raises(BlockingIOError):
            connect(Path("v"), 7)
        first.close()
    assert connect(Path("v"), 7) is None
    assert connect(Path("v"), 8) is None


@pytest.mark.parametrize(
    ("line", "port"),
    [
        (b"CONNECT 0\n", 0),
        (b"CONNECT 2147483647\r\n", 0x7FFFFFFF),
        (b"CONNECT 2147483648\n", None),
        (b"CONNECT 99999999999999999999\n", None),
        (b"CONNECT\n", None),
        (b"CONNECT  5\n", None),
        (b"connect 5\n", None),
        ("CONNECT ٣\n".encode(), None),
        (b"\xff\n", None),
    ],
)
def test_the_connect_line(line: bytes, port: int | None) -> None:
    assert parse_connect(line) == port
