"""bzImage and vmlinux: where things go, what boot_params says, which way in is chosen."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import kernel_images as ki
import pytest

from hvkvm.abi import board
from hvkvm.boot import bootparams, linux
from hvkvm.boot.entry import Mode
from hvkvm.errors import BootError
from hvkvm.memory.guest import GuestMemory

MIB = 1 << 20
ZERO_PAGE = board.ZERO_PAGE_ADDRESS


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ki.ram() as ram:
        yield ram


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fast path keeps what it takes out; not in the user's cache."""
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def field(memory: GuestMemory, offset: int, code: str) -> int:
    return int(struct.unpack("<" + code, memory.read(ZERO_PAGE + offset, struct.calcsize(code)))[0])


def test_bzimage_is_entered_at_its_64_bit_entry(memory: GuestMemory, tmp_path: Path) -> None:
    kernel = bytes(range(256)) * 2 + ki.HALT + bytes(12)
    entry = ki.load(memory, tmp_path / "k", ki.bzimage(kernel), cmdline="a b")
    assert (entry.mode, entry.rip, entry.registers) == (
        Mode.LONG,
        16 * MIB + ki.ENTRY_64,
        {"rsi": ZERO_PAGE},
    )
    assert memory.read(16 * MIB, len(kernel)) == kernel
    assert entry.what == "Linux 6.1.0-test (bzImage entry)"


def test_boot_params(memory: GuestMemory, tmp_path: Path) -> None:
    content = ki.bzimage()
    ki.load(memory, tmp_path / "k", content, cmdline="console=ttyS0 x=é", initrd=b"initrd!")
    page = memory.read(ZERO_PAGE, 4096)
    header_end = 0x202 + 0x6A
    kept = bytearray(content[0x1F1:header_end])
    written = bytearray(page[0x1F1:header_end])
    for start, end in ((0x1FA, 0x1FC), (0x210, 0x212), (0x218, 0x220), (0x228, 0x22C), (0x250, 0x258)):
        kept[start - 0x1F1 : end - 0x1F1] = written[start - 0x1F1 : end - 0x1F1] = bytes(end - start)
    assert written == kept  # the kernel's own header but for the loader's fields
    assert field(memory, 0x070, "Q") == board.ACPI_AREA_ADDRESS  # acpi_rsdp_addr
    assert memory.read(board.ACPI_AREA_ADDRESS, 8) == b"RSD PTR "
    assert field(memory, 0x1EF, "B") == 0  # sentinel: these boot_params are meant
    assert field(memory, 0x210, "B") == 0xFF  # type_of_loader
    assert field(memory, 0x211, "B") == 1  # loadflags: LOADED_HIGH
    line = memory.read(field(memory, 0x228, "I"), 64)
    assert line.split(b"\0")[0] == "console=ttyS0 x=é".encode()
    entries = field(memory, 0x1E8, "B")
    table = list(struct.iter_unpack("<QQI", memory.read(ZERO_PAGE + 0x2D0, 20 * entries)))
    assert (0, board.LOW_RAM_END, 1) in table
    assert (MIB, 63 * MIB, 1) in table
    at, size = field(memory, 0x218, "I"), field(memory, 0x21C, "I")
    assert memory.read(at, size) == b"initrd!"
    assert at % 4096 == 0
    assert at + 4096 == memory.size  # as high as can be


def test_guests_random_generator_is_seeded_and_differently_each_time(
    memory: GuestMemory, tmp_path: Path
) -> None:
    seeds = set()
    for _ in range(2):
        ki.load(memory, tmp_path / "k", ki.bzimage())
        node = memory.read(field(memory, 0x250, "Q"), 48)
        assert struct.unpack_from("<QII", node) == (0, bootparams.SETUP_RNG_SEED, 32)
        seeds.add(node[16:])
    assert len(seeds) == 2


def test_initrd_stays_below_initrd_addr_max(tmp_path: Path) -> None:
    content = ki.bzimage(initrd_addr_max=0x37FFFFFF)
    with ki.ram(2 << 30) as memory:
        ki.load(memory, tmp_path / "k", content, initrd=bytes(5000))
        at = field(memory, 0x218, "I")
        assert at == 0x38000000 - 8192
        assert field(memory, 0x21C, "I") == 5000


def test_all_lies_below_4_gib_in_a_large_machine(tmp_path: Path) -> None:
    with ki.ram(5 << 30) as memory:
        ki.load(memory, tmp_path / "k", ki.bzimage(initrd_addr_max=0xFFFFFFFF), initrd=b"x")
        assert field(memory, 0x218, "I") == board.RAM_LOW_LIMIT - 4096


def test_initrd_file_and_bytes_are_the_same(memory: GuestMemory, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "i").write_bytes(data)
    for initrd in (tmp_path / "i", data, memoryview(data), bytearray(data)):
        ki.load(memory, tmp_path / "k", ki.bzimage(), initrd=initrd)
        assert memory.read(field(memory, 0x218, "I"), field(memory, 0x21C, "I")) == data


def test_empty_bytes_are_no_initrd(memory: GuestMemory, tmp_path: Path) -> None:
    ki.load(memory, tmp_path / "k", ki.bzimage(), initrd=b"")
    assert (field(memory, 0x218, "I"), field(memory, 0x21C, "I")) == (0, 0)


@pytest.mark.parametrize("content", [ki.bzimage(), ki.pvh(), ki.vmlinux()], ids=["bzimage", "pvh", "vmlinux"])
def test_without_acpi_no_rsdp_is_given(memory: GuestMemory, tmp_path: Path, content: bytes) -> None:
    ki.load(memory, tmp_path / "k", content, acpi=False)
    assert field(memory, 0x070, "Q") == 0
    assert memory.read(board.PVH_START_INFO_ADDRESS + 32, 8) == bytes(8)
    assert memory.read(board.ACPI_AREA_ADDRESS, 8) == bytes(8)


def test_kernel_that_cannot_move_loads_at_code32_start(memory: GuestMemory, tmp_path: Path) -> None:
    entry = ki.load(memory, tmp_path / "k", ki.bzimage(relocatable=0))
    assert entry.rip == MIB + ki.ENTRY_64


def test_fast_path_enters_the_vmlinux_inside(memory: GuestMemory, tmp_path: Path, own_cache: Path) -> None:
    content = ki.bzimage(vmlinux=ki.vmlinux(b"the kernel proper"))
    memory.write(16 * MIB + 17, b"dirt of an earlier boot")
    for _ in range(2):  # taken out, then found in the cache
        entry = ki.load(memory, tmp_path / "k", content, cmdline="q")
        assert (entry.mode, entry.rip) == (Mode.LONG, 16 * MIB)
        assert entry.registers == {"rsi": ZERO_PAGE}
        assert memory.read(16 * MIB, 17) == b"the kernel proper"
        assert memory.read(16 * MIB + 17, 8192) == bytes(8192)  # its bss
        assert field(memory, 0x1F1, "B") == 4  # the bzImage's own header went along
        assert entry.what == "Linux 6.1.0-test (vmlinux entry, no KASLR)"
    assert any(own_cache.rglob("*"))


def test_kaslr_keeps_the_guests_own_decompressor(memory: GuestMemory, tmp_path: Path) -> None:
    content = ki.bzimage(vmlinux=ki.vmlinux(b"the kernel proper"))
    entry = ki.load(memory, tmp_path / "k", content, kaslr=True)
    assert entry.rip == 16 * MIB + ki.ENTRY_64


@pytest.mark.parametrize(
    "inside",
    [b"not an ELF file", ki.elf(32, MIB, ki.segment(MIB, ki.HALT)), ki.elf(64, 99, ki.segment(MIB, ki.HALT))],
    ids=["text", "32-bit", "entry outside"],
)
def test_odd_payload_is_left_to_the_guest(memory: GuestMemory, tmp_path: Path, inside: bytes) -> None:
    entry = ki.load(memory, tmp_path / "k", ki.bzimage(vmlinux=inside))
    assert entry.rip == 16 * MIB + ki.ENTRY_64


def test_vmlinux_alone_gets_a_header_of_ours(memory: GuestMemory, tmp_path: Path) -> None:
    entry = ki.load(memory, tmp_path / "k", ki.vmlinux(), cmdline="x", initrd=b"i")
    assert (entry.mode, entry.rip) == (Mode.LONG, 16 * MIB)
    assert memory.read(ZERO_PAGE + 0x202, 4) == b"HdrS"
    assert field(memory, 0x1FE, "H") == 0xAA55
    assert field(memory, 0x206, "H") >= bootparams.MIN_VERSION
    assert field(memory, 0x21C, "I") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boot_flag": 0}, r"no boot flag: broken; build or copy it again"),
        ({"loadflags": 0}, r"is a zImage, which only 16-bit loaders can start; build a bzImage"),
        ({"version": 0x020B}, r"boot protocol 2\.11, without a 64-bit entry; give Linux 3\.8 or later"),
        ({"xloadflags": 0}, r"is a 32-bit kernel; give one built for x86-64"),
        ({"pref_address": 0x8000}, r"wants 0x8000, but the first MiB belongs"),
        ({"pref_address": 1 << 60}, r"past the 3 GiB"),
        ({"pref_address": 60 * MIB, "init_size": 8 * MIB}, r"^--memory 64M: .*; give at least 76M"),
        ({"init_size": 0xFFFFFFFF}, r"past the 3 GiB"),
    ],
)
def test_bzimage_that_cannot_boot(
    memory: GuestMemory, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(BootError, match=message) as caught:
        ki.load(memory, tmp_path / "k", ki.bzimage(**changes))
    assert "\n" not in str(caught.value)


def test_truncated_bzimage(memory: GuestMemory, tmp_path: Path) -> None:
    whole = ki.bzimage()
    for length in (len(whole) - 16, 5 * 512 + 0x200, 0x300):
        with pytest.raises(BootError, match=r"--kernel .*k: is truncated: .*; copy or build it again"):
            ki.load(memory, tmp_path / "k", whole[:length])


def test_bzimage_may_end_within_the_last_paragraph(memory: GuestMemory, tmp_path: Path) -> None:
    """Its header has the size in units of 16 bytes, rounded up; memtest86+ 7.20 ends 8 bytes before that."""
    whole = ki.bzimage(vmlinux=b"not an ELF file")
    for missing in (8, 15):
        ki.load(memory, tmp_path / f"k{missing}", whole[:-missing])


@pytest.mark.parametrize(
    ("content", "limit"),
    [(ki.bzimage(cmdline_size=255), 255), (ki.vmlinux(), 2047), (ki.pvh(), 2047)],
    ids=["bzimage", "vmlinux", "pvh"],
)
def test_command_line_limit_comes_from_the_kernel(
    memory: GuestMemory, tmp_path: Path, content: bytes, limit: int
) -> None:
    ki.load(memory, tmp_path / "k", content, cmdline="x" * limit)
    assert memory.read(board.COMMAND_LINE_ADDRESS, limit + 1) == b"x" * limit + b"\0"
    message = rf"--append: .* has {limit + 1} bytes, this kernel takes {limit}; shorten it"
    with pytest.raises(BootError, match=message):
        ki.load(memory, tmp_path / "k", content, cmdline="x" * (limit + 1))


def test_command_line_never_leaves_its_area(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(BootError, match="this kernel takes 65535"):
        ki.load(memory, tmp_path / "k", ki.bzimage(cmdline_size=0xFFFFFFFF), cmdline="x" * 70000)


def test_initrd_that_does_not_fit_names_the_memory_that_would_do(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(BootError, match=r"^--memory 64M: the initrd needs 60M .*; give at least 88M"):
        ki.load(memory, tmp_path / "k", ki.bzimage(), initrd=bytes(60 * MIB))


def test_initrd_that_no_memory_could_hold_is_its_own_fault(memory: GuestMemory, tmp_path: Path) -> None:
    content = ki.bzimage(initrd_addr_max=32 * MIB - 1)
    (tmp_path / "i").write_bytes(bytes(20 * MIB))
    message = r"^--initrd .*/i: the initrd has 20M, but .* below 0x2000000 only, where 12M are left"
    with pytest.raises(BootError, match=message):
        ki.load(memory, tmp_path / "k", content, initrd=tmp_path / "i")


def test_recommended_arguments_have_reasons() -> None:
    assert linux.default_cmdline().startswith("console=ttyS0 ")
    assert all(reason for _argument, reason in linux.DEFAULT_ARGUMENTS)


@pytest.mark.parametrize(
    ("cmdline", "root"),
    [
        ("", None),
        ("root=/dev/vda1", "/dev/vda1"),
        ("quiet root=/dev/vda1 ro", "/dev/vda1"),
        ("overlayroot=tmpfs", None),
        ("rd.root=x nfsroot=1.2.3.4:/ xroot=y", None),
        ("root=/dev/vda1 root=UUID=a=b", "UUID=a=b"),
        ("root=/dev/vda1 root=", ""),
        ("root=/dev/vda1 root", "/dev/vda1"),
        ('root="PARTLABEL=my disk" ro', "PARTLABEL=my disk"),
        ('"root=PARTLABEL=my disk" ro', "PARTLABEL=my disk"),
        ('dyndbg="file x root=y" ro', None),
        ('a" root="b', None),
        ("root=\tro", ""),
        ("-- root=/dev/vda1", None),
        ("root=/dev/vda1 -- root=x", "/dev/vda1"),
        ("--=x root=y", "y"),
    ],
)
def test_parameters_are_read_as_linux_reads_them(cmdline: str, root: str | None) -> None:
    """next_arg() of lib/cmdline.c."""
    assert linux.parameter(cmdline, "root") == root


def test_more_serial_ports_are_told_last() -> None:
    assert linux.parameter(linux.default_cmdline(), "8250.nr_uarts") == "1"
    assert linux.parameter(linux.default_cmdline(4), "8250.nr_uarts") == "4"
