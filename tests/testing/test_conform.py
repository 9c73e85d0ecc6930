"""`hvkvm conform`: hvkvm keeps the rules, a VMM that does not is found out, and every format says so."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path

import pytest

from hvkvm.cli import conform as cli_conform
from hvkvm.cli.signals import ending_by_exit
from hvkvm.errors import ConfigError, VmmNotRun
from hvkvm.testing import conform
from hvkvm.testing.conform_rules import FAULT, RULES

SECONDS = 600


def hvkvm(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hvkvm", "conform", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)


def output(changes: dict[int, int | None]) -> bytes:
    """What a guest prints that sees what is right, but for `changes`."""
    lines = []
    for number, rule in enumerate(RULES):
        value = changes.get(number, rule.expected[0])
        if value is not None:
            kind, shown = ("F", value - FAULT) if value & FAULT else ("R", value)
            lines.append(f"{kind} {number:x} {shown:x}\r\n")
    return "noise\r\n".join(["", *lines, "END\r\n"]).encode()


def test_findings_say_what_is_right_and_what_is_not() -> None:
    good = conform.findings(output({}))
    assert all(one.verdict == "ok" for one in good)
    assert conform.summary(good) == f"{len(RULES)} ok"
    bus = next(n for n, rule in enumerate(RULES) if rule.name == "S50")
    found = conform.findings(output({3: 7, 4: FAULT + 6, 5: None, bus: 18}))
    assert [found[n].verdict for n in (3, 4, 5, bus)] == ["not ok", "not ok", "no answer", "absent"]
    table = "\n".join(conform.table(found))
    assert "SVERSION is 1" in table
    assert "7, not 1" in table
    assert "exception 6, not 0" in table
    lines = list(conform.tap(found))
    assert f"1..{len(RULES)}" in lines
    assert "not ok 4 - TLFS 11.8: SVERSION is 1" in lines
    assert any(line.startswith(f"ok {bus + 1} ") and line.endswith("# SKIP not offered") for line in lines)
    suite = ET.fromstring(conform.junit(found, "x"))
    assert (suite.get("failures"), suite.get("skipped")) == ("3", "1")
    assert conform.as_json(found)[3]["seen"] == "7"


@pytest.mark.parametrize("vmm", ["true", "echo 'x"])
def test_a_command_without_the_image_or_its_quote_is_refused(vmm: str) -> None:
    with pytest.raises(ConfigError, match="--vmm"):
        conform.command_of(vmm)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(VmmNotRun, match=r"--vmm /no/such/vmm: .*install it"):
        conform.run(["/no/such/vmm"], 1)
    assert VmmNotRun.exit_status == cli_conform.NOT_RUN


def test_a_cache_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVKVM_CACHE", "/dev/null/none")
    with pytest.raises(ConfigError, match="HVKVM_CACHE"):
        conform.command_of("nothing {kernel}")


def test_a_vmm_that_says_nothing_is_ended() -> None:
    found, _printed = conform.run(["sleep", "1000"], 0.2)
    assert all(one.seen is None for one in found)
    result = hvkvm("--vmm", "echo hello {kernel}")
    assert (result.returncode, result.stdout) == (69, "")
    assert "hello /" in result.stderr


@pytest.mark.parametrize(
    ("number", "status", "sleep"),
    [
        (signal.SIGTERM, 143, "sleep 1000 & wait"),
        (signal.SIGHUP, 129, "sleep 1000 & wait"),
        (signal.SIGKILL, -signal.SIGKILL, "exec sleep 1000"),
    ],
)
def test_a_vmm_ends_with_a_conform_that_a_signal_ends(
    tmp_path: Path, number: signal.Signals, status: int, sleep: str
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    vmm = f"sh -c 'exec 3>{fifo}; echo $$ >&3; {sleep}' {{kernel}}"
    command = [sys.executable, "-m", "hvkvm", "conform", "--vmm", vmm]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        with fifo.open("rb", buffering=0) as alive:
            group = int(alive.readline())
            try:
                process.send_signal(number)
                assert process.wait(SECONDS) == status
                assert select.select([alive], [], [], 30)[0], "the VMM goes on"
                assert alive.read() == b""
            finally:
                process.kill()
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)


@pytest.mark.kvm
def test_hvkvm_keeps_every_rule_with_its_own_synic() -> None:
    result = hvkvm("--synic", "user", "--format", "json")
    rows = json.loads(result.stdout)
    assert [row for row in rows if row["verdict"] != "ok"] == []
    assert len(rows) == len(RULES)
    assert result.returncode == 0


@pytest.mark.kvm
def test_a_machine_without_enlightenments_is_found_out() -> None:
    """Every rule gets an answer, and those about Hyper-V are broken."""
    command = f"{sys.executable} -m hvkvm run --quiet --control off --hv none --memory 64M --no-reboot"
    result = hvkvm("--vmm", f"{command} --kernel {{kernel}}")
    assert result.returncode == 1
    assert "0x40000000 counts to 0x40000005" in result.stdout
    assert "exception 13" in result.stdout


@pytest.mark.hyperv
def test_hvkvm_keeps_every_rule_with_kvms_synic_and_qemu_those_it_keeps() -> None:
    result = hvkvm("--synic", "kernel", "--format", "tap")
    wrong = [line for line in result.stdout.splitlines() if line.startswith("not ok")]
    assert (wrong, result.returncode) == ([], 0), result
    if shutil.which("qemu-system-x86_64") is None or not os.access("/dev/kvm", os.W_OK):
        return
    rows = json.loads(hvkvm("--vmm", "qemu", "--format", "json").stdout)
    verdicts = {row["title"]: row["verdict"] for row in rows}
    assert verdicts["SVERSION is 1"] == "ok"
    assert "no answer" not in verdicts.values(), rows


def test_a_signal_that_comes_while_the_vmm_starts_ends_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came out of Popen, and nobody knew of a process to end."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    alive = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[call-overload]
            assert select.select([alive], [], [], SECONDS)[0]
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    shell = f"exec 3>{fifo}; echo $$ $(grep SigBlk /proc/self/status) >&3; sleep 1000 & wait"
    with pytest.raises(SystemExit) as ended, ending_by_exit():
        conform.run(["sh", "-c", shell], SECONDS)
    assert ended.value.code == 143
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked
    group, _name, mask = os.read(alive, 100).split()
    try:
        assert int(mask, 16) == 0, "its own signals are not held"
        assert select.select([alive], [], [], 30)[0], "the VMM goes on"
        assert os.read(alive, 1) == b""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)
        os.close(alive)
