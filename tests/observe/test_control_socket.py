"""The control socket against clients that are wrong, slow, many, or gone."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_listener import listen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvkvm.observe import control_socket
from hvkvm.observe.control_socket import MAX_CONNECTIONS, MAX_LINE, Answer, ControlSocket
from hvkvm.runtime.io_loop import IoLoop

SECONDS = 100.0


class World:
    """A server on a loop of its own, and clients."""

    def __init__(self, folder: Path) -> None:
        self.faults: list[BaseException] = []
        self.loop = IoLoop(on_fault=self.faults.append)
        self.path = folder / "x.sock"
        self.held: list[Answer] = []
        self.seen: list[Any] = []
        self.server = ControlSocket(listen(self.path), self.loop, self.handle)
        self.clients: list[Client] = []
        self.loop.start()

    def handle(self, request: dict[str, Any], answer: Answer) -> None:
        self.seen.append(request)
        match request["do"]:
            case "hold":
                answer.timer = self.loop.call_later(SECONDS, answer.fail, "guest", "no answer")
                self.held.append(answer)
            case "raise":
                raise RuntimeError("a mistake")
            case "unfit":
                answer.ok(object())
            case "big":
                answer.ok("x" * request["size"])
            case "twice":
                answer.ok(1)
                answer.ok(2)
                answer.fail("guest", "3")
            case _:
                answer.ok(request.get("what"))

    def connect(self) -> Client:
        self.clients.append(Client(self.path))
        return self.clients[-1]

    def on_loop(self, fn: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            fn()
            done.set()

        self.loop.call_soon(run)
        assert done.wait(SECONDS)

    def eventually(self, look: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not look():
            assert time.monotonic() < end
            time.sleep(0.005)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.loop.stop()
        self.server.close()


class Client:
    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(path))
        self.file = self.sock.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reply(self) -> Any:
        line = self.file.readline()
        assert line.endswith(b"\n"), "the connection ended"
        return json.loads(line)

    def ask(self, do: str, **more: Any) -> Any:
        self.send(json.dumps({"do": do, **more}).encode() + b"\n")
        return self.reply()

    def ended(self) -> bool:
        try:
            return self.file.readline() == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()
    assert world.faults == []
    assert not world.server.clients


def test_one_reply_for_each_request_in_order_with_its_id(world: World) -> None:
    client = world.connect()
    client.send(b"".join(b'{"do":"echo","id":%d,"what":"%d"}\n' % (n, n) for n in range(100)))
    assert [client.reply() for _ in range(100)] == [
        {"ok": True, "result": str(n), "id": n} for n in range(100)
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"hello",
        b"[]",
        b"1",
        b'"do"',
        b"{}",
        b'{"do": 1}',
        b'{"do": null}',
        b"\xff\xfe",
        b'{"do": "echo"} {"do": "echo"}',
        b"[" * 50000,
        b'{"a":' * 10000,
        b"9" * 60000,
        b'{"do": "echo", "id": NaN',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_what_is_no_request_is_told_so_and_the_next_one_is_answered(world: World, line: bytes) -> None:
    client = world.connect()
    client.send(line + b"\n")
    reply = client.reply()
    assert (reply["ok"], reply["kind"]) == (False, "usage")
    assert "\n" not in reply["error"]
    assert client.ask("echo", what="still here")["result"] == "still here"
    assert len(world.seen) == 1


def test_empty_lines_are_nothing(world: World) -> None:
    client = world.connect()
    client.send(b"\n  \n\r\n")
    assert client.ask("echo", what=1)["result"] == 1


def test_the_last_request_needs_no_newline_and_a_half_closed_client_gets_its_reply(world: World) -> None:
    client = world.connect()
    client.send(b'{"do":"echo","what":1}\n{"do":"hold"}\n{"do":"echo","what":2}')
    client.sock.shutdown(socket.SHUT_WR)
    assert client.reply()["result"] == 1
    world.eventually(lambda: world.held)
    world.on_loop(lambda: world.held[0].ok("at last"))
    assert client.reply()["result"] == "at last"
    assert client.reply()["result"] == 2
    assert client.ended()


@pytest.mark.parametrize("size", [MAX_LINE + 1, 3 * MAX_LINE, 100 * MAX_LINE])
def test_a_line_without_end_ends_the_connection(world: World, size: int) -> None:
    client, other = world.connect(), world.connect()

    def flood() -> None:
        try:
            client.send(b"x" * size)
        except OSError:
            return

    sender = threading.Thread(target=flood)
    sender.start()
    reply = client.reply()
    assert (reply["ok"], reply["kind"]) == (False, "usage")
    assert "bytes without a newline" in reply["error"]
    assert client.ended()
    sender.join(SECONDS)
    assert not sender.is_alive()
    assert other.ask("echo", what=1)["ok"]


def test_who_sends_ahead_of_a_reply_without_end_is_dropped(world: World) -> None:
    client = world.connect()
    client.send(b'{"do":"hold"}\n')
    world.eventually(lambda: world.held)
    client.send(b'{"do":"echo"}\n' * (MAX_LINE // 14 + 1))
    assert "ahead of a reply" in client.reply()["error"]
    assert client.ended()
    assert not world.held[0].wanted
    world.on_loop(world.held[0].ok)
    assert len(world.seen) == 1


def test_more_clients_than_may_be_are_told_and_room_comes_back(world: World) -> None:
    clients = [world.connect() for _ in range(MAX_CONNECTIONS)]
    assert all(client.ask("echo", what=1)["ok"] for client in clients)
    late = world.connect()
    assert late.reply()["kind"] == "busy"
    assert late.ended()
    clients[3].sock.close()
    clients[3].file.close()
    world.eventually(lambda: len(world.server.clients) < MAX_CONNECTIONS)
    assert world.connect().ask("echo", what=2)["result"] == 2


def test_a_client_that_leaves_before_its_answer_harms_nobody(world: World) -> None:
    for count in range(1, 3 * MAX_CONNECTIONS + 1):
        client = world.connect()
        client.send(b'{"do":"hold"}\n{"do":"echo"}\n{"do":')
        world.eventually(lambda count=count: len(world.held) == count)
        client.sock.close()
        client.file.close()
        world.eventually(lambda: not world.server.clients)

    assert not [one for one in world.held if one.timer is not None and one.timer.active], "nobody waits"

    def answer() -> None:
        for held in world.held:
            held.ok("too late")

    world.on_loop(answer)
    world.eventually(lambda: not world.server.clients)
    assert world.connect().ask("echo", what=1)["ok"]


def test_what_a_client_asked_that_has_left_by_now_is_not_done(world: World) -> None:
    """A process that was stopped for long would quit, or grow a disk, when it goes on."""
    standing, go_on = threading.Event(), threading.Event()
    world.loop.call_soon(lambda: (standing.set(), go_on.wait(SECONDS)))
    assert standing.wait(SECONDS)
    for half in (True, False):
        client = world.connect()
        client.send(b'{"do":"echo","what":1}\n')
        if half:  # it takes its reply
            client.sock.shutdown(socket.SHUT_WR)
        else:
            client.sock.close()
            client.file.close()
    go_on.set()
    assert world.clients[0].reply()["ok"]
    world.eventually(lambda: not world.server.clients)
    assert world.connect().ask("echo", what=2)["ok"]
    assert [request["what"] for request in world.seen] == [1, 2]


def test_a_reader_that_is_slow_gets_all_of_it_and_blocks_nobody(world: World) -> None:
    slow, other = world.connect(), world.connect()
    size = 3 << 20
    slow.send(b'{"do":"big","size":%d}\n{"do":"echo","what":"behind"}\n' % size)
    world.eventually(lambda: world.seen)
    for n in range(20):
        assert other.ask("echo", what=n)["result"] == n
    assert {"do": "echo", "what": "behind"} not in world.seen  # it waits for room
    assert slow.reply()["result"] == "x" * size
    assert slow.reply()["result"] == "behind"


def test_a_reader_that_never_reads_is_dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "READ_SECONDS", 0.2)
    client = world.connect()
    client.send(b'{"do":"big","size":3000000}\n')
    world.eventually(lambda: world.seen)
    world.eventually(lambda: not world.server.clients)
    assert world.connect().ask("echo", what=1)["ok"]


def test_a_reply_beyond_bounds_is_an_error(world: World) -> None:
    client = world.connect()
    reply = client.ask("big", size=control_socket.MAX_REPLY, id=7)
    assert (reply["ok"], reply["kind"], reply["id"]) == (False, "internal", 7)
    assert client.ask("echo", what=1)["ok"]


def test_mistakes_of_ours_are_replies_too(world: World) -> None:
    client = world.connect()
    reply = client.ask("raise")
    assert (reply["kind"], reply["error"]) == ("internal", "raise: RuntimeError: a mistake")
    assert client.ask("unfit")["kind"] == "internal"
    assert client.ask("twice")["result"] == 1
    assert client.ask("echo", what="in step")["result"] == "in step"


def test_closing_drops_clients_and_their_requests(tmp_path: Path) -> None:
    world = World(tmp_path)
    clients = [world.connect() for _ in range(3)]
    clients[0].send(b'{"do":"hold"}\n')
    clients[1].send(b'{"do":"big","size":3000000}\n')
    world.eventually(lambda: len(world.seen) == 2)
    world.loop.stop()
    world.held[0].ok("the last word")
    world.server.close()
    assert clients[0].reply()["result"] == "the last word"
    assert clients[0].ended()
    assert clients[2].ended()
    world.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [b'{"do":"echo"}', b'{"do":"raise"}', b'{"do":"twice","id":[1]}', b'{"do":"unfit"}']
            ),
        ),
        max_size=30,
    ),
    cut=st.integers(1, 50),
)
def test_whatever_comes_every_line_has_one_reply(world: World, lines: list[bytes], cut: int) -> None:
    """Blank lines have none. However the bytes are cut into pieces."""
    client = world.connect()
    data = b"\n".join(lines) + b"\n"
    expected = sum(bool(line.strip()) for line in data.split(b"\n"))
    for start in range(0, len(data), cut):
        client.send(data[start : start + cut])
    client.send(b'{"do":"echo","what":"the end","id":"end"}\n')
    replies = [client.reply() for _ in range(expected + 1)]
    assert replies[-1] == {"ok": True, "result": "the end", "id": "end"}
    assert all(isinstance(reply["ok"], bool) for reply in replies)
    client.sock.close()
    client.file.close()
    world.eventually(lambda: not world.server.clients)
