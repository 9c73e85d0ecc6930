"""Linux's log is read out of RAM as the kernel left it, and RAM that lies costs nothing but an answer."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.errors import GuestMemoryError
from hvkvm.observe import kernel_log
from hvkvm.observe.kernel_log import Line, NoKernelLog, read

PAGE = 4096
KERNEL_MAP = 0xFFFF_FFFF_8000_0000
PHYS_BASE = 0x20_0000
SIZE = 0x60_0000
TABLES, NOTE, PRB, DESCS, INFOS, DATA = (PHYS_BASE + at for at in range(0, 0x6000, PAGE))
COUNT_BITS, DATA_BITS = 5, 9
FINALIZED, COMMITTED, RESERVED = 2 << 62, 1 << 62, 0

OFFSETS = {
    "OFFSET(printk_ringbuffer.desc_ring)": 0,
    "OFFSET(printk_ringbuffer.text_data_ring)": 64,
    "OFFSET(prb_desc_ring.count_bits)": 0,
    "OFFSET(prb_desc_ring.descs)": 8,
    "OFFSET(prb_desc_ring.infos)": 16,
    "OFFSET(prb_desc_ring.head_id)": 24,
    "OFFSET(prb_desc_ring.tail_id)": 32,
    "OFFSET(prb_data_ring.size_bits)": 0,
    "OFFSET(prb_data_ring.data)": 8,
    "OFFSET(atomic_long_t.counter)": 0,
    "SIZE(prb_desc)": 24,
    "OFFSET(prb_desc.state_var)": 0,
    "OFFSET(prb_desc.text_blk_lpos)": 8,
    "OFFSET(prb_data_blk_lpos.begin)": 0,
    "OFFSET(prb_data_blk_lpos.next)": 8,
    "SIZE(printk_info)": 88,
    "OFFSET(printk_info.ts_nsec)": 8,
    "OFFSET(printk_info.text_len)": 16,
}


def virtual(gpa: int) -> int:
    """Where the kernel's image map has it."""
    return gpa - PHYS_BASE + KERNEL_MAP


class Ram:
    """RAM from gpa 0 on."""

    def __init__(self, size: int = SIZE) -> None:
        self.data = bytearray(size)

    def read(self, gpa: int, n: int) -> bytes:
        if not 0 <= gpa <= gpa + n <= len(self.data):
            raise GuestMemoryError(gpa, n)
        return bytes(self.data[gpa : gpa + n])

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        for at in range(0, len(self.data), 1 << 20):
            yield at, bytes(self.data[at : at + (1 << 20)])

    def put(self, gpa: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, self.data, gpa, *values)


class Kernel:
    """Writes a log into RAM as printk_ringbuffer.c does. One page table maps the image by 2 MiB pages."""

    def __init__(self, ram: Ram, words: dict[str, str] | None = None, *, phys_base: int = PHYS_BASE) -> None:
        self.ram = ram
        self.move = phys_base - PHYS_BASE
        self.next_id = 7  # as after a lap
        self.next_lpos = 3 << DATA_BITS
        here = self.here
        top, upper, lower = here(TABLES), here(TABLES) + 0x10_0000, here(TABLES) + 0x10_1000
        ram.put(top + 511 * 8, "Q", upper | 3)
        ram.put(upper + 510 * 8, "Q", lower | 3)
        for number in range(2):
            ram.put(lower + number * 8, "Q", (phys_base + (number << 21)) | 0x83)
        self.note(words or {}, phys_base)
        ram.put(here(PRB), "Q", virtual(PRB) + 8)  # `prb` points at the ring that stands behind it
        ring = here(PRB) + 8
        ram.put(ring, "IIQQQQ", COUNT_BITS, 0, virtual(DESCS), virtual(INFOS), self.next_id, self.next_id)
        ram.put(ring + 64, "IIQ", DATA_BITS, 0, virtual(DATA))

    def here(self, gpa: int) -> int:
        return gpa + self.move

    def note(self, words: dict[str, str], phys_base: int) -> None:
        said = {"OSRELEASE": "6.1.0-test", "NUMBER(phys_base)": str(phys_base)}
        said |= {"SYMBOL(prb)": f"{virtual(PRB):x}", "SYMBOL(init_top_pgt)": f"{virtual(TABLES):x}"}
        said |= {name: str(value) for name, value in OFFSETS.items()} | words
        text = "".join(f"{name}={value}\n" for name, value in said.items()).encode()
        at = self.here(NOTE)
        self.ram.put(at, "III", 11, len(text), 0)
        self.ram.data[at + 12 : at + 24] = b"VMCOREINFO\0\0"
        self.ram.data[at + 24 : at + 24 + len(text)] = text

    def print(
        self, text: str, nanoseconds: int, *, state: int = FINALIZED, length: int | None = None
    ) -> None:
        data, ram, here = text.encode(), self.ram, self.here
        size = -(-(8 + len(data)) // 8) * 8
        begin = self.next_lpos
        mask = (1 << DATA_BITS) - 1
        place = begin & mask
        if place + size > mask + 1:  # it would reach over the end: it lies at the start of the next lap
            place = 0
            self.next_lpos = (begin | mask) + 1
        self.next_lpos += size
        ram.data[here(DATA) + place + 8 : here(DATA) + place + 8 + len(data)] = data
        index = self.next_id & (1 << COUNT_BITS) - 1
        ram.put(here(DESCS) + index * 24, "QQQ", self.next_id | state, begin, self.next_lpos)
        ram.put(here(INFOS) + index * 88 + 8, "QH", nanoseconds, len(data) if length is None else length)
        ram.put(here(PRB) + 8 + 24, "Q", self.next_id)
        oldest = max(7, self.next_id - (1 << COUNT_BITS) + 1)
        ram.put(here(PRB) + 8 + 32, "Q", oldest)
        self.next_id += 1


def test_lines_come_as_they_were_printed() -> None:
    ram = Ram()
    kernel = Kernel(ram)
    kernel.print("Linux version 6.1", 0)
    kernel.print("two\nlines", 1_500_000_000)
    kernel.print("not finished", 2_000_000_000, state=RESERVED)
    kernel.print("being continued", 3_000_000_000, state=COMMITTED)
    kernel.print("\x1b[2Jclear", 4_000_001_000)
    found = read(ram)
    assert found == [
        Line(0.0, "Linux version 6.1"),
        Line(1.5, "two"),
        Line(1.5, "lines"),
        Line(3.0, "being continued"),
        Line(4.000001, "\x1b[2Jclear"),
    ]
    assert str(found[-1]) == r"[    4.000001] \x1b[2Jclear"


def test_both_rings_go_round() -> None:
    ram = Ram()
    kernel = Kernel(ram)
    texts = [f"message {number} {'x' * (number % 23)}" for number in range(200)]
    for number, text in enumerate(texts):
        kernel.print(text, number)
    found = [line.text for line in read(ram)]
    # Old descriptors whose text was written over tell garbage here, which Linux itself would have freed.
    newest = (1 << DATA_BITS) // 48
    assert found[-newest:] == texts[-newest:]


@pytest.mark.parametrize("length", [0xFFFF, 100])
def test_a_length_beyond_its_block_reads_no_further_than_that(length: int) -> None:
    ram = Ram()
    kernel = Kernel(ram)
    kernel.print("short", 0, length=length)
    assert [line.text for line in read(ram)] == ["short\0\0\0"]


def test_the_kernel_that_runs_is_chosen_of_two() -> None:
    ram = Ram(0xA0_0000)
    other = 0x60_0000
    for base, text in ((PHYS_BASE, "the one before"), (other, "the one that runs")):
        Kernel(ram, phys_base=base).print(text, 0)
    tables = {base: base + TABLES - PHYS_BASE for base in (PHYS_BASE, other)}
    assert read(ram, [tables[other]])[0].text == "the one that runs"
    assert read(ram, [tables[PHYS_BASE] | 0x18])[0].text == "the one before"
    assert read(ram, [0x1234_5000_0000])[0].text == "the one before"


def test_where_one_kernel_was_no_vcpu_is_asked() -> None:
    ram = Ram()
    Kernel(ram).print("alone", 0)
    asked = iter([TABLES])
    assert read(ram, asked)[0].text == "alone"
    assert list(asked) == [TABLES]


def test_what_is_no_linux_is_said() -> None:
    with pytest.raises(NoKernelLog, match="no Linux"):
        read(Ram())
    ram = Ram()
    Kernel(ram, {"SYMBOL(prb)": "nonsense"})
    with pytest.raises(NoKernelLog, match=r"SYMBOL\(prb\)"):
        read(ram)


def test_a_long_log_is_cut_at_its_old_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_log, "MOST_LINES", 3)
    ram = Ram()
    kernel = Kernel(ram)
    for number in range(5):
        kernel.print(str(number), number)
    assert [line.text for line in read(ram)] == ["2", "3", "4"]


WORDS = st.sampled_from(["SYMBOL(prb)", "SYMBOL(init_top_pgt)", "NUMBER(phys_base)", *OFFSETS])
VALUES = st.one_of(
    st.integers(-(1 << 70), 1 << 70).map(str), st.text(max_size=8), st.just("fffffffffffffff8")
)
BYTES = st.tuples(
    st.sampled_from([TABLES, NOTE, PRB, DESCS, INFOS, DATA]), st.integers(0, 600), st.binary(max_size=9)
)


@given(st.dictionaries(WORDS, VALUES, max_size=4), st.lists(BYTES, max_size=12))
def test_ram_that_lies_raises_nothing_else(
    words: dict[str, str], bytes_: list[tuple[int, int, bytes]]
) -> None:
    ram = Ram()
    kernel = Kernel(ram, words)
    for number in range(20):
        kernel.print(f"message {number}", number)
    for page, at, data in bytes_:
        ram.data[page + at : page + at + len(data)] = data
    try:
        found = read(ram, [TABLES])
    except NoKernelLog:
        return
    assert len(found) <= kernel_log.MOST_LINES
    assert sum(len(line.text) for line in found) <= kernel_log.MOST_CHARACTERS
