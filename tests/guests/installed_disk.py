"""A disk as an installer leaves it: GPT, EFI system partition with systemd-boot, one more partition."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path

from disk_images import ESP, LINUX, MIB, gpt
from firmware_guest import fat_disk
from guest_artifacts import artifact

ESP_MEGABYTES = 96


def installed_disk(
    path: Path, kernel: Path, initrd: bytes, options: str, second: Path | int, files: Mapping[str, bytes] = {}
) -> Path:
    """The disk at `path`, sparse. `second` is what the other partition holds, or its size in bytes."""
    esp = fat_disk(
        path.with_suffix(".esp"),
        {
            "EFI/BOOT/BOOTX64.EFI": artifact("HVKVM_GUEST_BOOT_LOADER").read_bytes(),
            "loader/loader.conf": b"timeout 0\ndefault linux\n",
            "loader/entries/linux.conf": (
                f"title Linux\nlinux /vmlinuz\ninitrd /initrd\noptions {options}\n".encode()
            ),
            "vmlinuz": kernel.read_bytes(),
            "initrd": initrd,
            **files,
        },
        ESP_MEGABYTES,
    )
    size = second if isinstance(second, int) else second.stat().st_size
    root = (1 + ESP_MEGABYTES) * MIB
    with path.open("wb") as file:
        file.truncate(root + size + MIB)
    _copy(esp, path, 1)
    if isinstance(second, Path):
        _copy(second, path, root // MIB)
    with path.open("r+b") as file, mmap(file.fileno(), 0) as disk:
        gpt(disk, [(ESP, MIB, ESP_MEGABYTES * MIB), (LINUX, root, size)])  # type: ignore[arg-type]
    esp.unlink()
    return path


def _copy(source: Path, disk: Path, megabyte: int) -> None:
    """Holes stay holes."""
    words = ["dd", f"if={source}", f"of={disk}", "bs=1M", f"seek={megabyte}", "conv=notrunc,sparse"]
    subprocess.run(words, check=True, capture_output=True)
