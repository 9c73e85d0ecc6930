"""Runs with every kind of wire, ended in every way: no process, interface or socket of theirs is left.

HVKVM_NET_ENDINGS says how many runs; `make soak-nics` makes 200.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import guest_images
import kernel_images
import pytest
from running_vm import running_vm
from tiny_guests import TRIPLE_FAULT

from tests.net.conftest import needs_taps

ENDINGS = ("quit", "interrupt", "terminate", "kill", "triple fault", "bad flag", "full")
SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}
RUNS = int(os.environ.get("HVKVM_NET_ENDINGS", len(ENDINGS)))

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.timeout(max(300, RUNS * 30)),
    needs_taps,
    pytest.mark.skipif(shutil.which("passt") is None, reason="no passt; make setup installs it"),
]


def passts(folder: Path) -> set[int]:
    """The passts that a run with its control socket in `folder` has started: they have its environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "comm").read_text().startswith("passt") and os.fsencode(folder) in (
                process / "environ"
            ).read_bytes():
                found.add(int(process.name))
    return found


def wait_for_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 60)[0], Path(f"/proc/{pid}/status").read_text()
    finally:
        os.close(fd)


def test_nothing_is_left_of_a_run_however_it_ends(tmp_path: Path, netns) -> None:
    crash = tmp_path / "crash"
    crash.write_bytes(kernel_images.multiboot(TRIPLE_FAULT))
    wire, capture = tmp_path / "wire", tmp_path / "capture"
    for number in range(RUNS):
        ending = ENDINGS[number % len(ENDINGS)]
        kernel = crash if ending == "triple fault" else guest_images.image("agent")
        nets = ["user", f"create,netns={netns.name},ip=198.51.100.1/24", f"listen={wire},pcap={capture}"]
        if ending == "bad flag":
            nets.append("tap=no-such-tap")
        elif ending == "full":
            nets[2] = f"listen={wire},pcap=/dev/full"
        flags = [word for net in random.Random(number).sample(nets, len(nets)) for word in ("--net", net)]
        options = (
            "--kernel",
            kernel,
            "--memory",
            "64M",
            "--synic",
            "user",
            "--vmbus",
            "on",
            "--quiet",
            *flags,
        )
        with running_vm(tmp_path, *options) as vm:
            if ending not in ("triple fault", "bad flag"):
                vm.wait_until_listening()
                assert {nic["kind"] for nic in vm.json("net", "list")} == {"user", "tap", "socket"}
                ours = {
                    str(nic["wire"]["passt"]) for nic in vm.json("net", "stats") if "passt" in nic["wire"]
                }
                assert len(ours) == 1
                if ending in SIGNALS:
                    vm.process.send_signal(SIGNALS[ending])
                else:
                    vm.ctl("quit")
            status = vm.finish()
        assert (status == 2) == (ending == "bad flag"), (ending, status, vm.report())
        for pid in passts(tmp_path):
            wait_for_end(pid)
        assert netns.interfaces() == {"lo"}, ending
        # The file of a socket outlives a killed process; who wants the name next takes it.
        assert not wire.exists() or ending == "kill", ending
