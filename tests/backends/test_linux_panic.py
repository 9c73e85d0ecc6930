"""A panic on the console, and what only looks like one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.backends.linux_panic import panic

MESSAGE = "Kernel panic - not syncing: sysrq triggered crash"

# As Debian's 6.1 prints it, shortened.
TRACE = f"""\
sysrq: Trigger a crash
{MESSAGE}
CPU: 1 PID: 84 Comm: sh Not tainted 6.1.0-56-cloud-amd64 #1  Debian 6.1.192-2
Hardware name:  , BIOS
Call Trace:
 <TASK>
 dump_stack_lvl+0x44/0x5c
 panic+0x118/0x2ed
 sysrq_handle_crash+0x16/0x20
 </TASK>
Kernel Offset: disabled"""
FATAL = """\
CR2: 0000000000000000
---[ end trace 0000000000000000 ]---
Kernel panic - not syncing: Fatal exception in interrupt
Kernel Offset: disabled"""
EARLY = """\
Kernel panic - not syncing: No init found.  Try passing init= option to kernel.
CPU: 0 UID: 0 PID: 1 Comm: swapper/0 Not tainted 7.2.13
Call Trace:
 <TASK>
 </TASK>"""
END = f"---[ end {MESSAGE} ]---"


def timed(text: str, prefix: str = "[   12.345678] ") -> list[str]:
    return [prefix + line for line in text.split("\n")]


def plain(text: str) -> list[str]:
    return text.split("\n")


CALLER = "[    3.000001][    T1] "


@pytest.mark.parametrize(
    "lines",
    [
        timed(TRACE),
        timed(TRACE, CALLER),
        plain(TRACE),
        [*timed(TRACE), *timed("Rebooting in 5 seconds..")],
        [*timed(TRACE), *timed(END)],
        [*plain(TRACE), END, "", ""],
        ["~ # half a line"[:4] + line if MESSAGE in line else line for line in timed(TRACE)],
        [*timed(TRACE)[:3], "another CPU's last words", *timed(TRACE)[3:]],
        ["Kernel panic - not syncing: in a log", *timed("reboot: Restarting system"), *timed(TRACE)],
    ],
    ids=[
        "time",
        "caller",
        "plain",
        "timeout",
        "end",
        "plain end",
        "prompt",
        "words between",
        "quoted before",
    ],
)
def test_a_panic_that_resets(lines: list[str]) -> None:
    assert panic(lines) == MESSAGE


@pytest.mark.parametrize(
    ("text", "message"), [(FATAL, "Fatal exception in interrupt"), (EARLY, "No init found.")]
)
def test_other_panics_that_reset(text: str, message: str) -> None:
    for lines in (timed(text), plain(text)):
        found = panic(lines)
        assert found is not None
        assert found.startswith(f"Kernel panic - not syncing: {message}")
        assert panic(lines, hung=True) is None  # it has not said that it would stand still


@pytest.mark.parametrize("lines", [[*timed(TRACE), *timed(END)], [*plain(TRACE), END, ""], [MESSAGE, END]])
def test_a_panic_that_hangs(lines: list[str]) -> None:
    assert panic(lines, hung=True) == panic(lines) == MESSAGE


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["hello", ""],
        [MESSAGE],
        [MESSAGE, ""],
        timed(f"{MESSAGE}\nreboot: Restarting system"),
        ["# echo " + MESSAGE, MESSAGE, "# "],
        [f"fail if you see '{MESSAGE}'", *timed("reboot: Restarting system")],
        [f"> {line}" for line in plain(TRACE)],
        [*timed(TRACE), *timed("reboot: Restarting system", "[   20.000000] ")],
        [*timed(TRACE), *timed("sysrq: Resetting", "[   20.000000] ")],
        [*plain(TRACE), "reboot: Restarting system"],
        [*timed(TRACE), "# "],
        [*timed(TRACE), "42 tests passed"],
        [*plain(TRACE), "42 tests passed"],
        [*plain(TRACE), "# reboot -f"],
        [*timed(TRACE), *timed(END), "end of the log"],
        [END],
    ],
)
def test_what_only_looks_like_one(lines: list[str]) -> None:
    assert panic(lines) is None
    assert panic(lines, hung=True) is None


def test_an_oops_before_the_kernel_tells_its_offset_is_the_end() -> None:
    """Else a guest that cannot boot would be reset for ever."""
    lines = timed(
        "Oops: invalid opcode: 0000 [#1] SMP NOPTI\n---[ end trace 0000000000000000 ]---\n" + MESSAGE
    )
    assert panic(lines) == panic([*lines, ""]) == MESSAGE
    assert panic(lines, hung=True) is None


def test_a_kernel_that_said_no_last_word_does_not_hang_in_its_panic() -> None:
    """So a time-out stays one when a log was printed to its end."""
    assert panic(timed(TRACE), hung=True) is None
    assert panic([*timed(TRACE), *timed("Rebooting in 60 seconds..")], hung=True) == MESSAGE


pieces = st.sampled_from(
    [*timed(TRACE), *plain(TRACE), END, "", "# ", "[", "[    1.000000] ", MESSAGE + "[ "]
)


@given(st.lists(st.one_of(pieces, st.text(max_size=40)), max_size=12), st.booleans())
def test_any_lines_are_answered(lines: list[str], hung: bool) -> None:
    found = panic(lines, hung=hung)
    assert found is None or found.startswith("Kernel panic - not syncing: ")
    assert not hung or found is None or panic(lines) == found
