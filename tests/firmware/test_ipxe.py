"""iPXE, as packaged, on our VMBus and NIC by its own drivers: another client than Linux, which boots one.

U-Boot starts it. The packaged OVMF does so too, but writes CR8 with interrupts of VMBus under way, which the
nested lab's QEMU dies of in most runs. The host's kernel is the peer, behind a tap: over passt of 2023, which
drops what a slow guest has no room for and gives up connections whose SYN comes twice, it takes minutes.
"""

from __future__ import annotations

import gzip
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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

pytestmark = [pytest.mark.hyperv, pytest.mark.firmware, pytest.mark.timeout(4 * SECONDS)]

HOST, GUEST = "10.98.0.1", "10.98.0.2"
TAP = "hvkvmipxe"
MAC = "02:00:00:00:00:69"

ATTEMPTS = 3
"""iPXE gives the host a second for each answer, which is little on a busy one."""

DHCP = f"""interface {TAP}
start {GUEST}
end {GUEST}
static_lease {MAC} {GUEST}
option subnet 255.255.255.0
"""
"""For busybox's server; a static lease, for which it need not ask around first."""

SCRIPT = """#!ipxe
dhcp net0 || dhcp net0 || goto failed
echo ipxe: ${{net0/mac}} is ${{net0/ip}} by ${{net0/dhcp-server}}
set tries:int32 0
:again
inc tries
iseq ${{tries}} 4 && goto failed ||
imgfree
kernel http://{host}:{port}/vmlinuz initrd=initrd {append} || goto again
initrd --name initrd http://{host}:{port}/initrd || goto again
boot
:failed
echo ipxe: failed
exit
"""

APPEND = "console=ttyS0 quiet efi=noruntime disable_mtrr_trim"
"""U-Boot leaves MTRRs as they are, and Linux would take all of RAM for uncached."""

INIT = """
echo linux: $(uname -r)
until [ -d /sys/class/net/eth0 ]; do sleep 0.1; done
echo linux has $(cat /sys/class/net/eth0/address)
poweroff -f
"""


@contextmanager
def http_server(folder: Path) -> Iterator[int]:
    """Serves `folder` on this host; the port."""
    server = ThreadingHTTPServer(("", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def dhcp_server(folder: Path) -> Iterator[None]:
    """Serves one address on TAP, which is there."""
    settings = folder / "udhcpd.conf"
    settings.write_text(f"{DHCP}lease_file {folder}/leases\npidfile {folder}/pid\n")
    (folder / "leases").touch()
    words = [artifact("HVKVM_GUEST_BUSYBOX"), "udhcpd", "-f", settings]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.terminate()


def test_ipxe_gets_an_address_and_boots_linux_over_http(tmp_path: Path) -> None:
    """3.0, UNLOAD, 0.13: interrupt page and its doorbell, NVSP 1, rings of a page; then Linux."""
    ipxe = artifact("HVKVM_NEWEST_IPXE").read_bytes()
    served = tmp_path / "served"
    served.mkdir()
    (served / "vmlinuz").write_bytes(artifact("HVKVM_NEWER_KERNEL").read_bytes())
    initrd = initramfs.build(
        ("sh", "-c", INIT),
        busybox=artifact("HVKVM_GUEST_BUSYBOX"),
        modules=("hv_vmbus", "hv_netvsc"),
        kernel_modules_dir=artifact("HVKVM_NEWER_MODULES"),
    )
    (served / "initrd").write_bytes(gzip.compress(initrd, 6))
    seen: list[str] = []

    def trace(to_host: bool, message: Message) -> None:
        if to_host and message.kind.name == "INITIATE_CONTACT":
            seen.append(version_text(message["version"]))
        elif to_host and message.kind.name == "UNLOAD":
            seen.append(message.kind.name)

    with http_server(served) as port:
        script = SCRIPT.format(host=HOST, port=port, append=APPEND).encode()
        disk = fat_disk(tmp_path / "disk", {"ipxe.efi": ipxe, "autoexec.ipxe": script})
        config = MachineConfig(
            firmware=artifact("HVKVM_GUEST_U_BOOT").parents[1] / "qemu-x86_64" / "u-boot.rom",
            memory=512 << 20,
            disks=(DiskSpec(str(disk), bus="nvme"),),
            nets=(NicSpec("create", mac=MAC, ip=(f"{HOST}/24",), name=TAP),),
            vmbus="on",
            timeout=3 * SECONDS,
        )
        with Machine(config) as machine, dhcp_server(tmp_path):
            guest = LinuxGuest(machine)
            guest.bus.host.server.trace = trace
            guest.start()
            console = Console(guest)
            console.stop_autoboot()
            console.run("nvme scan")
            assert "bytes read" in console.run("load nvme 0 0x1000000 ipxe.efi"), guest.report()
            for _ in range(ATTEMPTS):
                if "linux: " in console.run("bootefi 0x1000000", until="linux: ", seconds=3 * SECONDS):
                    break
            outcome = guest.finish()
            assert f"ipxe: {MAC} is {GUEST} by {HOST}" in guest.text, guest.report()
            assert "linux: 6." in guest.text, guest.report()
            assert f"linux has {MAC}" in guest.text, guest.report()
            assert seen[:3] == ["3.0", "UNLOAD", "0.13"]
            assert seen[-2:] == ["UNLOAD", "5.3"]
            assert outcome.ending is Ending.POWERED_OFF
