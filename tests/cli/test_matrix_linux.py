"""`hvkvm matrix` on a stock kernel: booted once for both commands, on the SynIC that the file asks for."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_artifacts import artifact

Hvkvm = Callable[..., "subprocess.CompletedProcess[str]"]


pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(1500)]


def matrix(folder: Path) -> Path:
    path = folder / "m.toml"
    path.write_text(f"""
        [machine]
        kernel = "{artifact("HVKVM_GUEST_KERNEL")}"
        busybox = "{artifact("HVKVM_GUEST_BUSYBOX")}"
        append = "quiet"
        [axes]
        synic = ["kernel"]
        [[command]]
        name = "version"
        run = ["uname", "-s"]
        stdout = "Linux"
        seconds = 500
        [[command]]
        name = "fails"
        run = "echo so it is; exit 3"
        seconds = 500
    """)
    return path


def test_two_commands_in_copies_of_one_guest(hvkvm: Hvkvm, tmp_path: Path) -> None:
    result = hvkvm("matrix", matrix(tmp_path), "--json", tmp_path / "j.json", timeout=1000)
    assert result.returncode == 1, result
    first, second = json.loads((tmp_path / "j.json").read_text())["cases"]
    assert (first["verdict"], first["output"], first["warm"]) == ("ok", "Linux\n", True), result
    assert (first["synic"], first["status"]) == ("kernel", 0)
    assert (second["verdict"], second["status"], second["warm"]) == ("failed", 3, True)
    assert "so it is" in second["output"]
