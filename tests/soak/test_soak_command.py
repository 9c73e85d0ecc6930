"""A command's streams with much data (`make soak`, HVKVM_SOAK=1): 100 MB in and out at the same time.

HVKVM_SOAK_STREAM_MB shortens it.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path

import pytest
from guest_artifacts import artifact
from running_vm import command_line

pytestmark = [
    pytest.mark.hyperv,
    pytest.mark.skipif(
        not os.environ.get("HVKVM_SOAK"), reason="a long run: set HVKVM_SOAK=1 or use make soak"
    ),
    pytest.mark.timeout(0),
]

MEGABYTES = int(os.environ.get("HVKVM_SOAK_STREAM_MB", "100"))


@pytest.mark.parametrize("synic", ["kernel", "user"])
def test_a_hundred_megabytes_each_way_over_vsock(tmp_path: Path, synic: str) -> None:
    """By checksum, of a reader who takes it as it comes."""
    block = os.urandom(1_000_000)
    sent = 0
    with (tmp_path / "in").open("wb") as file:
        for number in range(MEGABYTES):
            data = number.to_bytes(8, "little") + block[8:]
            sent = zlib.crc32(data, sent)
            file.write(data)
    line = command_line(
        "run", "--kernel", artifact("HVKVM_GUEST_KERNEL"), "--busybox", artifact("HVKVM_GUEST_BUSYBOX"),
        "--modules-dir", artifact("HVKVM_GUEST_MODULES"), "--vmbus", "on", "--synic", synic, "--quiet",
        "--", "cat",
    )  # fmt: skip
    with (tmp_path / "in").open("rb") as file:
        process = subprocess.Popen(line, stdin=file, stdout=subprocess.PIPE)
    assert process.stdout is not None
    got, size = 0, 0
    while data := process.stdout.read(1 << 20):
        got, size = zlib.crc32(data, got), size + len(data)
    assert (process.wait(), size, got) == (0, MEGABYTES * 1_000_000, sent)
