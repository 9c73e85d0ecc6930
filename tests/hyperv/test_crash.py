"""What a crashing guest says, told from its MSRs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_kvm import FakeVm
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.hyperv.crash import CRASH_PARAMETERS, MAX_TEXT, crash_text, panic_text
from hvkvm.memory.guest import GuestMemory

RAM = 4 << 20
NOTIFY, MESSAGE = 1 << 63, 1 << 62


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(FakeVm(), RAM)
    yield memory
    memory.close()


def test_register_form(memory: GuestMemory) -> None:
    text = panic_text([0x0, 0x8100_0006_0C00_0000, 0xFFFFFFFF81000000, 1, 0xFFFFC90000000000], memory)
    assert "rip 0xffffffff81000000" in text
    assert "guest OS id 0x810000060c000000" in text
    assert "rsp 0xffffc90000000000" in text


def test_message_form(memory: GuestMemory) -> None:
    memory.write(0x3000, b"<0>Kernel panic - not syncing: gone\r\n")
    parameters = [0, 0, 0, 0x3000, 37]
    assert panic_text(parameters, memory) == "<0>Kernel panic - not syncing: gone"
    assert panic_text(parameters, memory, NOTIFY | MESSAGE) == "<0>Kernel panic - not syncing: gone"


def test_the_bit_decides_where_it_is_known(memory: GuestMemory) -> None:
    memory.write(0x3000, b"text")
    assert panic_text([0, 0, 0, 0x3000, 4], memory, NOTIFY).startswith("the guest crashed: error 0x0")
    assert panic_text([1, 2, 3, 0x3000, 4], memory, NOTIFY | MESSAGE) == "text"
    assert "no message" in panic_text([0, 0, 0, 0, 0], memory, NOTIFY | MESSAGE)


def test_control_characters_do_not_reach_the_terminal(memory: GuestMemory) -> None:
    memory.write(0x3000, b"a\x1b[2Jb\x00\x07c\nd\xff\xc2\x9b")
    text = panic_text([0, 0, 0, 0x3000, 16], memory)
    assert text.startswith("a [2Jb  c\nd")
    assert all(c == "\n" or c.isprintable() for c in text)


def test_length_is_bounded_and_outside_ram_is_said(memory: GuestMemory) -> None:
    memory.write(0x3000, b"x" * 3 * MAX_TEXT)
    assert panic_text([0, 0, 0, 0x3000, 1 << 63], memory) == "x" * MAX_TEXT
    assert "outside RAM" in panic_text([0, 0, 0, RAM - 1, 2], memory)
    assert "empty" in panic_text([0, 0, 0, 0x100000, 3], memory)


@given(
    parameters=st.lists(st.one_of(st.just(0), st.integers(0, (1 << 64) - 1)), min_size=5, max_size=5),
    ctl=st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
)
def test_no_guest_value_raises(memory: GuestMemory, parameters: list[int], ctl: int | None) -> None:
    assert panic_text(parameters, memory, ctl)


def test_parameters_come_from_the_vcpus_msrs(memory: GuestMemory) -> None:
    class Vcpu:
        def msrs(self, indices: tuple[int, ...]) -> dict[int, int]:
            assert indices == CRASH_PARAMETERS == (0x40000100, 0x40000101, 0x40000102, 0x40000103, 0x40000104)
            return {index: 0x10 + index % 16 for index in indices}

    assert "error 0x10, guest OS id 0x11, rip 0x12, rax 0x13, rsp 0x14" in crash_text(Vcpu(), memory)
