"""`hvkvm features` and `hvkvm doctor` by the real command: who carries the enlightenments here, and why."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvkvm.cli import main
from hvkvm.cli.doctor import huge_pages
from hvkvm.hyperv.features import HostFeatures
from hvkvm.hyperv.usermode.features import choose, user_host
from hvkvm.kvm.system import Kvm

pytestmark = pytest.mark.kvm

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]
TIMERS = {"hv-stimer", "hv-stimer-direct"}


def record(hvkvm: Hvkvm, *arguments: str) -> Any:
    result = hvkvm(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_features_tells_both_columns_apart(hvkvm: Hvkvm) -> None:
    with Kvm() as kvm:
        kernel, user, choice = HostFeatures.probe(kvm), user_host(kvm), choose(kvm, "auto")
    answer = record(hvkvm, "features")
    assert (answer["synic"], answer["why"]) == (choice.synic, choice.why)
    rows = {row["name"]: row for row in answer["features"]}
    assert (rows["hv-synic"]["missing"] is None) == bool(kernel.caps["KVM_CAP_HYPERV_SYNIC2"])
    assert rows["hv-synic"]["user_missing"] is None
    assert "KVM_CAP_HYPERV_TLBFLUSH" in rows["hv-tlbflush"]["user_missing"]
    assert {name for name, row in rows.items() if row["user_on_demand"]} == TIMERS
    assert user.on_demand == {name[3:] for name in TIMERS}
    assert {name[3:] for name, row in rows.items() if row["on_demand"]} == kernel.on_demand
    assert kernel.on_demand <= {"lazy-eoi"}
    lines = hvkvm("features").stdout.splitlines()
    assert lines[0].split() == ["kvm", "user"]
    (synic,) = (line for line in lines if " hv-synic " in line)
    assert synic.split()[:2] == ["yes" if rows["hv-synic"]["missing"] is None else "no", "yes"]
    assert lines[-1] == f"--synic auto: {choice.synic}, because {choice.why}"


def test_host_model_in_user_space_leaves_the_timers_to_kvms_apic(hvkvm: Hvkvm) -> None:
    def resolved(text: str) -> set[str]:
        return set(record(hvkvm, "features", text, "--synic", "user")["resolved"].split(","))

    model = resolved("host-model")
    assert {"hv-synic", "hv-time", "hv-avic"} <= model
    assert not TIMERS & model
    assert resolved("host-model,stimer,stimer-direct") == resolved("passthrough") == model | TIMERS


def test_doctor_says_which_synic_and_why(hvkvm: Hvkvm) -> None:
    with Kvm() as kvm:
        choice = choose(kvm, "auto")
    checks = {check["name"]: check for check in record(hvkvm, "doctor")}
    check = checks["--synic auto"]
    assert check["verdict"] == "PASS"
    assert choice.why in check["detail"]
    assert ("in user space" in check["detail"].partition(":")[0]) == (choice.synic == "user")


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [("always within_size [advise] never", "PASS"), ("always advise [never] deny", "WARN"), (None, "WARN")],
)
def test_doctor_says_whether_guests_get_huge_pages(tmp_path: Path, setting: str | None, verdict: str) -> None:
    file = tmp_path / "shmem_enabled"
    if setting is not None:
        file.write_text(setting)
    check = huge_pages(file)
    assert check.verdict == verdict
    assert bool(check.remedy) == (verdict == "WARN")


def test_doctor_has_a_checklist_for_windows(hvkvm: Hvkvm) -> None:
    """It fails where Windows could not start, names every remedy, and says that none was booted."""
    result = hvkvm("doctor", "--windows", "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert {"--hv windows", "UEFI", "memory", "boot disk", "display", "tried"} <= set(found)
    failed = [check["status"] for check in found.values() if check["verdict"] == "FAIL"]
    assert result.returncode == (failed[0] if failed else 0)
    for check in found.values():
        assert check["verdict"] == "PASS" or check["remedy"] or check["name"] == "memory"
    assert "no Windows was booted" in found["tried"]["detail"]


def test_a_host_without_firmware_lacks_a_capability(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hvkvm.boot.firmware.OVMF", ())
    assert main(["doctor", "--windows"]) == 77
    assert "FAIL  UEFI" in capsys.readouterr().out
