"""Linux through its own 64-bit boot protocol: a bzImage, or the vmlinux inside it.

Called by `boot.image`; the thread that loads. Two ways in, both with
boot_params in RSI, RAM identity-mapped and interrupts off:

- the fast path: the vmlinux ELF taken out of the bzImage (and cached) is placed
  at its own addresses and entered at its e_entry. The guest decompresses
  nothing, which saves it most of a second under nested virtualisation.
- the bzImage itself, entered at its 64-bit entry, whose decompressor unpacks
  the kernel. KASLR is that decompressor's job: only here is the kernel placed
  at random (`kaslr=True`); on the fast path it lies where it was linked.

Source: Linux Documentation/arch/x86/boot.rst, protocol 2.12 and later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hvkvm.abi import board
from hvkvm.boot import bootparams, e820, elf
from hvkvm.boot.bootparams import SetupHeader
from hvkvm.boot.entry import Entry, Mode, write_tables
from hvkvm.boot.kernel_file import KernelFile, Payload
from hvkvm.boot.layout import GuestRam, Layout
from hvkvm.errors import BootError

_ENTRY_64 = 0x200  # of the protected-mode part
_SEED_SIZE = 32
_SPACE = " \t\n\v\f\r\xa0"  # what isspace() of Linux takes

DEFAULT_ARGUMENTS: tuple[tuple[str, str], ...] = (
    ("console=ttyS0", "COM1 is the only console"),
    ("panic=-1", "reboot at once after a panic: the machine sees it end instead of a silent hang"),
    ("8250.nr_uarts=1", "only COM1 exists: spares the port probes of three more UARTs"),
    ("cryptomgr.notests=1", "self-tests of every cipher take up to half of a boot; fips=1 runs them anyway"),
    ("no_timer_check", "the PIT is KVM's and works; without Hyper-V the check costs ten ticks"),
)
"""A recommended start of every Linux command line, each with its reason.

`quiet` belongs to it when nobody reads the console: each character on COM1 is an
exit, and they take half of a boot. Not in it: `pci=off` (vPCI needs PCI), and i8042, VGA and
RTC switches (the FADT already says that those are not there).
"""


def default_cmdline(serial_ports: int = 1) -> str:
    """DEFAULT_ARGUMENTS as one string, for so many serial ports."""
    words = [argument for argument, _reason in DEFAULT_ARGUMENTS]
    if serial_ports > 1:
        words.append(f"8250.nr_uarts={serial_ports}")  # the last one wins
    return " ".join(words)


_CHOOSES_MESSAGES = {
    "quiet",
    "debug",
    "loglevel",
    "ignore_loglevel",
    "earlyprintk",
    "earlycon",
    "initcall_debug",
}


def chooses_messages(cmdline: str) -> bool:
    """Whether a word of `cmdline` is about how many of its messages Linux prints."""
    return any(word.partition("=")[0] in _CHOOSES_MESSAGES for word in _words(cmdline))


def resets_by_triple_fault(cmdline: str) -> str:
    """The word of `cmdline` that has Linux reset the machine by a triple fault, or "".

    A letter behind "reboot=" or a comma chooses how (reboot_setup() in kernel/reboot.c); the last one counts.
    """
    chosen = ""
    for word in _words(cmdline):
        if word.startswith("reboot="):
            for part in word.removeprefix("reboot=").split(","):
                if part[:1] and part[0] in "baktep":
                    chosen = word if part[0] == "t" else ""
    return chosen


def parameter(cmdline: str, wanted: str) -> str | None:
    """The value of `wanted=` as Linux reads its command line (lib/cmdline.c, next_arg()), or None.

    Words end at white space outside double quotes. A quote in front of a word or of its
    value is no part of it, nor then one at its end. Of several the last one
    counts; what stands behind `--` is init's.
    """
    found = None
    # Linux knows bytes, and takes one of UTF-8's for white space.
    for word in _words(cmdline.encode(errors="surrogateescape").decode("latin-1")):
        quoted = word.startswith('"')
        name, equals, value = word[quoted:].partition("=")
        if name == "--" and not equals:
            break
        if value.startswith('"'):
            value, quoted = value[1:], True
        if quoted and value.endswith('"'):
            value = value[:-1]
        if name == wanted and equals:
            found = value
    return found


def last_word(cmdline: str, wanted: tuple[str, ...]) -> str | None:
    """Whichever of the words `wanted`, which have no value, comes last in front of `--`; None for none."""
    found = None
    for word in _words(cmdline):
        if word == "--":
            break
        if word in wanted:
            found = word
    return found


def _words(cmdline: str) -> Iterator[str]:
    word, quoted = "", False
    for character in cmdline:
        if character in _SPACE and not quoted:
            if word:
                yield word
            word = ""
            continue
        quoted ^= character == '"'
        word += character
    if word:
        yield word


def load_bzimage(
    memory: GuestRam,
    file: KernelFile,
    header: SetupHeader,
    *,
    initrd: Payload | None,
    cmdline: bytes,
    rsdp: int,
    kaslr: bool = False,
) -> Entry:
    """Load a bzImage by the fast path, or as it is when `kaslr` or when no vmlinux can be taken out of it.

    Raises BootError: too old, not 64-bit, truncated, does not fit.
    """
    _check(file, header)
    version = _version(file, header)
    if not kaslr:
        found = _vmlinux_of(file.path)
        if found is not None:
            with KernelFile(found, file.flag, shown=file.path) as inner:
                image = _usable(inner)
                if image is not None:
                    return load_vmlinux(
                        memory,
                        image,
                        header=header,
                        initrd=initrd,
                        cmdline=cmdline,
                        rsdp=rsdp,
                        what=f"Linux {version} (vmlinux entry, no KASLR)",
                    )
    size = file.size - header.setup_size
    base = header.pref_address if header.relocatable_kernel else header.code32_start
    base = base or board.KERNEL_ADDRESS
    layout = Layout(memory.size, file.path)
    layout.claim(base, max(size, header.init_size), "the kernel")
    boot_params = _place(layout, memory, file, header, initrd, cmdline, rsdp)
    file.copy_to(memory, base, header.setup_size, size, "the protected-mode kernel")
    return Entry(Mode.LONG, base + _ENTRY_64, {"rsi": boot_params}, f"Linux {version} (bzImage entry)")


def load_vmlinux(
    memory: GuestRam,
    image: elf.ElfImage,
    *,
    header: SetupHeader | None = None,
    initrd: Payload | None,
    cmdline: bytes,
    rsdp: int,
    what: str = "vmlinux (64-bit entry, no KASLR)",
) -> Entry:
    """Load a 64-bit vmlinux at its physical addresses and enter it at e_entry, which is physical too.

    `header` is its bzImage's, where there was one. Raises BootError.
    """
    if not image.entry_is_loaded(image.entry):
        raise image.file.error(
            f"its entry point {image.entry:#x} is not in what it loads",
            "give a Linux vmlinux, or an ELF with a PVH note",
        )
    layout = Layout(memory.size, image.file.path)
    image.claim(layout)
    boot_params = _place(
        layout, memory, image.file, header or bootparams.synthetic_header(), initrd, cmdline, rsdp
    )
    image.load(memory)
    return Entry(Mode.LONG, image.entry, {"rsi": boot_params}, what)


def check_cmdline(cmdline: bytes, limit: int) -> None:
    """Raise BootError when `cmdline` has more than `limit` bytes (or more than its area holds)."""
    limit = min(limit, board.COMMAND_LINE_LIMIT - 1)
    if len(cmdline) > limit:
        raise BootError(
            f"--append: the command line has {len(cmdline)} bytes, this kernel takes {limit}; shorten it"
        )


def _check(file: KernelFile, header: SetupHeader) -> None:
    version = header.version
    shown = f"{version >> 8}.{version & 0xFF:02}"
    if header.boot_flag != bootparams.BOOT_FLAG:
        raise file.error("has a Linux setup header but no boot flag: broken", "build or copy it again")
    if not header.loadflags & bootparams.LOADED_HIGH:
        raise file.error("is a zImage, which only 16-bit loaders can start", "build a bzImage")
    if version < bootparams.MIN_VERSION:
        raise file.error(f"speaks boot protocol {shown}, without a 64-bit entry", "give Linux 3.8 or later")
    if not header.xloadflags & bootparams.XLF_KERNEL_64:
        raise file.error("is a 32-bit kernel", "give one built for x86-64")
    # The size is in whole paragraphs, and the last one need not be: memtest86+ ends within it.
    end = header.setup_size + max(header.system_size - 15, _ENTRY_64 + 1)
    if file.size < end:
        raise file.truncated(f"the kernel, which ends at byte {end} or later,")


def _version(file: KernelFile, header: SetupHeader) -> str:
    """The release in the version string ("6.1.0-9-amd64"), "?" when it has none that can be shown."""
    at = header.kernel_version_offset
    if not 0 < at < min(header.setup_size, file.size):
        return "?"
    raw = file.read(at, min(64, file.size - at), "the version string").split(b"\0")[0].split(b" ")[0]
    text = raw.decode("ascii", "replace")
    return text if text.isascii() and text.isprintable() and text else "?"


def _vmlinux_of(bzimage: Path) -> Path | None:
    from hvkvm.boot import vmlinux

    try:
        found = vmlinux.extract(bzimage)
    except OSError:
        return None
    return None if found is None or found == bzimage else found


def _usable(file: KernelFile) -> elf.ElfImage | None:
    """The parsed vmlinux, None when it is not one: then the bzImage boots itself."""
    try:
        image = elf.parse(file)
    except BootError:
        return None
    return image if image.bits == 64 and image.entry_is_loaded(image.entry) else None


def _place(
    layout: Layout,
    memory: GuestRam,
    file: KernelFile,
    header: SetupHeader,
    initrd: Payload | None,
    cmdline: bytes,
    rsdp: int,
) -> int:
    """Check the rest and write all but the kernel; the address of boot_params."""
    check_cmdline(cmdline, header.cmdline_size)
    initrd_at = initrd_size = 0
    if initrd is not None:
        # 0 in a broken header means no room at all, and claim_high says so.
        taken = layout.claim_high(initrd.size, header.initrd_addr_max, "the initrd", initrd.name)
        initrd.copy_to(memory, taken.gpa)
        initrd_at, initrd_size = taken.gpa, taken.size
    memory.write(board.COMMAND_LINE_ADDRESS, cmdline + b"\0")
    memory.write(board.SETUP_DATA_ADDRESS, bootparams.rng_seed_node(os.urandom(_SEED_SIZE)))
    memory.write(
        board.ZERO_PAGE_ADDRESS,
        bootparams.build(
            header,
            e820.memory_map(memory.size),
            rsdp=rsdp,
            cmdline=board.COMMAND_LINE_ADDRESS,
            initrd=initrd_at,
            initrd_size=initrd_size,
            setup_data=board.SETUP_DATA_ADDRESS,
        ),
    )
    write_tables(memory, Mode.LONG)
    return board.ZERO_PAGE_ADDRESS
