"""The session that a Linux guest's command runs in: its keys, its last words, its status."""

from __future__ import annotations

from time import sleep

import pytest
from linux_guest import linux_guest, warm_linux_guest

from hvkvm.devices.port import serial_output
from hvkvm.devices.port.serial_registers import FIFO_SIZE

pytestmark = pytest.mark.hyperv

CTRL_C, CTRL_Z = b"\x03", b"\x1a"
LINE = "0123456789abcde"
LIMIT = 1 << 13
"""Of a UART, instead of its own: each byte is an exit of the guest."""
LINES = (LIMIT + 3000) // len(f"{LINE}\r\n")
"""More than a UART takes that is held; the kernel keeps the rest, 4096 bytes at most."""


def test_what_waits_in_the_guest_when_its_command_ends_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux drops what a terminal has not sent yet when the leader of the session on it dies."""
    monkeypatch.setattr(serial_output, "TX_LIMIT", LIMIT)
    monkeypatch.setattr(serial_output, "_CAPACITY", LIMIT + FIFO_SIZE)
    script = f"stty -echo; echo now; read -r line; yes {LINE} | head -n {LINES}; exit 7"
    with linux_guest(script, modules=(), vmbus="off") as guest:
        output = guest.machine.board.serial.output
        guest.start()
        guest.wait_for("now\n")
        output.hold(True)
        guest.type("go")
        guest.wait_until(lambda: output.full, "the UART to be full")
        sleep(3)  # the command ends meanwhile
        output.hold(False)
        assert guest.finish().status == 7
        words = guest.text.split("now\n")[1].splitlines()
        assert (output.overruns, len(words), set(words)) == (0, LINES, {LINE})


@pytest.mark.parametrize(
    ("script", "status", "last"),
    [
        ("echo now; sleep 1000", 130, ""),
        ("trap 'echo caught; exit 5' INT; echo now; while :; do sleep 1; done", 5, "caught"),
    ],
    ids=["dies", "catches"],
)
def test_ctrl_c_is_the_commands(script: str, status: int, last: str) -> None:
    with warm_linux_guest(script) as guest:
        guest.start()
        guest.wait_for("now\n")
        guest.press(CTRL_C)
        assert guest.finish().status == status
        said = guest.text.split("now\n")[1]
        # Linux sends the signal before it echoes the key: the command may be quicker than the echo.
        assert said.count("^C") == 1
        assert said.replace("^C", "").strip() == last


@pytest.mark.parametrize(
    ("script", "status"),
    [("trap 'exit 9' TERM; kill 0; sleep 1000", 9), ("kill -9 $PPID; sleep 1000", 137)],
    ids=["its process group", "the leader"],
)
def test_a_command_that_kills_around_it_ends_the_guest(script: str, status: int) -> None:
    with warm_linux_guest(script) as guest:
        assert guest.finish().status == status


def test_without_a_command_there_is_a_shell_with_jobs() -> None:
    job = "sh -c 'echo job at work; exec sleep 1000'"
    with warm_linux_guest("", command=()) as guest:
        guest.start()
        guest.wait_until(lambda: "# " in guest.text, "the prompt")
        guest.type("stty -echo; echo quiet now")
        guest.wait_for("\nquiet now\n")
        guest.type(job)
        guest.wait_for("job at work\n")
        guest.press(CTRL_C)
        guest.type(f"echo status $?; {job}")
        assert "status 130\n" in guest.wait_for("job at work\n", count=2)
        guest.press(CTRL_Z)
        guest.type("jobs; echo listed")
        assert "Stopped" in guest.wait_for("listed\n")
        # A shell does not leave while it has a stopped job, and hears of its death as it waits for a child:
        # `wait` alone waits for no stopped one.
        guest.type("kill -9 %1; sleep 1; exit 3")
        assert guest.finish().status == 3
