"""Replays: the same each time, equal to what was recorded, and different where the host's code is."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvkvm.abi import ic, keyboard, pcapng, record_format, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.record_format import Entry, Kind
from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.devices.synth.shutdown import Shutdown
from hvkvm.devices.synth.timesync import TimeSync
from hvkvm.record import explain
from hvkvm.record.recorder import Recorder
from hvkvm.testing.device import ScriptedDevice
from hvkvm.testing.replay import MAX_GAP_SECONDS, replay
from hvkvm.testing.vmbus_loopback import MIB, Loopback
from hvkvm.vmbus.server import Server

KIND = "11111111-2222-3333-4444-555555555555"


class _Clock:
    """Records in the loopback's time, which is not the host's."""

    def __init__(self) -> None:
        self.loop: Loopback | None = None
        self.extra = 0

    def __call__(self) -> int:
        self.extra += 1000
        return self.extra + (0 if self.loop is None else int(self.loop.now * 1e9))


def recording(
    path: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 1, version: int = vmbus.VERSION_WIN10_V5_3
) -> None:
    """A guest with a heartbeat, a clock, a keyboard and a device of a test."""
    clock = _Clock()
    monkeypatch.setattr("hvkvm.record.recorder.time_ns", clock)
    recorder = Recorder(path, "full", {"cpus": 2, "memory": 4 * MIB, "vmbus_max_version": "5.3"})
    recorder.start()
    loop = clock.loop = Loopback(random=Random(seed), max_version=vmbus.VERSION_WIN10_V5_3)
    loop.host.listen(recorder)
    echo = ScriptedDevice(KIND, name="echo")
    for device in (
        Heartbeat(loop.call_later),
        Shutdown(),
        TimeSync(loop.call_later, lambda: 5),
        Keyboard(),
    ):
        loop.host.add(device)
    echo.offer(loop)
    loop.connect(version)
    for channel in list(loop.client.offers.values()):
        loop.open(channel, out_pages=4, in_pages=4)
    loop.client.by_interface(vmbus.HV_KBD_GUID).opened.send(b"\1\0\0\0\0\0\1\0", trans_id=5)
    loop.client.by_interface(vmbus.guid(KIND)).opened.send(b"question", trans_id=9)
    echo.expect(b"question")
    components = [
        loop.client.by_interface(guid)
        for guid in (vmbus.HV_HEART_BEAT_GUID, vmbus.HV_SHUTDOWN_GUID, vmbus.HV_TS_GUID)
    ]
    for _ in range(80):
        loop.run()
        for channel in components:
            packets, channel.received = channel.received, []
            for packet in packets:
                channel.opened.send(answer(packet.payload), trans_id=packet.trans_id)
        loop.run()
        loop.advance(0.25)
    echo.rescind()
    loop.run()
    loop.client.release(loop.client.by_interface(vmbus.guid(KIND)))
    loop.run()
    loop.client.contact(version)  # as a kexec'ed kernel does
    loop.run()
    loop.close()
    recorder.close()


def answer(payload: bytes) -> bytes:
    """What Linux's utility drivers answer: the same message, changed."""
    raw = bytearray(payload)
    raw[25] = ic.ICMSGHDRFLAG_TRANSACTION | ic.ICMSGHDRFLAG_RESPONSE
    if int.from_bytes(raw[12:14], "little") == ic.ICMSGTYPE_NEGOTIATE:
        body = ic.negotiate_body(((3, 0),), ((3, 0),))
        raw[28 : 28 + len(body)] = body
    return bytes(raw)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recording(tmp_path / "r", monkeypatch)
    monkeypatch.undo()
    return tmp_path / "r"


def test_the_same_code_says_the_same_each_time(path: Path) -> None:
    data = path.read_bytes()
    results = {repr(replay(io.BytesIO(data))) for _ in range(100)}
    assert len(results) == 1
    result = replay(io.BytesIO(data))
    assert result.difference is None, result.difference
    assert result.messages > 30
    assert result.packets > 12
    assert result.skipped == {"data": 1}


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_events_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    recording(tmp_path / "r", monkeypatch, seed)
    result = replay(io.BytesIO((tmp_path / "r").read_bytes()))
    assert result.difference is None, result.difference


@pytest.mark.parametrize("version", vmbus.HOST_VERSIONS[:2], ids=vmbus.version_text)
def test_old_guests_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Those whose channels are signalled by an interrupt page."""
    recording(tmp_path / "r", monkeypatch, version=version)
    data = (tmp_path / "r").read_bytes()
    result = replay(io.BytesIO(data))
    assert result.difference is None, result.difference
    assert result.packets > 12
    shown = list(explain.lines(io.BytesIO(data)))
    assert any(f"INITIATE_CONTACT version={vmbus.version_text(version)} " in line for line in shown)
    assert any("interrupt_page=0x1000" in line for line in shown)
    assert sum("heartbeat: signal" in line for line in shown) > 2


def test_a_change_of_a_device_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvkvm.devices.synth.heartbeat.Heartbeat.MESSAGE_VERSIONS", ((3, 0),))
    difference = replay(io.BytesIO(path.read_bytes())).difference
    assert difference is not None
    assert "ICMSGTYPE_NEGOTIATE" in difference.recorded
    assert "icmsg_vercnt=2" in difference.recorded
    assert "icmsg_vercnt=1" in difference.now


def test_a_change_of_the_bus_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Server._send

    def send(self: Server, what: int | bytes, **values: object) -> None:
        if what == wire.ALLOFFERS_DELIVERED:
            return
        original(self, what, **values)

    monkeypatch.setattr(Server, "_send", send)
    difference = replay(io.BytesIO(path.read_bytes())).difference
    assert difference is not None
    assert difference.recorded.endswith("ALLOFFERS_DELIVERED")
    assert "ALLOFFERS" not in difference.now


def test_a_host_that_falls_silent_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keyboard, "received", lambda self, packet: None)
    difference = replay(io.BytesIO(path.read_bytes())).difference
    assert difference is not None
    assert difference.now == "nothing"
    assert difference.recorded.startswith(" host> kbd")


def test_the_command_says_it(path: Path, tmp_path: Path) -> None:
    def run(name: object, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hvkvm", "replay", str(name), *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = run(path)
    assert (good.returncode, good.stderr) == (0, "")
    assert "packets of the host agree; packets left out" in good.stdout
    raw = path.read_bytes()
    other = tmp_path / "other"
    accepted, refused = (keyboard.protocol_response.pack(2, status) for status in (1, 0))
    assert accepted in raw
    other.write_bytes(raw.replace(accepted, refused))
    bad = run(other)
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "recorded:  host> kbd 4: VM_PKT_DATA_INBAND type=SYNTH_KBD_PROTOCOL_RESPONSE\n" in bad.stdout
    assert "now:      VM_PKT_DATA_INBAND type=SYNTH_KBD_PROTOCOL_RESPONSE proto_status=1\n" in bad.stdout
    assert '"difference": {"number"' in run(other, "--json").stdout
    for name, text in (("/dev/null", "it is empty"), (__file__, "record with"), ("no", "No such file")):
        result = run(name)
        assert result.returncode == 2
        assert text in result.stderr


def made(*entries: Entry) -> bytes:
    data = pcapng.section_header("x") + pcapng.interface_description(147, record_format.LINK_NAME)
    return data + b"".join(
        pcapng.enhanced_packet(0, at * 1000, entry.pack()) for at, entry in enumerate(entries)
    )


@pytest.mark.parametrize("step", [40 * 365 * 86400, 3600, -3600])
def test_a_clock_that_was_set_is_no_difference_and_costs_no_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The recorded host's, in the middle of the recording: by NTP from 1970 on, say."""
    entries = list(explain.read(io.BytesIO(path.read_bytes())))
    data = pcapng.section_header("x") + pcapng.interface_description(147, record_format.LINK_NAME)
    for number, (at, entry) in enumerate(entries):
        moved = step if number >= len(entries) // 2 else 0
        data += pcapng.enhanced_packet(0, at + 10**13 + moved * 10**9, entry.pack())
    passed = []
    advance = Loopback.advance

    def noted(self: Loopback, seconds: float) -> None:
        passed.append(seconds)
        advance(self, min(seconds, 7200.0))

    monkeypatch.setattr(Loopback, "advance", noted)
    result = replay(io.BytesIO(data))
    assert result.difference is None, result.difference
    assert result.packets > 12
    assert max(passed) <= MAX_GAP_SECONDS


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Kind)),
            st.booleans(),
            st.one_of(
                st.binary(max_size=60),
                st.sampled_from(sorted(wire.KINDS)).flatmap(
                    lambda number: st.binary(min_size=200, max_size=200).map(
                        lambda tail: number.to_bytes(4, "little") + bytes(4) + tail
                    )
                ),
            ),
            st.integers(0, 5),
            st.sampled_from([vmbus.HV_KBD_GUID, bytes(16)]),
        ).map(lambda fields: Entry(*fields)),
        max_size=12,
    ),
    st.sampled_from([b'{"cpus": 1, "memory": 4194304}', b"[]", b'{"cpus": "x"}', b"\xff"]),
)
def test_any_recording_is_played_or_refused(entries: list[Entry], facts: bytes) -> None:
    with contextlib.suppress(ValueError):
        replay(io.BytesIO(made(Entry(Kind.MACHINE, True, facts), *entries)))
