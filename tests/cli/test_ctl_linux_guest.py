"""`hvkvm ctl` against a distribution's kernel and its own daemons, over a real socket, in three boots."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_artifacts import artifact
from running_vm import RunningVm, running_vm

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1800)]

MODULES = ("hv_vmbus", "hv_utils", "hyperv_keyboard", "dummy")
ADDRESSES = ["10.20.30.40", "fd00:20::40"]
SYNIC = os.environ.get("HVKVM_SYNIC") or "kernel"

# hv_kvp_daemon and hv_vss_daemon go to the background by themselves.
SCRIPT = f"""
mkdir -p /var/lib/hyperv
for address in {" ".join(ADDRESSES)}; do ip addr add $address dev dummy0; done
ip link set dummy0 up
hv_kvp_daemon; hv_vss_daemon
until grep -q 'AT Translated Set 2 keyboard' /proc/bus/input/devices; do sleep 0.1; done
date -s '2001-02-03 04:05:06' >/dev/null
stty -F /dev/tty1 -echo
boot=$(cat /proc/sys/kernel/random/boot_id)
echo "boot <$boot>" >/dev/kmsg
echo "guest-ready year $(date +%Y) boot <$boot>"
read -r line </dev/tty1
echo "typed <$line>"
while [ $(date +%Y) = 2001 ]; do sleep 0.2; done
echo "guest-time <$(date +%s)>"
sleep 1000
"""


def options() -> tuple[object, ...]:
    daemons, libc = artifact("HVKVM_GUEST_HYPERV_DAEMONS"), artifact("HVKVM_GUEST_LIBC")
    files = {
        "/usr/sbin/hv_kvp_daemon": daemons / "hv_kvp_daemon",
        "/usr/sbin/hv_vss_daemon": daemons / "hv_vss_daemon",
        "/lib64/ld-linux-x86-64.so.2": libc / "ld-linux-x86-64.so.2",
        "/lib/x86_64-linux-gnu/libc.so.6": libc / "libc.so.6",
    }
    found: list[object] = ["--kernel", artifact("HVKVM_GUEST_KERNEL"), "--vmbus", "on", "--synic", SYNIC]
    found += ["--busybox", artifact("HVKVM_GUEST_BUSYBOX"), "--modules-dir", artifact("HVKVM_GUEST_MODULES")]
    for module in MODULES:
        found += ["--module", module]
    for guest, host in files.items():
        found += ["--file", f"{guest}={host}"]
    return (*found, "--append", "quiet", "--name", "linux", "--timeout", "1700", "--", "sh", "-c", SCRIPT)


def eventually(vm: RunningVm, look: Callable[[], bool], what: str) -> None:
    """Until `look()`; a test's limit of time ends it else."""
    while not look():
        assert vm.process.poll() is None, (what, vm.report())
        time.sleep(
            1
        )  # each look is a process, which takes a lab's processor for a second: the guest wants some


def between(text: str, before: str, after: str = ">") -> str:
    return text.split(before)[1].split(after)[0]


def see_the_guest(vm: RunningVm) -> None:
    """What can be asked of a guest that runs."""
    assert [one["name"] for one in vm.json("list")] == ["linux"]
    info = vm.json("info")
    assert (info["name"], info["pid"], info["resets"]) == ("linux", vm.process.pid, 0)
    assert info["synic"] == SYNIC
    assert info["exits"]["KVM_EXIT_IO"] > 0
    eventually(vm, lambda: vm.json("inspect")["devices"]["heartbeat"]["alive"], "heartbeat")
    assert vm.ctl("heartbeat").startswith("alive")
    tree = vm.json("inspect")
    assert (tree["vmbus"]["state"], tree["vmbus"]["version"]) == ("connected", "5.3")
    assert tree["vmbus"]["complaints"] == {}
    devices = tree["devices"]
    assert devices["shutdown"]["message_version"] == "3.2"
    assert devices["timesync"]["message_version"] == "4.0"
    assert devices["keyboard"]["driver"] is True
    channels = {channel["name"]: channel for channel in tree["vmbus"]["channels"]}
    heartbeat = channels["heartbeat"]
    assert (heartbeat["state"], heartbeat["open"]["interrupt_sint"]) == ("open", 2)
    assert heartbeat["open"]["to_guest"]["packets"] >= 2
    assert heartbeat["open"]["to_guest"]["free"] == heartbeat["open"]["to_guest"]["size"]
    assert sum(heartbeat["gpadls"].values()) >= 4
    assert any(route["sint"] == 2 for route in tree["synic"]["routes"])
    assert "vcpu0: " in vm.ctl("dump")
    dump = vm.ctl("dump")
    assert "synthetic timer 0: " in dump
    assert "sint 2: vector 0x" in dump
    assert "hvkvm: init" in vm.ctl("dump")
    see_its_log(vm)
    assert "kernel log, last lines:" in vm.ctl("dump")


def see_its_log(vm: RunningVm) -> None:
    """Read out of RAM, where the logs of boots before this one may lie too; none of it was on the console."""
    boot = vm.text.split("boot <")[-1].split(">")[0]
    lines = vm.ctl("dmesg").splitlines()
    assert lines[0].startswith("[    0.000000] Linux version 6.")
    assert any("hv_vmbus: Vmbus version:5.3" in line for line in lines)
    assert [line.split("boot <")[1] for line in lines if "boot <" in line] == [f"{boot}>"]
    assert "Linux version" not in vm.text


def use_the_daemons(vm: RunningVm) -> None:
    eventually(vm, lambda: vm.json("inspect")["devices"]["kvp"]["driver"], "kvp")
    release = artifact("HVKVM_GUEST_KERNEL").name.removeprefix("vmlinuz-")
    assert vm.ctl("kvp", "get", "OSBuildNumber") == f"{release}\n"
    assert set(ADDRESSES) <= set(vm.json("info")["addresses"])
    assert ADDRESSES[0] in vm.ctl("info")
    assert "ProcessorArchitecture=x86_64\n" in vm.ctl("kvp", "list")
    assert vm.ctl("kvp", "set", "colour", "blue green") == ""
    assert vm.ctl("kvp", "get", "colour") == "blue green\n"
    assert vm.json("kvp", "list", "--pool", "external") == {"colour": "blue green"}
    assert vm.ctl("kvp", "delete", "colour") == ""
    assert "no such key" in vm.ctl("kvp", "get", "colour", status=1)
    assert "no such key" in vm.ctl("kvp", "delete", "colour", status=1)
    eventually(vm, lambda: vm.json("inspect")["devices"]["vss"]["driver"], "vss")
    assert vm.ctl("freeze") == "the guest's file systems are frozen\n"
    assert "thaw it first" in vm.ctl("freeze", status=1)
    assert vm.ctl("thaw") == "the guest's file systems are thawed\n"


def set_the_clock(vm: RunningVm) -> None:
    """The guest went back to 2001 behind the host's SYNC at start; another one brings it right."""
    before = vm.json("time", "show")
    assert (before["version"], before["sent"]["sync"]) == ("4.0", 1)
    assert "guest-time" not in vm.text
    assert vm.json("time", "sync")["sent"]["sync"] == 2
    guest = int(between(vm.wait_for("guest-time"), "guest-time <"))
    assert abs(time.time() - guest) < 120  # not within the decades that it was off


def test_a_linux_guest_is_operated_from_outside(tmp_path: Path) -> None:
    with running_vm(tmp_path, *options()) as vm:
        vm.wait_for("guest-ready year 2001")
        see_the_guest(vm)
        use_the_daemons(vm)
        typed = r"""Hello, "World" ~!@#$%^&*()_+|{}:<>? `-=[]\;',./ 0123456789"""
        assert vm.ctl("keys", "--enter", "--", typed).endswith("key events sent\n")
        assert vm.wait_for("typed <").split("typed <")[1].split("\n")[0] == f"{typed}>"
        set_the_clock(vm)
        assert "refuses to hibernate" in vm.ctl("hibernate", status=1)
        assert vm.ctl("reboot", "--wait") == "the guest was reset (1 resets)\n"
        vm.wait_for("guest-ready", count=2)
        see_its_log(vm)
        # The kernel's own answer to these keys is to restart: they came by scan code, prefix and all.
        assert vm.ctl("keys", "--press", "ctrl-alt-delete") == "6 key events sent\n"
        vm.wait_for("guest-ready", count=3)
        assert vm.json("info")["resets"] == 2
        assert vm.ctl("shutdown", "--wait") == "the run has ended: powered off, status 0\n"
        assert vm.finish() == 0
    assert list(tmp_path.glob("hvkvm/*")) == []
