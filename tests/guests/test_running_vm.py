"""What tests read of a guest's output: whole lines, however the output is cut on its way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import running_vm
from running_vm import RunningVm, whole_lines

IN_PIECES = """
import sys, time
for piece in ("up\\nguest-ti", "me <17", "95>", "\\nne"):
    sys.stdout.write(piece)
    sys.stdout.flush()
    time.sleep(0.2)
time.sleep(600)
"""


def test_a_marker_is_found_when_its_line_has_come_whole(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IN_PIECES], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        vm = RunningVm(process, tmp_path)
        assert vm.wait_for("guest-time") == "up\nguest-time <1795>\n"
        process.kill()
        vm.finish()


def test_a_marker_is_found_that_was_said_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here between a look and the next one, in which it has ended."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with subprocess.Popen(
        ["sh", "-c", f"read line <{gate}; echo marker"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        vm = RunningVm(process, tmp_path)

        def ended_behind_the_look(text: str) -> str:
            if process.returncode is None:
                gate.write_text("go\n")
                process.wait()
            return whole_lines(text)

        monkeypatch.setattr(running_vm, "whole_lines", ended_behind_the_look)
        assert vm.wait_for("marker") == "marker\n"


def test_a_line_without_an_end_is_left_out() -> None:
    assert whole_lines("one\ntwo") == "one\n"
    assert whole_lines("one\n") == "one\n"
    assert whole_lines("one") == whole_lines("") == ""
