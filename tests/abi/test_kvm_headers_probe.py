"""The probe that makes the golden table: what it calls a difference, and what it only notes."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEADERS = Path(__file__).parents[2] / "kvm_headers"


@pytest.fixture(scope="module")
def probe():
    spec = importlib.util.spec_from_file_location("kvm_headers_probe", HEADERS / "probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def golden():
    return json.loads((HEADERS / "layout.json").read_text())


def test_same_table_has_nothing_to_say(probe, golden):
    assert probe.compare(golden, copy.deepcopy(golden)) == ([], [])


def test_each_changed_row_is_named(probe, golden):
    here = copy.deepcopy(golden)
    here["structs"]["kvm_irqfd"]["size"] = 40
    here["structs"]["kvm_run.io"]["fields"]["port"] = [4, 2]
    here["requests"]["KVM_RUN"] = "0xae81"
    here["constants"]["KVM_EXIT_HYPERV"] = 28
    differences, notes = probe.compare(golden, here)
    assert notes == []
    assert [line.split(" is ")[0] for line in differences] == [
        "KVM_EXIT_HYPERV",
        "KVM_RUN",
        "kvm_irqfd size",
        "kvm_run.io.port",
    ]


def test_names_that_older_headers_lack_are_notes(probe, golden):
    here = copy.deepcopy(golden)
    del here["structs"]["kvm_hyperv_eventfd"]
    del here["constants"]["KVM_CAP_HYPERV_EVENTFD"]
    del here["structs"]["kvm_msi"]["fields"]["devid"]
    here["absent"] += ["kvm_hyperv_eventfd", "KVM_CAP_HYPERV_EVENTFD", "kvm_msi.devid"]
    differences, notes = probe.compare(golden, here)
    assert differences == []
    assert "KVM_CAP_HYPERV_EVENTFD is not in these headers" in notes
    assert "kvm_hyperv_eventfd.conn_id is not in these headers" in notes
    assert "kvm_msi.devid is not in these headers" in notes
    # and writing with such headers loses nothing
    assert probe.rows_of(probe.merged(golden, here)) == probe.rows_of(golden)


def test_names_that_newer_headers_have_are_notes(probe, golden):
    here = copy.deepcopy(golden)
    older = copy.deepcopy(golden)
    del older["constants"]["KVM_EXIT_NOTIFY"]
    older["absent"].append("KVM_EXIT_NOTIFY")
    differences, notes = probe.compare(older, here)
    assert differences == []
    assert [note.split(" is ")[0] for note in notes] == ["KVM_EXIT_NOTIFY"]
    merged = probe.merged(older, here)
    assert merged["constants"]["KVM_EXIT_NOTIFY"] == 37
    assert "KVM_EXIT_NOTIFY" not in merged["absent"]


def test_a_stale_table_is_a_difference(probe, golden):
    here = copy.deepcopy(golden)
    here["constants"]["KVM_CAP_INVENTED"] = 999
    here["absent"].append("kvm_unheard_of")
    del here["constants"]["KVM_EXIT_XEN"]
    assert probe.compare(golden, here)[0] == [
        "KVM_CAP_INVENTED is 999 in these headers and not in the table",
        "KVM_EXIT_XEN is in the table and no longer declared",
        "kvm_unheard_of is declared, and neither in these headers nor in the table",
    ]


needs_cc = pytest.mark.skipif(
    not shutil.which("cc") or not Path("/usr/include/linux/kvm.h").exists(),
    reason="needs a C compiler and the kernel's UAPI headers",
)


@needs_cc
def test_check_against_this_machines_headers():
    done = subprocess.run(
        [sys.executable, HEADERS / "probe.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differences" in done.stdout


@needs_cc
def test_the_compiler_leaves_out_what_headers_lack(probe):
    items = {
        ("size", "kvm_regs"): "sizeof(struct kvm_regs)",
        ("size", "kvm_invented"): "sizeof(struct kvm_invented)",
        ("constant", "KVM_INVENTED"): "KVM_INVENTED",
        ("constant", "KVM_EXIT_IO"): "KVM_EXIT_IO",
    }
    assert probe.ask(items) == {("size", "kvm_regs"): 144, ("constant", "KVM_EXIT_IO"): 2}


@needs_cc
def test_a_broken_compiler_is_said_plainly(probe, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-include no-such-header.h")
    with pytest.raises(SystemExit, match=r"no-such-header\.h"):
        probe.ask({("constant", "KVM_EXIT_IO"): "KVM_EXIT_IO"})
