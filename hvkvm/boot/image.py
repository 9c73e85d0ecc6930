"""Finds out what kind of kernel a file is, and loads it by the module for that kind.

Called by `machine` from the thread that owns guest memory, before any vCPU
runs and again at every reset. Files are hostile: whatever they hold, `load`
returns an `Entry` or raises BootError with one line that names the flag, the
reason and the remedy.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from hvkvm.abi import board
from hvkvm.abi.elf import ELFMAG
from hvkvm.boot import acpi as acpi_tables
from hvkvm.boot import bootparams, elf, linux, multiboot, pvh
from hvkvm.boot.entry import Entry
from hvkvm.boot.kernel_file import KernelFile, Payload
from hvkvm.boot.layout import GuestRam
from hvkvm.errors import BootError

_HEAD_SIZE = 64 << 10
_VOLUME_SIGNATURE = (0x1028, b"_FVH")
"""Where CLOUDHV.fd, behind a page for its ELF header, has a firmware volume's (PI 1.8, volume 3, 3.2.1)."""

# What people hand over by mistake: (offset, bytes, what it is, remedy).
_LOOKALIKES: tuple[tuple[int, bytes, str, str], ...] = (
    (0x38, b"ARM\x64", "a Linux kernel for 64-bit Arm", "give one built for x86-64"),
    (0x30, b"RISCV", "a Linux kernel for RISC-V", "give one built for x86-64"),
    (4, b"zimg", "a compressed EFI kernel (zboot)", "give the bzImage or vmlinux it was made from"),
    (0, b"\x1f\x8b", "gzip data", "decompress it first"),
    (0, b"\xfd7zXZ\0", "xz data", "decompress it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", "decompress it first"),
    (0, b"BZh", "bzip2 data", "decompress it first"),
    (0, b"070701", "a cpio archive", "give it as --initrd and a kernel here"),
    (0, b"070702", "a cpio archive", "give it as --initrd and a kernel here"),
    (0, b"!<arch>\n", "a package or static library", "unpack it and give the boot/vmlinuz in it"),
    (0, b"\xed\xab\xee\xdb", "an RPM package", "unpack it and give the vmlinuz in it"),
    (0, b"QFI\xfb", "a qcow2 disk image", "give the kernel in it"),
    (0x8001, b"CD001", "a CD image", "give the kernel in it"),
    (0, b"MZ", "an EFI or DOS program without a Linux setup header", "give a bzImage or vmlinux"),
)


def load(
    memory: GuestRam,
    kernel: Path,
    *,
    initrd: bytes | bytearray | memoryview | Path | None = None,
    cmdline: str = "",
    defaults: str = "",
    cpus: int = 1,
    acpi: bool = True,
    vmbus: bool = True,
    serial_ports: int = 1,
    pci: bool = False,
    hpet: bool = False,
    smbios: bytes = b"",
    kaslr: bool = False,
) -> Entry:
    """Load `kernel` into guest RAM and say how vCPU 0 starts it.

    Takes a bzImage, an ELF with a PVH note, a 64-bit vmlinux without one or a
    multiboot-1 ELF32. `defaults` is put before `cmdline` for every kernel but a
    multiboot one, whose command line is its own program's arguments. `cpus` is
    the number of vCPUs for the ACPI tables, which `acpi` False leaves out, and
    `vmbus` False leaves the VMBus out of them, `serial_ports` are in them, with `pci` a PCI root,
    and with `hpet` an HPET.
    `smbios` is what the guest finds at board.SMBIOS_ADDRESS.
    `kaslr` has a bzImage decompress itself, which is slower but places the
    kernel at random. Raises BootError.
    """

    def write_tables() -> int:
        if not acpi:
            return 0
        return _write_acpi(memory, cpus, vmbus=vmbus, serial_ports=serial_ports, pci=pci, hpet=hpet)

    own = _encode(cmdline)
    line = _encode(f"{defaults} {cmdline}".strip())
    with ExitStack() as files:
        file = files.enter_context(KernelFile(kernel, "--kernel"))
        payload = None
        if initrd is not None and (isinstance(initrd, Path) or len(initrd)):
            payload = files.enter_context(Payload(initrd))
        head = file.head(_HEAD_SIZE)
        _write_reset_vector(memory)
        if smbios and memory.size >= board.KERNEL_ADDRESS:
            memory.write(board.SMBIOS_ADDRESS, smbios)
        if head.startswith(ELFMAG):
            image = elf.parse(file)
            return _load_elf(memory, image, head, payload, line, own, write_tables())
        header = bootparams.parse_header(head)
        if header is None:
            raise _not_a_kernel(file, head)
        rsdp = write_tables()
        return linux.load_bzimage(memory, file, header, initrd=payload, cmdline=line, rsdp=rsdp, kaslr=kaslr)


# mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; cli; hlt; and again.
_RESET_VECTOR = (
    b"\xba"
    + board.RESET_PORT.to_bytes(2, "little")
    + bytes([0xB0, board.RESET_VALUE])
    + b"\xee\xfa\xf4\xeb\xfd"
)


def _write_reset_vector(memory: GuestRam) -> None:
    """The one thing that a guest in real mode finds of a BIOS: Linux's reboot=bios jumps there."""
    if memory.size >= board.KERNEL_ADDRESS:
        memory.write(board.RESET_VECTOR_ADDRESS, _RESET_VECTOR)


def _write_acpi(memory: GuestRam, cpus: int, *, vmbus: bool, serial_ports: int, pci: bool, hpet: bool) -> int:
    """Put the tables into RAM; the RSDP's address."""
    if memory.size < board.ACPI_AREA_ADDRESS + board.ACPI_AREA_SIZE:
        return 0  # the loaders refuse so small a machine, in their own words
    devices: list[bytes] = []
    if pci:
        from hvkvm.boot import acpi_pci

        devices += acpi_pci.devices(memory.size, hpet=hpet)
    fixed = acpi_tables.FixedHardware(is_pc=pci, has_hpet=hpet)
    tables = acpi_tables.build(
        cpus, memory.size, vmbus=vmbus, serial_ports=serial_ports, devices=devices, fixed=fixed
    )
    memory.write(tables.address, tables.image)
    return tables.rsdp


def is_linux(kernel: Path) -> bool:
    """Whether `kernel` takes an initramfs: a bzImage, a 64-bit or PVH ELF; not firmware, not multiboot.

    BootError.
    """
    with KernelFile(kernel, "--kernel") as file:
        head = file.head(_HEAD_SIZE)
        if head.startswith(ELFMAG):
            image = elf.parse(file)
            return (image.bits == 64 or image.pvh_entry() is not None) and not _holds_volume(image, head)
        return bootparams.parse_header(head) is not None


def is_firmware(kernel: Path) -> bool:
    """Whether `kernel` is UEFI firmware that is entered as a PVH kernel, as CLOUDHV.fd is. BootError."""
    with KernelFile(kernel, "--kernel") as file:
        head = file.head(_HEAD_SIZE)
        if not head.startswith(ELFMAG):
            return False
        image = elf.parse(file)
        return image.pvh_entry() is not None and _holds_volume(image, head)


def _holds_volume(image: elf.ElfImage, head: bytes) -> bool:
    at, signature = _VOLUME_SIGNATURE
    loaded = image.load_segments()
    return bool(loaded) and head[loaded[0].offset + at :].startswith(signature)


def _load_elf(
    memory: GuestRam,
    image: elf.ElfImage,
    head: bytes,
    initrd: Payload | None,
    cmdline: bytes,
    arguments: bytes,
    rsdp: int,
) -> Entry:
    entry = image.pvh_entry()
    if entry is not None:
        return pvh.load(memory, image, entry, initrd=initrd, cmdline=cmdline, rsdp=rsdp)
    flags = multiboot.find_header(head)
    if image.bits == 64:
        if flags is not None:
            raise image.file.error("is a 64-bit multiboot image", "convert it with objcopy -O elf32-i386")
        if not image.is_linked_as_a_kernel():
            raise image.file.error(
                "is linked to run as a program, not as a kernel, and has no PVH note",
                "give a bzImage or vmlinux",
            )
        return linux.load_vmlinux(memory, image, initrd=initrd, cmdline=cmdline, rsdp=rsdp)
    if flags is None:
        raise image.file.error(
            "is a 32-bit ELF file with neither a PVH note nor a multiboot header",
            "give a bzImage, a 64-bit vmlinux, a PVH or a multiboot image",
        )
    return multiboot.load(memory, image, flags, initrd=initrd, cmdline=arguments)


def _encode(cmdline: str) -> bytes:
    """The command line's bytes as the shell gave them."""
    if "\0" in cmdline:
        raise BootError("--append: a kernel command line cannot hold NUL; remove it")
    try:
        return cmdline.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BootError("--append: holds a character that is no text; remove it") from None


def _not_a_kernel(file: KernelFile, head: bytes) -> BootError:
    for offset, magic, what, remedy in _LOOKALIKES:
        if head[offset : offset + len(magic)] == magic:
            return file.error(f"is {what}, not a kernel", remedy)
    if multiboot.find_header(head) is not None:
        return file.error("is a multiboot image but no ELF file", "give the ELF file it was made from")
    sample = head[:512]
    if all(32 <= byte < 127 or byte in b"\t\n\r\f" for byte in sample):
        return file.error("is a text file, not a kernel", "give a bzImage or vmlinux")
    if head[510:512] == b"\x55\xaa":
        return file.error("is a boot sector or disk image, not a kernel", "give the kernel on it")
    return file.error("is not a kernel of a kind known here", "give a bzImage, vmlinux, PVH or multiboot ELF")
