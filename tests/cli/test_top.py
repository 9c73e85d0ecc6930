"""`hvkvm top`: rates out of two looks, and a real VM looked at until it ends."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import guest_images
import pytest
from running_vm import SECONDS, command_line, environment, running_vm

from hvkvm.abi import vmbus
from hvkvm.cli import top
from hvkvm.cli.top import Look, lines, parse
from hvkvm.devices.synth.keyboard import Keyboard
from hvkvm.errors import ConfigError
from hvkvm.testing.vmbus_loopback import Loopback


def look(loop: Loopback, at: float, exits: int, sent: int) -> Look:
    info: dict[str, Any] = {
        "name": "demo",
        "uptime": at,
        "resets": 0,
        "synic": "user",
        "vmbus_version": "5.3",
    }
    inspect = {
        "vcpus": [{"name": "vcpu0", "state": "running guest", "exits": {"KVM_EXIT_IO": exits}}],
        "vmbus": loop.host.snapshot(),
        "devices": {"net0": {"sent": {"bytes": sent}, "name": "x", "up": True}},
        "pci": {"nvme": {"02": {"disk": {"operations": {"read": {"requests": exits}}}}}, "virtio": {}},
    }
    found = Look(info, inspect)
    found.at = at
    return found


def test_rates_are_differences_by_time() -> None:
    loop = Loopback()
    try:
        keyboard = Keyboard()
        loop.host.add(keyboard)
        loop.connect(vmbus.VERSION_WIN10_V5_3)
        channel = loop.client.by_interface(vmbus.HV_KBD_GUID)
        loop.open(channel)
        before = look(loop, 10.0, 100, 0)
        channel.opened.send(b"\1\0\0\0\0\0\1\0")
        loop.run()
        keyboard.type("hello")
        loop.run()
        picture = lines(before, look(loop, 12.0, 5100, 3_000_000))
    finally:
        loop.close()
    text = "\n".join(picture)
    assert picture[0] == "demo: up 12 s, 0 resets, SynIC user, VMBus 5.3"
    assert "vcpu0           2500  running guest: IO 2500" in text
    (row,) = [line for line in picture if line.startswith("keyboard")]
    assert row.split()[1:5] == ["0.5", "0%", "5.5", "0%"]
    assert "sent.bytes 1.5M" in text
    assert "nvme02                   disk.operations.read.requests 2500" in text


def test_a_terminal_that_has_no_size_is_taken_for_a_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a new pty, or of a serial line, is 0 by 0."""
    picture = ["x" * 100] * 100
    monkeypatch.setattr(os, "get_terminal_size", lambda _fd=1: os.terminal_size((0, 0)))
    assert top._fit(picture) == ["x" * 79] * 23
    monkeypatch.setattr(os, "get_terminal_size", lambda _fd=1: os.terminal_size((40, 10)))
    assert top._fit(picture) == ["x" * 39] * 9


def test_odd_options_are_refused() -> None:
    for flag, values in (
        ("--interval", ("x", "0", "nan", "-1", "3601")),
        ("--count", ("0", "x", "-1", "1.5", "9" * 5000)),
    ):
        for value in values:
            with pytest.raises(ConfigError) as caught:
                parse([flag, value])
            assert str(caught.value).startswith(f"{flag} {value}: not ")
    assert (parse([]).interval, parse([]).count) == (1, None)
    given = parse(["--interval", "0.5", "--count", "3"])
    assert (given.interval, given.count) == (0.5, 3)


@pytest.mark.kvm
def test_a_vm_is_looked_at_until_it_ends(tmp_path: Path) -> None:
    kernel = guest_images.image("agent")
    options = (
        "--kernel",
        kernel,
        "--memory",
        "64M",
        "--hv",
        "none",
        "--quiet",
        "--cpus",
        "2",
        "--name",
        "one",
    )
    with running_vm(tmp_path, *options) as vm:
        vm.wait_until_listening()
        within = {**environment(vm.runtime), "TERM": "xterm"}
        command = command_line("top", "--interval", "0.1", "--count", "2")
        done = subprocess.run(
            command, env=within, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("one: up ") == 2
        assert done.stdout.count("vcpu1 ") == 2
        assert "\x1b" not in done.stdout
        master, slave = pty.openpty()
        shown = subprocess.Popen(command_line("top", "--interval", "0.1"), env=within, stdout=slave)
        os.close(slave)
        data = b""
        while data.count(b"\x1b[H\x1b[2J") < 2:
            data += os.read(master, 4096)
        vm.ctl("quit")
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(master, 4096):
                data += piece
        os.close(master)
        assert shown.wait(SECONDS) == 0
        assert b"the VM has ended" in data
