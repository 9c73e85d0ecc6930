"""A machine that goes on from a file and is reset: it boots what was booted, if that is what it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from saved_file import rewrite
from tiny_guests import SPIN, out, out_string

from hvkvm.abi import board
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.outcome import Ending

pytestmark = pytest.mark.kvm

MIB = 1 << 20
SECONDS = 60
LINE_STATUS = board.COM1_PORT + 5
# mov dx, port; in al, dx; test al, 1; jz back to the in
KEY = b"\x66\xba" + LINE_STATUS.to_bytes(2, "little") + b"\xec\xa8\x01\x74\xfb"
CODE = out_string(b"up.") + KEY + out(board.RESET_PORT, board.RESET_VALUE) + SPIN
"""Says that it is up, and resets the machine at the first key, which stays where it is."""

Make = Callable[[bytes], Path]


@pytest.fixture
def saved(guest: Make, tmp_path: Path) -> Path:
    """A file of that guest, which waits for the key."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"some bytes" * 1000)
    kernel = tmp_path / "kernel"
    guest(CODE).rename(kernel)
    with running(MachineConfig(kernel=kernel, initrd=initrd, memory=16 * MIB, hv="none")) as (machine, said):
        wait_for(machine, said, b"up.")
        machine.save(tmp_path / "saved")
    return tmp_path / "saved"


@contextmanager
def running(config: MachineConfig) -> Iterator[tuple[Machine, bytearray]]:
    said = bytearray()
    with Machine(config) as machine:
        machine.board.attach_sink(said.extend)
        machine.start()
        yield machine, said


def wait_for(machine: Machine, said: bytearray, words: bytes) -> None:
    for _ in range(SECONDS * 100):
        if words in said:
            return
        assert machine.wait(0.01) is None, (machine.outcome, said)
    raise AssertionError(f"no {words!r} in {bytes(said)!r}")


def press(machine: Machine) -> None:
    machine.platform.io.call_soon(machine.board.serial.feed, b"k")


def restored(file: Path, **fields: object) -> MachineConfig:
    return MachineConfig(kernel=file, restore=file, **fields)  # type: ignore[arg-type]


def ends_by_its_reset(file: Path) -> str:
    """What the outcome of a run from `file` says, whose guest is reset."""
    with running(restored(file)) as (machine, said):
        press(machine)
        outcome = machine.wait(SECONDS)
        assert outcome is not None
        assert (outcome.ending, outcome.status, bytes(said)) == (Ending.RESET, 0, b"")
        return outcome.detail


def test_it_boots_again_and_so_does_one_saved_from_it(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    with running(restored(saved)) as (machine, said):
        machine.save(again)
        press(machine)
        wait_for(machine, said, b"up.up.")  # the key is taken by nobody: it resets for ever
        assert machine.resets >= 2
    with running(restored(again)) as (machine, said):
        press(machine)
        wait_for(machine, said, b"up.")


def test_no_reboot_ends_the_run(saved: Path) -> None:
    with running(restored(saved, reboot=False)) as (machine, _said):
        press(machine)
        outcome = machine.wait(SECONDS)
        assert outcome is not None
        assert (outcome.ending, outcome.status) == (Ending.RESET, 0)
        assert "not started again" not in outcome.detail


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("kernel", lambda path: os.utime(path, ns=(1, 1)), "kernel' has changed since it was saved"),
        ("kernel", Path.unlink, "kernel' is no file any more"),
        ("initrd", lambda path: path.write_bytes(b"others"), "initial RAM disk is made of has changed"),
        ("initrd", Path.unlink, "initrd' is no file any more"),
    ],
)
def test_another_kernel_or_ram_disk_than_was_booted_is_told(
    name: str, change: Callable[[Path], object], words: str, saved: Path, tmp_path: Path
) -> None:
    change(tmp_path / name)
    told = ends_by_its_reset(saved)
    assert "it is not started again: " in told
    assert words in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("initrd", "/etc/hostname"),
        ("initrd", "/dev/zero"),
        ("kernel", "/etc/passwd"),
        ("kernel", "a\0b"),
        ("kernel", ""),
        ("busybox", "/dev/zero"),
        ("files", [["/x", "/etc/passwd"]]),
        ("ramdisk", ""),
    ],
)
def test_a_made_up_file_has_nothing_of_the_host_loaded(key: str, value: object, saved: Path) -> None:
    def change(tree: dict[str, dict[str, dict[str, dict[str, object]]]]) -> None:
        tree["manifest"]["config"]["boot"][key] = value

    rewrite(saved, change)
    assert "it is not started again: " in ends_by_its_reset(saved)
