"""The linux_guest fixture on stock kernels: warm copies, disks, and a driver under faults."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from hvkvm.abi import keyboard, vmbus
from hvkvm.errors import ConfigError
from hvkvm.testing import warm_guests
from hvkvm.testing.device import ScriptedDevice
from hvkvm.testing.linux import LinuxGuest

LinuxGuests = Callable[..., LinuxGuest]


@pytest.mark.hyperv
@pytest.mark.timeout(1800)
def test_copies_of_one_warm_guest(
    linux_guest: LinuxGuests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second does not boot, each has a command and files of its own, and status and streams are right."""
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path))
    made: list[Path] = []
    make = warm_guests._make
    monkeypatch.setattr(
        warm_guests, "_make", lambda boot, path, seconds: (made.append(path), make(boot, path, seconds))
    )
    for number in range(3):
        guest = linux_guest(
            f"cat /given; echo {number} >&2; exit {number}",
            warm=True,
            modules=["hv_utils"],
            files={"/given": f"file {number}\n"},
        )
        result = guest.run()
        assert (result.status, result.stdout, result.stderr) == (number, f"file {number}\n", f"{number}\n")
    assert len(made) == 1


def test_what_no_warm_guest_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="a warm guest has no initrd"):
        warm_guests.copy_of({"initrd": Path("x")}, 1)


def test_a_lock_that_is_never_let_go_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path))
    monkeypatch.setattr(warm_guests, "_digest", lambda _boot: "sort")
    (tmp_path / "warm").mkdir()
    with open(tmp_path / "warm/sort.lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process keeps .*/warm/sort\.lock locked; end it"):
            warm_guests.copy_of({}, 0.05)


@pytest.mark.hyperv
@pytest.mark.timeout(900)
def test_a_stock_driver_meets_a_faulty_host(
    linux_guest: LinuxGuests, vmbus_device: Callable[..., ScriptedDevice]
) -> None:
    """hyperv_keyboard: refused and offered anew, rescinded in use, keys doubled and out of order."""
    instance = "11111111-2222-3333-4444-555555555555"
    device = vmbus_device(vmbus.HV_KBD_GUID, instance=instance, name="ours")
    script = f"""
        drivers=/sys/bus/vmbus/drivers/hyperv_keyboard
        until [ -e $drivers/{instance} ]; do sleep 0.2; done
        echo bound
        event=$(echo /sys/bus/vmbus/devices/{instance}/serio*/input*/event*)
        dd if=/dev/input/${{event##*/}} bs=24 count=12 2>/dev/null | od -An -v -t u2 -w24 | grep -c " 1 "
        until ! [ -e $drivers/{instance} ]; do sleep 0.2; done
        echo gone
    """
    guest = linux_guest("sh", "-c", script, modules=["hv_vmbus", "hyperv_keyboard", "evdev"])
    device.offer(guest)
    guest.start()
    device.expect(keyboard.protocol_request.pack(1, keyboard.SYNTH_KBD_VERSION))
    device.send(keyboard.protocol_response.pack(2, 0))  # refused: the driver gives up
    device.wait_closed()
    device.rescind()
    device.offer(guest)
    device.wait_open(count=2)
    device.expect(keyboard.protocol_request.pack(1, keyboard.SYNTH_KBD_VERSION))
    device.send(keyboard.protocol_response.pack(2, keyboard.PROTOCOL_ACCEPTED))
    guest.wait_for_stdout("bound")
    device.duplicate()
    device.reorder(2)
    key = keyboard.KEYS["a"]
    for event in (key.event(), key.event(release=True), key.event()) * 6:
        device.send(event)
    guest.wait_for_stdout("bound\n")
    device.rescind()
    device.wait_closed()
    result = guest.run()
    assert result.stdout.splitlines()[-1] == "gone"
    assert result.status == 0
    assert result.dmesg[0].startswith("[    0.000000] Linux version ")
    assert any("hv_vmbus: Vmbus version:" in line for line in result.dmesg)
    assert "Linux version" not in result.console
