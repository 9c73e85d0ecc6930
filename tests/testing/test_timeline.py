"""Timelines: what is collected is bounded, and both files show it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import guest_images
import pytest

from hvkvm.abi import vmbus
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.record import timeline as module
from hvkvm.record.timeline import MAX_SAMPLES, Timeline
from hvkvm.record.timeline_files import chrome, svg
from hvkvm.testing.vmbus_loopback import Loopback


def collected() -> Timeline:
    timeline = Timeline(module.monotonic())
    timeline.mark("building")
    timeline.mark("kernel")
    loop = Loopback()
    loop.host.listen(timeline)
    loop.host.add(Keyboard())
    timeline.sample([{"KVM_EXIT_IO": 5}, {}])
    loop.connect(vmbus.VERSION_WIN10_V5_3)
    channel = loop.client.by_interface(vmbus.HV_KBD_GUID)
    loop.open(channel)
    moved = {"disk0 read": 4096, "disk0 write": 0, "net<0> sent": 60}
    timeline.sample([{"KVM_EXIT_IO": 9, "KVM_EXIT_<X>": 2}, {"KVM_EXIT_IO": 1}], moved)
    loop.client.close(channel)
    loop.run()
    loop.close()
    timeline.finish()
    return timeline


def test_chrome_has_phases_messages_channels_and_exits() -> None:
    events = chrome(collected())["traceEvents"]
    assert [e["name"] for e in events if e["ph"] == "X" and e["tid"] == 1] == ["building", "kernel", "VMBus"]
    assert "INITIATE_CONTACT" in {e["name"] for e in events if e["ph"] == "i"}
    assert [e["name"] for e in events if e["ph"] == "X" and e["tid"] >= 10] == ["keyboard"]
    rates = [e for e in events if e["ph"] == "C" and e["name"].endswith("bytes/s")]
    counters = [(e["name"], e["args"]) for e in events if e["ph"] == "C" and e not in rates]
    assert counters == [
        ("exits vcpu0", {"KVM_EXIT_<X>": 0, "KVM_EXIT_IO": 5}),
        ("exits vcpu1", {"KVM_EXIT_IO": 0}),
        ("exits vcpu0", {"KVM_EXIT_<X>": 2, "KVM_EXIT_IO": 4}),
        ("exits vcpu1", {"KVM_EXIT_IO": 1}),
    ]
    moved = [(e["name"], set(e["args"]), any(e["args"].values())) for e in rates]
    assert moved == [
        ("disk0 bytes/s", {"read"}, False),
        ("net<0> bytes/s", {"sent"}, False),
        ("disk0 bytes/s", {"read"}, True),
        ("net<0> bytes/s", {"sent"}, True),
    ]
    assert all(e["ts"] >= 0 and e.get("dur", 0) >= 0 for e in events if "ts" in e)


def test_svg_is_xml_with_the_same_in_it() -> None:
    text = svg(collected())
    root = ET.fromstring(text)
    titles = [element.text or "" for element in root.iter() if element.tag.endswith("title")]
    assert any(title.startswith("keyboard: ") for title in titles)
    assert "INITIATE_CONTACT" in titles
    assert any("KVM_EXIT_<X>" in title for title in titles)
    assert any(title.startswith("read: ") for title in titles)
    assert "disk0: " in text
    assert "net&lt;0&gt;: " in text


def test_bytes_are_those_since_the_sample_before() -> None:
    timeline = Timeline(0.0)
    for read in (100, 100, 250, 30):  # the last is a device in the place of another
        timeline.sample([{}], {"disk0 read": read})
    assert [sample.moved for sample in timeline.samples] == [
        {"disk0 read": 100},
        {},
        {"disk0 read": 150},
        {"disk0 read": 30},
    ]


def test_a_long_run_is_drawn_coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(0.0)
    for number in range(10 * MAX_SAMPLES):
        timeline.sample([{"KVM_EXIT_IO": number + 1}])
    assert len(timeline.samples) <= MAX_SAMPLES
    assert sum(sample.exits[0].get("KVM_EXIT_IO", 0) for sample in timeline.samples) == 10 * MAX_SAMPLES
    monkeypatch.setattr(module, "MAX_EVENTS", 3)
    for _ in range(10):
        timeline.received(b"\1\0\0\0\0\0\0\0")
    assert (len(timeline.instants), timeline.lost) == (3, 7)


@pytest.fixture
def wire_folder() -> Iterator[str]:
    """With a short path, as a socket's must be."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.mark.kvm
@pytest.mark.parametrize("suffix", [".json", ".svg"])
def test_a_run_is_drawn(tmp_path: Path, suffix: str, wire_folder: str) -> None:
    path = tmp_path / f"run{suffix}"
    kernel = guest_images.image("agent")
    command = [
        sys.executable,
        "-m",
        "hvkvm",
        "run",
        "--kernel",
        str(kernel),
        "--memory",
        "64M",
    ]
    command += ["--timeout", "1", "--quiet", "--control", "off", "--vmbus", "on", "--synic", "user"]
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    command += ["--disk", str(image), "--net", f"listen={wire_folder}/wire"]
    done = subprocess.run([*command, "--timeline", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 124, done
    text = path.read_text()
    if suffix == ".json":
        names = {event["name"] for event in json.loads(text)["traceEvents"]}
        assert {"building", "kernel", "exits vcpu0"} <= names
    else:
        ET.fromstring(text)
    refused = subprocess.run([*command, "--timeline", "x.png"], capture_output=True, text=True, check=False)
    assert (refused.returncode, "neither .svg nor .json" in refused.stderr) == (2, True)
    unwritable = str(tmp_path / "no" / f"x{suffix}")
    refused = subprocess.run(
        [*command, "--timeline", unwritable], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, "No such file" in refused.stderr) == (2, True)
