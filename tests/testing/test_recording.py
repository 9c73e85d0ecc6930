"""A recording of a bus: what is in it, in words and in Wireshark, and how it is bounded."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from dissected import columns, dissected, fields_of
from hypothesis import given
from hypothesis import strategies as st
from open_files import open_files

from hvkvm.abi import pcapng, record_format, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.record_format import Entry, Kind
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.devices.synth.kvp import Kvp
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.errors import ConfigError
from hvkvm.events import Event, Observer, Warned
from hvkvm.record import explain
from hvkvm.record.recorder import PACKET_BYTES, Recorder
from hvkvm.testing.device import ScriptedDevice
from hvkvm.testing.vmbus_loopback import Loopback

KIND = "11111111-2222-3333-4444-555555555555"


class Heard(Observer):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


def talk(recorder: Recorder, *, random: Random | None = None, rounds: int = 30) -> Loopback:
    """A guest with several devices that says what drivers say, and more; the loopback, to be closed."""
    loop = Loopback(random=random)
    loop.host.listen(recorder)
    echo = ScriptedDevice(KIND, name="echo")
    for device in (
        Heartbeat(loop.call_later),
        Keyboard(),
        Kvp(),
        TimeSync(loop.call_later, lambda: int(loop.now * 1e7)),
    ):
        loop.host.add(device)
    echo.offer(loop)
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    for channel in list(loop.client.offers.values()):
        loop.open(channel, out_pages=8, in_pages=8)
    keys = loop.client.by_interface(vmbus.HV_KBD_GUID)
    keys.opened.send(b"\1\0\0\0\0\0\1\0", trans_id=5)
    ours = loop.client.by_interface(vmbus.guid(KIND))
    for number in range(rounds):
        ours.opened.send(b"question %d" % number * 80, trans_id=number + 1, flags=1)
        loop.run()
        echo.complete(echo.expect(b"question"), b"answer")
        loop.advance(0.5)
        loop.run()
    loop.client.close(keys)
    loop.run()
    return loop


def recorded(path: Path, depth: str = "full", **options: int) -> list[Entry]:
    recorder = Recorder(path, depth, {"cpus": 1}, **options)  # type: ignore[arg-type]
    recorder.start()
    talk(recorder).close()
    recorder.close()
    with path.open("rb") as file:
        return [entry for _at, entry in explain.read(file)]


def test_every_message_and_every_packet_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "r.pcapng"
    recorder = Recorder(path, "full", {"cpus": 1})
    recorder.start()
    loop = talk(recorder, random=Random(5))
    opened = [entry for _c, entry in loop.host.devices._open.items()]
    read = {o._channel.relid: (o.io.reader.packets, o.io.writer.packets) for o in opened}
    loop.close()
    recorder.close()
    with path.open("rb") as file:
        entries = [entry for _at, entry in explain.read(file)]
    assert entries[0].kind is Kind.MACHINE
    assert read
    for relid, (from_guest, to_guest) in read.items():
        packets = [entry for entry in entries if entry.kind is Kind.PACKET and entry.relid == relid]
        assert sum(entry.to_host for entry in packets) == from_guest
        assert sum(not entry.to_host for entry in packets) == to_guest
    messages = [entry.data for entry in entries if entry.kind is Kind.MESSAGE]
    assert all(wire.parse(payload) is not None for payload in messages)
    sent = [message.payload for message in loop.client.messages]
    assert [payload for payload in messages if not wire.parse(payload).kind.to_host] == sent  # type: ignore[union-attr]


def test_depth_decides_how_much(tmp_path: Path) -> None:
    sizes = {}
    for depth in ("messages", "packets", "full"):
        path = tmp_path / depth
        entries = recorded(path, depth)
        sizes[depth] = path.stat().st_size
        packets = [entry for entry in entries if entry.kind is Kind.PACKET]
        assert bool(packets) == (depth != "messages")
        longest = max((len(entry.data) for entry in packets), default=0)
        assert (longest > PACKET_BYTES) == (depth == "full")
        assert any(entry.cut for entry in packets) == (depth == "packets")
    assert sizes["messages"] < sizes["packets"] < sizes["full"]


def test_words_for_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "r"
    recorded(path)
    with path.open("rb") as file:
        text = "\n".join(explain.lines(file))
    for line in (
        "machine: {",
        "INITIATE_CONTACT version=5.3",
        "channel opened: echo",
        "type=SYNTH_KBD_PROTOCOL_RESPONSE",
        "icmsgtype=ICMSGTYPE_NEGOTIATE",
        "host> echo: VM_PKT_COMP",
        "echo: signal",
        "channel closed: keyboard",
    ):
        assert line in text, line


def test_a_reader_that_is_slow_costs_entries_and_no_time(tmp_path: Path) -> None:
    """A pipe that is full: the bus goes on, memory is bounded, and the gap is in the file."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="nobody reads this pipe"):
        Recorder(path, "full", {})
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    heard = Heard()
    recorder = Recorder(path, "full", {}, observer=heard, max_waiting=100_000)
    recorder.start()
    loop = talk(recorder, rounds=300)
    assert recorder.lost > 0
    assert recorder._size <= 100_000
    data = bytearray()

    def read_all() -> None:
        os.set_blocking(reader, True)
        while piece := os.read(reader, 1 << 16):
            data.extend(piece)

    thread = threading.Thread(target=read_all)
    thread.start()
    closed = [channel for channel in loop.host.server.channels.all if channel.offer.name == "echo"]
    while recorder._size > 50_000:
        pass
    recorder.channel(closed[0], "closed")  # the first that there is room for again
    loop.close()
    recorder.close()
    thread.join()
    os.close(reader)
    entries = [entry for _at, entry in explain.read(io.BytesIO(bytes(data)))]
    assert sum(entry.value for entry in entries if entry.kind is Kind.LOST) == recorder.lost
    assert any("entries are lost" in str(event) for event in heard.events)


def test_a_full_disk_ends_the_recording_and_nothing_else() -> None:
    heard = Heard()
    recorder = Recorder(Path("/dev/full"), "full", {}, observer=heard)
    recorder.start()
    talk(recorder).close()
    recorder.close()
    assert any("No space left on device; the recording ends here" in str(event) for event in heard.events)


def test_whatever_fails_in_it_ends_the_recording_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Recorder, "_blocks", fail)
    heard = Heard()
    recorder = Recorder(tmp_path / "record", "full", {}, observer=heard)
    recorder.start()
    recorder.close()
    said = f"{tmp_path}/record: MemoryError: no more; the recording ends here"
    assert recorder.unwritten == said
    assert [event.text for event in heard.events if isinstance(event, Warned)] == [said]


def test_one_that_never_starts_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_text("of yesterday")
    recorder = Recorder(path, "full", {})
    recorder.close()
    assert path.read_text() == "of yesterday"
    assert str(path) not in open_files().values()
    assert not recorder.unwritten


def test_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(ConfigError, match=r"--record .*; name a file that can be written"):
            Recorder(path, "full", {})


@given(st.binary(max_size=200), st.integers(0, 100), st.integers(0, 255))
def test_any_file_is_read_or_refused(tail: bytes, at: int, byte: int) -> None:
    good = pcapng.section_header("x") + pcapng.interface_description(147, record_format.LINK_NAME)
    good += pcapng.enhanced_packet(0, 5, Entry(Kind.MESSAGE, True, b"\1\0\0\0\0\0\0\0").pack())
    bad = bytearray(good + tail)
    bad[at % len(good)] = byte
    for data in (bytes(bad), tail, good + tail):
        try:
            list(explain.lines(io.BytesIO(data)))
        except ValueError:
            continue


@given(st.binary(max_size=100))
def test_any_entry_has_words(data: bytes) -> None:
    for kind in Kind:
        for value in (0, 1, 9):
            assert explain.described(Entry(kind, True, data, 3, vmbus.HV_KVP_GUID, value=value)).isprintable()


Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]


def run_hvkvm(*arguments: object) -> subprocess.CompletedProcess[str]:
    import sys

    command = [sys.executable, "-m", "hvkvm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_explains_files_and_hexadecimal(tmp_path: Path) -> None:
    path = tmp_path / "r"
    recorded(path)
    told = run_hvkvm("explain", path)
    assert (told.returncode, told.stderr) == (0, "")
    assert "host> echo: VM_PKT_COMP" in told.stdout
    contact = wire.build(wire.INITIATE_CONTACT, version=vmbus.VERSION_WIN10_V5_3, interrupt_page=2)
    assert run_hvkvm("explain", contact.hex()).stdout == "INITIATE_CONTACT version=5.3 interrupt_page=2\n"
    kbd = run_hvkvm("explain", "--protocol", "kbd", "01 00 00 00", "00000100")
    assert kbd.stdout == "type=SYNTH_KBD_PROTOCOL_REQUEST version_requested=0x10000\n"
    for arguments, text in (
        (("explain",), "name a recording, or bytes in hexadecimal"),
        (("explain", "zz"), "neither a file that is there nor hexadecimal"),
        (("explain", "--protocol", "nil", "00"), "no protocol nil; there are heartbeat"),
        (("explain", "/dev/null"), "it is empty; give a recording"),
        (("explain", __file__), "give a recording"),
        (("explain", tmp_path), f"hvkvm: {tmp_path}: Is a directory; give a recording"),
        (("explain", ""), "name a recording, or bytes in hexadecimal"),
        (("explain", path, path), f"{path}: a file, and more beside it; name one recording alone"),
        (("explain", path, "--protocol", "kbd"), "--protocol: a recording says whose its packets are"),
        (("explain", "--wireshark", "--protocol", "kbd"), "or --wireshark alone"),
        (
            ("replay", tmp_path / "none"),
            f"hvkvm: {tmp_path / 'none'}: No such file or directory; record with",
        ),
    ):
        result = run_hvkvm(*arguments)
        assert result.returncode == 2
        assert text in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark (the package of that name)")
def test_tshark_shows_the_same_fields(tmp_path: Path) -> None:
    """Every field of every message and packet, by its raw bytes; and no packet is malformed."""
    path = tmp_path / "r.pcapng"
    entries = recorded(path)
    shown = dissected(path, tmp_path)
    assert len(shown) == len(entries)
    compared = 0
    for entry, fields in zip(entries, shown, strict=True):
        wanted = [(name, raw.hex()) for name, raw in fields_of(entry)]
        assert fields == wanted, explain.described(entry)
        compared += len(wanted)
    assert compared > 500
    told = columns(path, tmp_path)
    assert "INITIATE_CONTACT" in told
    assert "type=SYNTH_KBD_PROTOCOL_RESPONSE" in told


def test_a_start_that_is_interrupted_leaves_neither_file_nor_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes while the thread that runs already is waited for: its file was closed under it."""
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        begun.append(thread)
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    path = tmp_path / "record"
    recorder = Recorder(path, "full", {})
    with pytest.raises(KeyboardInterrupt):
        recorder.start()
    recorder.close()
    begun[0].join(100)
    assert not begun[0].is_alive()
    assert str(path) not in open_files().values()
    assert path.stat().st_size, "what is recorded by then is whole"
