"""`hvkvm matrix` on a stock kernel: booted once for both commands, here and on the workers of a cluster."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from dask_cluster import WORKERS, Cluster
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


@pytest.mark.skipif(not os.environ.get("HVKVM_SOAK"), reason="a boot more, and a scheduler (HVKVM_SOAK=1)")
def test_a_warm_guest_travels_to_the_workers(hvkvm: Hvkvm, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with ExitStack() as stack:
        cluster = Cluster(tmp_path, stack)
        words = ("matrix", matrix(tmp_path), "--dask", cluster.address, "--json", tmp_path / "j.json")
        result = hvkvm(*words, timeout=1400)
    assert result.returncode == 1, result
    cases = json.loads((tmp_path / "j.json").read_text())["cases"]
    assert [(case["verdict"], case["warm"]) for case in cases] == [("ok", True), ("failed", True)], result
    assert cases[0]["output"] == "Linux\n"
    stores = [tmp_path / f"cache{number}/parcels" for number in range(WORKERS)]
    sizes = [sorted(path.stat().st_size for path in store.iterdir()) for store in stores if store.exists()]
    assert sizes[0] == sizes[-1]  # kernel, busybox, warm guest
