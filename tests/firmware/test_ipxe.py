"""iPXE, as packaged, on our VMBus and NIC by its own drivers: another client than Linux, which boots one.

U-Boot starts it. The packaged OVMF does so too, but writes CR8 with interrupts of VMBus under way, which the
nested lab's QEMU dies of in most runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SOL_SOCKET

import pytest
from firmware_guest import fat_disk
from guest_artifacts import artifact
from linux_guest import SECONDS, LinuxGuest
from u_boot import Console

from hvkvm.abi.vmbus import version_text
from hvkvm.abi.vmbus_messages import Message
from hvkvm.boot import initramfs
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.outcome import Ending

pytestmark = [
    pytest.mark.hyperv,
    pytest.mark.timeout(2 * SECONDS),
    pytest.mark.skipif(
        not os.environ.get("HVKVM_SOAK"),
        reason="two minutes in the lab; HVKVM_SOAK=1 or make soak-linux runs it",
    ),
]

GATEWAY = "10.0.2.2"
"""passt's, which leads to this host."""
MAC = "02:00:00:00:00:69"
SO_MAX_PACING_RATE = 47
BYTES_A_SECOND = 300_000
"""passt drops what a slow guest has no room for, and a burst of it is sent many times."""

ATTEMPTS = 3
"""iPXE gives the host a second for each answer, which is little on a busy one."""

SCRIPT = """#!ipxe
dhcp net0 || dhcp net0 || goto failed
echo ipxe: ${{net0/mac}} is ${{net0/ip}} by ${{net0/dhcp-server}}
set tries:int32 0
:again
inc tries
iseq ${{tries}} 8 && goto failed ||
imgfree
kernel http://{gateway}:{port}/vmlinuz initrd=initrd {append} || goto again
initrd --name initrd http://{gateway}:{port}/initrd || goto again
boot
:failed
echo ipxe: failed
exit
"""
"""It tries again: passt of 2023 gives a connection up whose SYN comes twice, as it does after 0.25 s."""

APPEND = "console=ttyS0 quiet efi=noruntime disable_mtrr_trim"
"""U-Boot leaves MTRRs as they are, and Linux would take all of RAM for uncached."""

GUEST = """
echo linux: $(uname -r)
until [ -d /sys/class/net/eth0 ]; do sleep 0.1; done
echo linux has $(cat /sys/class/net/eth0/address)
poweroff -f
"""


class Paced(SimpleHTTPRequestHandler):
    """Files of a folder, no faster than a slow guest takes them."""

    def setup(self) -> None:
        """See `socketserver`."""
        self.request.setsockopt(SOL_SOCKET, SO_MAX_PACING_RATE, BYTES_A_SECOND)
        super().setup()


@contextmanager
def http_server(folder: Path) -> Iterator[int]:
    """Serves `folder` on this host's loopback; the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Paced, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_ipxe_gets_an_address_and_boots_linux_over_http(tmp_path: Path) -> None:
    """3.0, UNLOAD, 0.13: interrupt page and its doorbell, NVSP 1, rings of a page; then Linux."""
    ipxe = artifact("HVKVM_NEWEST_IPXE").read_bytes()
    served = tmp_path / "served"
    served.mkdir()
    (served / "vmlinuz").write_bytes(artifact("HVKVM_NEWER_KERNEL").read_bytes())
    (served / "initrd").write_bytes(
        initramfs.build(
            ("sh", "-c", GUEST),
            busybox=artifact("HVKVM_GUEST_BUSYBOX"),
            modules=("hv_vmbus", "hv_netvsc"),
            kernel_modules_dir=artifact("HVKVM_NEWER_MODULES"),
        )
    )
    seen: list[str] = []

    def trace(to_host: bool, message: Message) -> None:
        if to_host and message.kind.name == "INITIATE_CONTACT":
            seen.append(version_text(message["version"]))
        elif to_host and message.kind.name == "UNLOAD":
            seen.append(message.kind.name)

    with http_server(served) as port:
        script = SCRIPT.format(gateway=GATEWAY, port=port, append=APPEND).encode()
        disk = fat_disk(tmp_path / "disk", {"ipxe.efi": ipxe, "autoexec.ipxe": script})
        config = MachineConfig(
            firmware=artifact("HVKVM_GUEST_U_BOOT").parents[1] / "qemu-x86_64" / "u-boot.rom",
            memory=512 << 20,
            disks=(DiskSpec(str(disk), bus="nvme"),),
            nets=(NicSpec("user", mac=MAC),),
            vmbus="on",
            timeout=SECONDS,
        )
        with Machine(config) as machine:
            guest = LinuxGuest(machine)
            guest.bus.host.server.trace = trace
            guest.start()
            console = Console(guest)
            console.stop_autoboot()
            console.run("nvme scan")
            assert "bytes read" in console.run("load nvme 0 0x1000000 ipxe.efi"), guest.report()
            for _ in range(ATTEMPTS):
                if "linux: " in console.run("bootefi 0x1000000", until="linux: "):
                    break
            outcome = guest.finish()
            assert f"ipxe: {MAC} is 10.0.2.15 by {GATEWAY}" in guest.text, guest.report()
            assert "linux: 6." in guest.text, guest.report()
            assert f"linux has {MAC}" in guest.text, guest.report()
            assert seen[:3] == ["3.0", "UNLOAD", "0.13"]
            assert seen[-2:] == ["UNLOAD", "5.3"]
            assert outcome.ending is Ending.POWERED_OFF
