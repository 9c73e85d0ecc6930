"""Bad input is answered by one line naming the flag, the reason and the remedy, and the documented status."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from running_vm import command_line

HANG = b"\xfa\xf4\xeb\xfd"
ASKS_KVM = pytest.mark.kvm  # what it has decides


def one_line(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert result.returncode == status, result
    assert result.stdout == ""
    assert result.stderr.startswith("hvkvm: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rum",), ("rum", "choose run")),
        (("run",), ("--kernel", "missing")),
        (("run", "--kernel", "/nonexistent"), ("--kernel /nonexistent", "no such file", "check the path")),
        (("run", "--kernel", "/"), ("--kernel /", "directory")),
        (("run", "--kernel", "KERNEL", "--cpus", "0"), ("--cpus 0", "1 to 254")),
        (("run", "--kernel", "KERNEL", "--cpus", "many"), ("--cpus many", "number")),
        (("run", "--kernel", "KERNEL", "--cpus", "1000"), ("--cpus 1000", "1 to 254")),
        (("run", "--kernel", "KERNEL", "--cpu", "host,-cx61"), ("--cpu host,-cx61", "did you mean cx16")),
        (("run", "--kernel", "KERNEL", "--cpu", "host,-apic"), ("apic cannot be hidden",)),
        (("run", "--kernel", "KERNEL", "--memory", "1M"), ("--memory 1M", "at least 8M")),
        (("run", "--kernel", "KERNEL", "--memory", "lots"), ("--memory lots", "512M")),
        (
            ("run", "--kernel", "KERNEL", "--initrd", "/nonexistent"),
            ("--initrd /nonexistent", "no such file"),
        ),
        (("run", "--kernel", "KERNEL", "--timeout", "0"), ("--timeout 0", "more than 0")),
        (("run", "--kernel", "KERNEL", "--timeout", "soon"), ("--timeout soon", "number")),
        (("run", "--kernel", "KERNEL", "--synic", "quantum"), ("--synic quantum", "auto, kernel, user")),
        (("run", "--kernel", "KERNEL", "--device", "floppy"), ("--device floppy", "hyperv-testdev")),
        pytest.param(
            ("run", "--kernel", "KERNEL", "--hv", "sinyc"), ("--hv", "sinyc", "synic"), marks=ASKS_KVM
        ),
        pytest.param(
            ("run", "--kernel", "KERNEL", "--hv", "stimer"),
            ("--hv", "hv-stimer requires", "hv-synic"),
            marks=ASKS_KVM,
        ),
        pytest.param(
            ("run", "--kernel", "KERNEL", "--hv", "synic,vpindex,-synic"), ("--hv", "synic"), marks=ASKS_KVM
        ),
        pytest.param(
            ("run", "--kernel", "KERNEL", "--hv", "spinlocks=lots"), ("--hv", "spinlocks"), marks=ASKS_KVM
        ),
        pytest.param(
            ("run", "--kernel", "KERNEL", "--hv", "none", "--device", "hyperv-testdev"),
            ("hyperv-testdev", "--hv"),
            marks=ASKS_KVM,
        ),
        (("run", "--kernel", "KERNEL", "--module", "hv_vmbus"), ("--module", "--modules-dir")),
        (("run", "--kernel", "KERNEL", "--modules-dir", "/nonexistent"), ("--modules-dir", "lib/modules")),
        (
            ("run", "--kernel", "KERNEL", "--busybox", "/nonexistent"),
            ("--busybox /nonexistent", "no such file"),
        ),
        (("run", "--kernel", "KERNEL", "--config", "/nonexistent"), ("--config /nonexistent",)),
        (("run", "--kernel", "KERNEL", "--"), ("--", "no command")),
        (("run", "--kernel", "KERNEL", "--cpu", "2"), ("--cpu 2", "write --cpus 2")),
        (("run", "--kernel", "KERNEL", "--mem", "2"), ("--mem", "hvkvm run --help")),
        (("run", "--kernel", "KERNEL", "spare"), ("spare", "hvkvm run --help")),
        (("features", "sinyc"), ("sinyc",)),
        (("run", "--kernel", "KERNEL", "--net", "socket="), ("--net socket=: empty; name a path",)),
        (("run", "--config", ""), ("--config: empty; name a path",)),
        (("warm", "-o", ""), ("-o/--output: empty; name a path",)),
        (("matrix", ""), ("FILE: empty; name a path",)),
        (("matrix", "KERNEL", "--junit", ""), ("--junit: empty; name a path",)),
    ],
)
def test_usage_errors(
    hvkvm: Callable[..., subprocess.CompletedProcess[str]],
    guest: Callable[[bytes], Path],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    kernel = guest(HANG)
    result = hvkvm(*(str(kernel) if argument == "KERNEL" else argument for argument in arguments))
    one_line(result, 2, *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--kernel", "FIFO", "--hv", "none"),
        ("--kernel", "KERNEL", "--initrd", "FIFO", "--hv", "none"),
        ("--kernel", "KERNEL", "--vmbus", "on", "--synic", "user", "--disk", "FIFO"),
        ("--kernel", "KERNEL", "--vmbus", "on", "--synic", "user", "--disk", "FIFO,format=raw"),
        ("--kernel", "KERNEL", "--vmbus", "on", "--synic", "user", "--disk", "KERNEL,faults=FIFO"),
        ("--kernel", "KERNEL", "--vmbus", "on", "--synic", "user", "--cdrom", "FIFO"),
        ("--firmware", "FIFO"),
        ("--kernel", "FIFO", "--firmware", "KERNEL"),
        ("--restore", "FIFO"),
        ("--from", "FIFO", "--", "true"),
    ],
)
@pytest.mark.kvm
def test_a_pipe_that_nobody_writes_is_refused_not_waited_for(
    hvkvm: Callable[..., subprocess.CompletedProcess[str]],
    guest: Callable[[bytes], Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
) -> None:
    """open(2) would wait, and a run that has taken its signals over does not even end by Ctrl-C then."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    named = {"FIFO": str(fifo), "KERNEL": str(guest(HANG))}
    words = [re.sub("FIFO|KERNEL", lambda name: named[name[0]], word) for word in arguments]
    one_line(hvkvm("run", *words), 2, str(fifo))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty",)),
        (b"just some words\n", ("text file",)),
        (b"\x7fELF" + bytes(100), ("ELF",)),
        (b"\x1f\x8b" + bytes(600), ("gzip", "decompress")),
        (bytes(4096), ("not a kernel",)),
    ],
)
@pytest.mark.kvm
def test_not_a_kernel(
    hvkvm: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    content: bytes,
    words: tuple[str, ...],
) -> None:
    kernel = tmp_path / "file"
    kernel.write_bytes(content)
    one_line(hvkvm("run", "--kernel", kernel, "--hv", "none"), 2, f"--kernel {kernel}", *words)


@pytest.mark.kvm
def test_a_relative_folder_for_control_sockets_is_refused_by_both_sides(
    hvkvm: Callable[..., subprocess.CompletedProcess[str]], guest: Callable[[bytes], Path]
) -> None:
    environment = {**os.environ, "HVKVM_CONTROL_DIR": "here"}
    for words in (("run", "--kernel", guest(HANG), "--timeout", "30"), ("ctl", "list"), ("top",)):
        one_line(hvkvm(*words, env=environment), 2, "HVKVM_CONTROL_DIR=here", "begins with /")


def test_no_kvm_device(
    hvkvm: Callable[..., subprocess.CompletedProcess[str]], guest: Callable[[bytes], Path], tmp_path: Path
) -> None:
    result = hvkvm("run", "--kernel", guest(HANG), "--kvm", tmp_path / "kvm")
    one_line(result, 69, "cannot open", "No such file", "kvm_intel or kvm_amd")


def test_not_the_kvm_device(
    hvkvm: Callable[..., subprocess.CompletedProcess[str]], guest: Callable[[bytes], Path]
) -> None:
    one_line(hvkvm("run", "--kernel", guest(HANG), "--kvm", "/dev/null"), 69, "/dev/null", "KVM")


def test_no_permission(
    hvkvm: Callable[..., subprocess.CompletedProcess[str]], guest: Callable[[bytes], Path], tmp_path: Path
) -> None:
    node = tmp_path / "kvm"
    node.touch(mode=0)
    arguments = command_line("run", "--kernel", guest(HANG), "--kvm", node)
    if os.geteuid() == 0:
        # root without its override of file modes is a user like any other
        arguments = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *arguments]
    result = subprocess.run(
        arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False
    )
    one_line(result, 69, f"cannot open {node}", "Permission denied", "group")
