"""What a run writes is none of the files that it is made from, and none that it writes besides."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_images as ki
import pytest

from hvkvm.cli import run, warm
from hvkvm.errors import BootError, ConfigError
from hvkvm.machine import own_files
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.machine import Machine
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.record_spec import RecordSpec

KERNEL = Path(__file__).parents[1] / "guests/warm_late.s"

ALL = ("kernel", "initrd", "disk.raw", "iso", "faults.toml", "vars", "firmware", "busybox", "host", "m.toml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ALL:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "user-data").write_bytes(b"")
    os.link("disk.raw", "hard")
    os.symlink("disk.raw", "soft")
    os.symlink("kernel", "kernel.svg")
    os.mkfifo("pipe")
    return tmp_path


def words(text: str) -> list[str]:
    return ["--kernel", "kernel", "--vmbus", "on", *text.split()]


@pytest.mark.parametrize(
    ("given", "flag", "other"),
    [
        ("--record kernel", "--record kernel", "--kernel"),
        ("--initrd initrd --record ./initrd", "--record initrd", "--initrd"),
        ("--disk disk.raw --record disk.raw,depth=full", "--record disk.raw", "--disk"),
        ("--disk disk.raw --record hard", "--record hard", "--disk"),
        ("--disk disk.raw --record soft", "--record soft", "--disk"),
        ("--cdrom iso --record iso", "--record iso", "--cdrom"),
        ("--disk disk.raw,faults=faults.toml --record faults.toml", "--record faults.toml", "--disk faults="),
        ("--disk disk.raw --net user,pcap=disk.raw", "--net pcap=disk.raw", "--disk"),
        ("--firmware firmware --firmware-vars vars --record vars", "--record vars", "--firmware-vars"),
        ("--firmware firmware --record firmware", "--record firmware", "--firmware"),
        ("--busybox busybox --record busybox", "--record busybox", "--busybox"),
        ("--file /root/x=host --record host", "--record host", "--file"),
        ("--cloud-init seed --record seed/user-data", "--record seed/user-data", "--cloud-init"),
        ("--timeline kernel.svg", "--timeline kernel.svg", "--kernel"),
        ("--record new.svg --timeline new.svg", "--timeline new.svg", "--record"),
        ("--record new --record ./new", "--record new", "--record"),
        ("--net user,pcap=new --net user,pcap=new", "--net pcap=new", "--net pcap="),
        ("--config m.toml --record m.toml", "--record m.toml", "--config"),
    ],
)
def test_a_run_does_not_empty_what_it_is_made_from(given: str, flag: str, other: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run.config_from(words(given))
    assert str(caught.value) == (
        f"{flag}: {other} names the same file, whose content would be lost; name another file"
    )


@pytest.mark.parametrize("flag", ["--restore", "--from"])
def test_nor_the_saved_machine_that_it_goes_on_from(flag: str) -> None:
    more = ["--", "true"] if flag == "--from" else []
    with pytest.raises(ConfigError, match=f"--record vars: {flag} names the same file"):
        run.config_from([flag, "vars", "--record", "vars", *more])


@pytest.mark.parametrize(
    "given",
    [
        "--record disk.raw",
        "--disk disk.raw --record new --timeline new.svg --net user,pcap=other",
        "--disk nbd:unix:disk.raw --record disk.raw",
        "--cdrom none --record none",
        "--record pipe --net user,pcap=pipe",
        "--record /dev/null --net user,pcap=/dev/null",
    ],
)
def test_other_files_are_written(given: str) -> None:
    run.config_from(words(given))


@pytest.mark.parametrize(
    ("given", "other"),
    [("", "--kernel"), ("--initrd kernel --record new", "--kernel"), ("--record new", "--record")],
)
def test_a_warm_guest_takes_no_place_of_what_it_is_made_from(given: str, other: str) -> None:
    output = other.removeprefix("--") if other == "--kernel" else "new"
    with pytest.raises(ConfigError) as caught:
        warm.parse([*words(given), "-o", output])
    assert str(caught.value).startswith(f"-o {output}: {other} names the same file")
    with pytest.raises(ConfigError, match=r"-o m\.toml: --config names the same file"):
        warm.parse([*words(""), "--config", "m.toml", "-o", "m.toml"])


def test_a_running_machine_keeps_its_files(folder: Path) -> None:
    config, _options = run.config_from(words("--disk disk.raw --record new --net user,pcap=frames"))
    kept: Any = lambda path, *more: own_files.why_kept(folder / path, config, *more)  # noqa: E731
    assert "this VM has it as --disk, " in kept("soft")
    assert "this VM has it as --kernel, " in kept("kernel")
    assert "this VM has it as --record, " in kept("new")
    assert "this VM has it as --net pcap=, " in kept("frames")
    assert kept("iso") == kept("other") == ""
    drive = SimpleNamespace(file=str(folder / "iso"))  # as it was added while the VM ran
    assert "this VM has it as --cdrom, " in kept("iso", [drive])
    assert kept("frames", [], []) == ""  # that NIC was removed


def test_a_machine_may_be_saved_over_what_it_went_on_from(folder: Path) -> None:
    config, _options = run.config_from(["--restore", "vars"])
    assert own_files.why_kept(folder / "vars", config._replace(kernel=folder / "kernel")) == ""


def turns(machine: Machine) -> None:
    """Some turns of its loop: a wire tells of its link in the first."""
    for _ in range(3):
        turn = threading.Event()
        machine.platform.io.call_soon(turn.set)
        assert turn.wait(100)


@pytest.mark.kvm
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kernel", [b"#!/bin/sh\n", b""], ids=["no kernel", "never started"])
def test_a_run_that_does_not_begin_empties_and_makes_nothing(
    tmp_path: Path, kernel: bytes, there: bool
) -> None:
    """A wrong --kernel is found when its files are open: the recording of the run before was gone."""
    outputs = [tmp_path / name for name in ("recording", "picture.svg", "capture")]
    for path in outputs[: None if there else 0]:
        path.write_text("of yesterday")
    (tmp_path / "script").write_bytes(kernel)
    config = MachineConfig(
        kernel=tmp_path / "script" if kernel else ki.assembled_pvh(KERNEL, tmp_path),
        synic="user",
        vmbus="on",
        memory=64 << 20,
        record=(RecordSpec(outputs[0]),),
        timeline=outputs[1],
        nets=(NicSpec(listen=tmp_path / "wire", pcap=outputs[2]),),
    )
    if kernel:
        with pytest.raises(BootError):
            Machine(config)
    else:
        Machine(config).close()
    if there:
        assert [path.read_text() for path in outputs] == ["of yesterday"] * 3
    else:
        assert not any(path.exists() for path in outputs)
    if not kernel:
        with Machine(config) as machine:
            machine.start()
            turns(machine)
            assert bool(outputs[1].read_text()) is there, "a picture is made at the end"
        assert not any("yesterday" in path.read_text(errors="replace") for path in outputs)
        assert all(path.stat().st_size for path in outputs)
