"""Tiny kernel files for the boot tests, made byte by byte, each field open to a test's mistake."""

from __future__ import annotations

import gzip
import struct
import subprocess
from pathlib import Path
from typing import Any

from hvkvm.boot import image
from hvkvm.boot.entry import Entry
from hvkvm.memory.guest import GuestMemory

MIB = 1 << 20
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
HALT = b"\xfa\xf4\xeb\xfc"  # cli; hlt; jmp to the hlt
ENTRY_64 = 0x200
KERNEL_MAP = 0xFFFFFFFF_80000000


class NoVm:
    """Takes memory slots as a VM would and does nothing with them."""

    memory_slots = 509

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        pass


def ram(size: int = 64 * MIB) -> GuestMemory:
    """RAM without a VM."""
    return GuestMemory(NoVm(), size)


def load(memory: GuestMemory, path: Path, content: bytes, **options: Any) -> Entry:
    """Write `content` to `path` and load it."""
    path.write_bytes(content)
    return image.load(memory, path, **options)


def segment(
    paddr: int, data: bytes, *, kind: int = PT_LOAD, bss: int = 0, align: int = 4, vaddr: int | None = None
) -> dict[str, Any]:
    vaddr = paddr if vaddr is None else vaddr
    return {"paddr": paddr, "data": data, "kind": kind, "bss": bss, "align": align, "vaddr": vaddr}


def elf(
    bits: int,
    entry: int,
    *segments: dict[str, Any],
    machine: int | None = None,
    kind: int = 2,
    data: int = 1,
) -> bytes:
    """An ELF file whose segments follow its program headers."""
    wide = bits == 64
    head_size, row_size = (64, 56) if wide else (52, 32)
    at = head_size + row_size * len(segments)
    rows, body = b"", b""
    for part in segments:
        size = len(part["data"])
        memsz = size + part["bss"]
        if wide:
            rows += struct.pack(
                "<IIQQQQQQ", part["kind"], 7, at, part["vaddr"], part["paddr"], size, memsz, part["align"]
            )
        else:
            rows += struct.pack(
                "<IIIIIIII", part["kind"], at, part["vaddr"], part["paddr"], size, memsz, 7, part["align"]
            )
        body += part["data"]
        at += size
    if machine is None:
        machine = 62 if wide else 3
    order = "<" if data == 1 else ">"
    ident = b"\x7fELF" + bytes([2 if wide else 1, data, 1]) + bytes(9)
    code = order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH")
    head = struct.pack(
        code, kind, machine, 1, entry, head_size, 0, 0, head_size, row_size, len(segments), 0, 0, 0
    )
    return ident + head + rows + body


def note(name: bytes, kind: int, desc: bytes, *, align: int = 4) -> bytes:
    """One ELF note; `name` with its NUL."""
    padded = name.ljust(-(-len(name) // align) * align, b"\0")
    return (
        struct.pack("<III", len(name), len(desc), kind)
        + padded
        + desc.ljust(-(-len(desc) // align) * align, b"\0")
    )


def pvh_note(entry: int, size: int = 4) -> bytes:
    """Some other notes, and the one that counts."""
    return (
        note(b"GNU\0", 3, bytes(20))
        + note(b"Xen\0", 6, b"linux\0")
        + note(b"Xen\0", 18, entry.to_bytes(size, "little"))
    )


def pvh(code: bytes = HALT, at: int = MIB, *, bits: int = 64, note_size: int = 4) -> bytes:
    """An ELF with a PVH note that enters `code`."""
    return elf(bits, at, segment(at, code, bss=64), segment(0, pvh_note(at, note_size), kind=PT_NOTE))


def assembled_pvh(source: Path, folder: Path) -> Path:
    """What the GNU assembler makes of `source`, in 32 bits, as an ELF in `folder` with a PVH note."""
    made, flat, file = (folder / f"{source.stem}{suffix}" for suffix in (".o", ".flat", ".elf"))
    subprocess.run(["as", "--32", "-I", source.parent, "-o", made, source], check=True)
    layout = ["-m", "elf_i386", "--oformat", "binary", "-Ttext", hex(MIB)]
    subprocess.run(["ld", *layout, "-o", flat, made], check=True)
    file.write_bytes(pvh(flat.read_bytes(), bits=32))
    return file


def vmlinux(code: bytes = HALT, at: int = 16 * MIB, *, bss: int = 8192) -> bytes:
    """A 64-bit ELF without a PVH note, linked to run where Linux does."""
    return elf(64, at, segment(at, code, bss=bss, vaddr=KERNEL_MAP + at))


def multiboot_header(flags: int = 0, *, magic: int = 0x1BADB002) -> bytes:
    return struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)


def multiboot(code: bytes = HALT, at: int = 0x4000B0, *, flags: int = 0) -> bytes:
    """An ELF32 as kvm-unit-tests are: header, code, and a second segment with bss."""
    return elf(
        32,
        at + 12,
        segment(at, multiboot_header(flags) + code),
        segment(at + 0x8000, b"data", bss=MIB),
    )


def bzimage(
    kernel: bytes = bytes(ENTRY_64) + HALT + bytes(12),
    *,
    vmlinux: bytes | None = None,
    magic: bytes = b"HdrS",
    boot_flag: int = 0xAA55,
    version: int = 0x020F,
    loadflags: int = 1,
    xloadflags: int = 0x7F,
    initrd_addr_max: int = 0x7FFFFFFF,
    relocatable: int = 1,
    cmdline_size: int = 2047,
    pref_address: int = 16 * MIB,
    init_size: int = 4 * MIB,
    release: bytes = b"6.1.0-test (someone@somewhere) #1 SMP",
) -> bytes:
    """A bzImage: four setup sectors, then `kernel`, then the gzipped `vmlinux` as its payload."""
    setup = bytearray(5 * 512)

    def put(offset: int, code: str, value: int) -> None:
        struct.pack_into("<" + code, setup, offset, value)

    payload = gzip.compress(vmlinux, 1, mtime=0) if vmlinux is not None else b""
    body = kernel + payload
    body += bytes(-len(body) % 16)
    put(0x1F1, "B", 4)
    put(0x1F4, "I", len(body) // 16)
    put(0x1FE, "H", boot_flag)
    setup[0x200:0x202] = b"\xeb\x6a"
    setup[0x202:0x206] = magic
    put(0x206, "H", version)
    put(0x20E, "H", 0x300)
    setup[0x500 : 0x500 + len(release)] = release
    put(0x211, "B", loadflags)
    put(0x214, "I", MIB)
    put(0x22C, "I", initrd_addr_max)
    put(0x230, "I", 2 * MIB)
    put(0x234, "B", relocatable)
    put(0x236, "H", xloadflags)
    put(0x238, "I", cmdline_size)
    put(0x248, "I", len(kernel))
    put(0x24C, "I", len(payload))
    put(0x258, "Q", pref_address)
    put(0x260, "I", init_size)
    return bytes(setup) + body
