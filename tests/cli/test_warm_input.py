"""What `hvkvm warm`, `hvkvm run --from` and `hvkvm.warm` refuse, each in one line; what a copy is handed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import guest_images
import pytest
from running_vm import running_vm

from hvkvm.abi import guest_orders
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.outcome import Ending, Outcome
from hvkvm.machine.warm import NotWarm, warm

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("warm",), "-o: missing"),
        (("warm", "-o", "FILE"), "--kernel: missing"),
        (("warm", "-o", "FILE", "--kernel", "/dev/null", "--", "true"), "--: a warm guest waits"),
        (("warm", "-o", "/", "--kernel", "/dev/null"), "-o /: no file can be there"),
        (
            ("warm", "-o", "/dev/null", "--kernel", "/dev/null"),
            "-o /dev/null: is not a regular file; name another",
        ),
        (("warm", "-o", "/no/such/folder", "--kernel", "/dev/null"), "-o /no/such/folder: no file"),
        (("warm", "-o", "FILE", "--kernel", "/dev/null", "--vsock", "x"), "--vsock"),
        (("run", "--from", "/no/such", "--", "true"), "--from /no/such: no such file"),
        (("run", "--from", "/dev/null", "--", "true"), "/dev/null: not a saved VM"),
        (("run", "--from", "FILE", "--cpus", "2", "--", "true"), "the file decides --cpus; leave it out"),
        (("run", "--from", "FILE", "--module", "x", "--", "true"), "leave --module out"),
        (("run", "--from", "FILE", "--initrd", "FILE", "--", "true"), "leave --initrd out"),
        (("run", "--from", "FILE", "--restore", "FILE"), "give one"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: tuple[str, ...], words: str, hvkvm: Hvkvm, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"something")
    result = hvkvm(*(str(file) if word == "FILE" else word for word in arguments))
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


@pytest.mark.kvm
def test_a_guest_that_takes_no_init_is_not_made_warm(tmp_path: Path) -> None:
    image = guest_images.image("agent")
    config = MachineConfig(kernel=image, memory=64 << 20, synic="user", timeout=1)
    with pytest.raises(ConfigError, match=r"takes no initramfs, .*; name a Linux kernel$"):
        warm(config, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.kvm
def test_a_vm_that_waits_for_nothing_is_no_warm_guest(tmp_path: Path, hvkvm: Hvkvm) -> None:
    file = tmp_path / "vm"
    agent = ("--kernel", guest_images.image("agent"), "--memory", "64M", "--synic", "user", "--quiet")
    with running_vm(tmp_path, *agent) as vm:
        vm.wait_until_listening()
        vm.ctl("save", file)
        vm.ctl("quit")
    result = hvkvm("run", "--from", file, "--", "true")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "does not wait for a command; go on with `hvkvm run --restore FILE`" in result.stderr


def test_what_the_page_says() -> None:
    head = guest_orders.head(5, 3_000_000_007, b"x" * guest_orders.SEED_SIZE)
    numbers = [int.from_bytes(head[at : at + 8], "little") for at in range(0, 32, 8)]
    assert numbers == [guest_orders.MAGIC, 5, 3, 7]
    assert head[32:] == (256).to_bytes(4, "little") + (32).to_bytes(4, "little") + b"x" * 32
    assert len(head) < guest_orders.ARCHIVE_OFFSET


def test_the_error_says_how_the_run_ended() -> None:
    error = NotWarm(Outcome(Ending.PANIC, 255, "no init"), ["one", "two"])
    assert str(error) == (
        "the guest does not wait for a command: guest panic: no init; its console ends: one | two"
    )
    assert (error.exit_status, error.outcome.ending) == (255, Ending.PANIC)
    unsaved = NotWarm(Outcome(Ending.NOT_SAVED, 1, "/x: No space left on device"), ["one"])
    assert str(unsaved) == "the guest is not saved: /x: No space left on device"
