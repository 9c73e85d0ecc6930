"""Takes the kernel proper (the vmlinux ELF) out of a bzImage, once.

Why: a guest that starts at the ELF's PVH entry does not decompress itself,
which under nested virtualisation saves the larger part of a second at every
boot. Any thread.
Source: Documentation/arch/x86/boot.rst (payload_offset, payload_length,
protocol 2.08).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from hvkvm import given_file
from hvkvm.abi.elf import ELF64_EHDR, ELF64_IDENT, ELF64_PHDR, ELFMAG, PT_LOAD, Ehdr, Phdr
from hvkvm.boot import cache, unpack
from hvkvm.digest import sha256

# No kernel's ELF comes near; what unpacks to more is not one.
_VMLINUX_MAX = 512 << 20
# Of the 255 bytes that file systems have.
_NAME_MAX = 200


def payload(bzimage: bytes) -> bytes | None:
    """The compressed payload of a bzImage, None when the bytes are not one of protocol 2.08 or later."""
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        return None
    (version,) = struct.unpack_from("<H", bzimage, 0x206)
    if version < 0x0208:
        return None
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    if length == 0 or start + length > len(bzimage):
        return None
    return bzimage[start : start + length]


def decompress(packed: bytes) -> bytes | None:
    """The payload unpacked, None when its format or its command line tool is not there, or it is broken."""
    try:
        unpacked = _decompress(packed)
    except Exception:  # each decompressor has an exception type of its own, and none matters: no ELF, no gain
        return None
    return unpacked if unpacked[:4] == ELFMAG else None


def _decompress(packed: bytes) -> bytes:
    # All formats but gzip have the unpacked size appended as 4 bytes, which decompressor objects leave alone.
    if packed.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        import lzma

        return unpack.by_python(lzma.LZMADecompressor(), packed, _VMLINUX_MAX) or b""
    if packed.startswith(b"\x1f\x8b"):
        import zlib

        return unpack.by_python(zlib.decompressobj(wbits=31), packed, _VMLINUX_MAX) or b""
    if packed.startswith(b"BZh"):
        import bz2

        return unpack.by_python(bz2.BZ2Decompressor(), packed, _VMLINUX_MAX) or b""
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        return _by_tool("zstd", packed)
    if packed.startswith(b"\x02\x21\x4c\x18"):
        return _by_tool("lz4", packed)
    return packed


def _by_tool(tool: str, packed: bytes) -> bytes:
    (size,) = struct.unpack("<I", packed[-4:])
    if size > _VMLINUX_MAX:
        return b""
    unpacked = unpack.by_tool(tool, packed[:-4], size)
    return unpacked if unpacked is not None and len(unpacked) == size else b""


def without_tails(elf: bytes) -> bytes:
    """The ELF64 `elf` with each loaded segment's trailing zeros left to the loader, by its header alone.

    Linux's last segment ends in more than ten megabytes of them (.bss and .brk),
    which need not be copied. What has no such header is given back as it is.
    """
    if not elf.startswith(ELF64_IDENT) or len(elf) < ELF64_EHDR.size:
        return elf
    header = Ehdr(*ELF64_EHDR.unpack_from(elf))
    table, size, count = header.e_phoff, header.e_phentsize, header.e_phnum
    if size < ELF64_PHDR.size or table + size * count > len(elf):
        return elf
    patched = bytearray(elf)
    for at in range(table, table + size * count, size):
        found = Phdr(*ELF64_PHDR.unpack_from(elf, at))
        end = found.p_offset + found.p_filesz
        if found.p_type != PT_LOAD or found.p_filesz > found.p_memsz or end > len(elf):
            continue
        kept = len(elf[found.p_offset : end].rstrip(b"\0"))
        ELF64_PHDR.pack_into(patched, at, *found._replace(p_filesz=kept))
    return bytes(patched)


def extract(bzimage: Path, cache_dir: Path | None = None) -> Path | None:
    """The path of the vmlinux ELF inside `bzimage`, from the cache when it was taken out before.

    The cache (`cache_dir`, else the project's own) is keyed by the SHA-256 of
    the bzImage; a second key of path, size and time spares reading an unchanged
    one again. An ELF file is returned as it is. None when nothing can be taken
    out or kept: the caller boots the bzImage itself. Raises OSError only when
    `bzimage` cannot be read.
    """
    folder = (cache_dir if cache_dir is not None else cache.root()) / "vmlinux"
    known = folder / _stat_key(bzimage)
    if cache.holds(known):
        return known.resolve()
    data = given_file.read(bzimage)
    if data[:4] == ELFMAG:
        return bzimage
    kept = folder / f"{sha256(data).hexdigest()}.elf"
    try:
        if not cache.holds(kept):
            packed = payload(data)
            unpacked = decompress(packed) if packed is not None else None
            if unpacked is None:
                return None
            cache.publish(kept, [without_tails(unpacked)])
        _point(known, kept.name)
    except OSError:
        return kept if cache.holds(kept) else None
    return kept


def _stat_key(path: Path) -> str:
    """A file name that stands for `path` as it is now; made without its contents."""
    seen = os.stat(path)
    name = os.path.realpath(path).replace("%", "%25").replace("/", "%2f")
    key = f"of-{seen.st_size:x}-{seen.st_mtime_ns:x}-{name}"
    if len(os.fsencode(key)) <= _NAME_MAX:
        return key
    return "of-" + sha256(os.fsencode(key)).hexdigest()


def _point(link: Path, target: str) -> None:
    partial = given_file.beside(link)
    os.symlink(target, partial)
    os.replace(partial, link)
