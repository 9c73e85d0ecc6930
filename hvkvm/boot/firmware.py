"""Firmware images: which file `--firmware` means, what is in it, and the memory map that it is told.

Pure but for reading files. An image is hostile, like a kernel: whatever it holds, it is loaded or
refused in one line (BootError).
"""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

from hvkvm import given_file
from hvkvm.abi import board
from hvkvm.abi.elf import ELFMAG
from hvkvm.boot.e820 import E820_TYPE_RAM, E820_TYPE_RESERVED, E820Entry, boot_params_table
from hvkvm.errors import BootError
from hvkvm.tuples import NamedTuple

PAGE = 0x1000
LEAST = 16 * PAGE

_NV_DATA_GUID = UUID("fff12b8d-7696-4c8b-a985-2747075b4f50").bytes_le
"""EFI_SYSTEM_NV_DATA_FV_GUID."""

OVMF = (
    Path("/usr/share/ovmf/OVMF.fd"),
    Path("/usr/share/qemu/OVMF.fd"),
)
"""Where distributions have the image with code and variables in one; Debian and its kin first."""


def find(asked: str | Path) -> Path:
    """The image that `--firmware` names; for "auto" the distribution's. BootError with the remedy."""
    if isinstance(asked, Path):
        return asked
    for path in OVMF:
        if os.path.isfile(path):
            return path
    raise BootError(
        "--firmware auto: no UEFI firmware on this host; install the ovmf package (apt install ovmf),"
        " or name an image"
    )


def read(path: Path) -> bytes:
    """The image, whole pages that end at 4 GiB. BootError for what is none."""
    try:
        image = given_file.read(path, board.FIRMWARE_LIMIT + 1)
    except OSError as error:
        raise BootError(f"--firmware {path}: {error.strerror}; check the path") from None
    if len(image) > board.FIRMWARE_LIMIT:
        raise BootError(
            f"--firmware {path}: larger than {board.FIRMWARE_LIMIT >> 20} MiB; give a firmware image"
        )
    if len(image) < LEAST or len(image) % PAGE:
        raise BootError(
            f"--firmware {path}: {len(image)} bytes are no firmware image; give one of whole 4 KiB pages"
        )
    if image.startswith(ELFMAG):
        raise BootError(f"--firmware {path}: is an ELF file; give a flat image, or the ELF as --kernel")
    if not any(image[-16:]) or image[-16:] == b"\xff" * 16:
        raise BootError(
            f"--firmware {path}: has no code where a CPU starts, 16 bytes below its end;"
            " give OVMF.fd or a CODE image, not VARS"
        )
    return image


class Images(NamedTuple):
    """What lies below 4 GiB: variables first, if they are apart, then code."""

    code: bytes
    variables: bytes
    """The template of the variables, as the package has them; empty where they are not asked for."""


def split(path: Path, image: bytes) -> Images:
    """Code and the variables' template for an image whose variables are to be kept. BootError.

    An image begins with its variables (OVMF.fd), or they are in a file of their own beside it
    (OVMF_CODE*.fd and OVMF_VARS*.fd).
    """
    size = variables_size(image)
    if size:
        return Images(image[size:], image[:size])
    beside = path.with_name(
        path.name.replace("CODE", "VARS").replace(".secboot", "").replace(".strictnx", "")
    )
    if beside == path or not os.path.isfile(beside):
        raise BootError(
            f"--firmware-vars: {path} has no room for variables; give an image that has, such as OVMF.fd"
        )
    try:
        template = given_file.read(beside, board.FIRMWARE_LIMIT)
    except OSError as error:
        raise BootError(f"--firmware-vars: {beside}: {error.strerror}; make it readable") from None
    if variables_size(template) != len(template) or len(image) + len(template) > board.FIRMWARE_LIMIT:
        raise BootError(f"--firmware-vars: {beside} is no template of variables; name another --firmware")
    return Images(image, template)


def variables_size(image: bytes) -> int:
    """The length of the firmware volume for variables that `image` begins with; 0 if it does not."""
    if image[16:32] != _NV_DATA_GUID or image[40:44] != b"_FVH":
        return 0
    size = int.from_bytes(image[32:40], "little")
    return size if PAGE <= size <= len(image) and size % PAGE == 0 else 0


class KernelParts(NamedTuple):
    """A bzImage as fw_cfg has it: its set-up part, and the rest."""

    setup: bytes
    kernel: bytes


def kernel_parts(path: Path) -> KernelParts:
    """The parts of a kernel that firmware can start: a bzImage with an EFI stub. BootError."""
    try:
        image = given_file.read(path)
    except OSError as error:
        raise BootError(f"--kernel {path}: {error.strerror}; check the path") from None
    if image[:2] != b"MZ" or image[0x202:0x206] != b"HdrS":
        raise BootError(
            f"--kernel {path}: firmware starts a bzImage with an EFI stub; give one, or leave --firmware out"
        )
    size = ((image[0x1F1] or 4) + 1) * 512
    return KernelParts(image[:size], image[size:])


def e820(memory_size: int) -> bytes:
    """The content of etc/e820: all RAM, and KVM's own pages."""
    low = min(memory_size, board.RAM_LOW_LIMIT)
    kvm_pages = board.TSS_ADDRESS + 0x3000 - board.IDENTITY_MAP_ADDRESS
    entries = [
        E820Entry(0, low, E820_TYPE_RAM),
        E820Entry(board.IDENTITY_MAP_ADDRESS, kvm_pages, E820_TYPE_RESERVED),
    ]
    if memory_size > low:
        entries.append(E820Entry(board.RAM_HIGH_BASE, memory_size - low, E820_TYPE_RAM))
    return boot_params_table(entries)
