"""A shell in a Linux guest, driven from the test over the serial console.

Why: a boot costs ten seconds and more in the lab, so a test runs many commands
in one boot, and decides on the next one by what the host saw meanwhile.
`linux_guest(SHELL)`, then `Shell(guest)` and `run(command)`. Owner: the test's thread.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from linux_guest import SECONDS, LinuxGuest

READY = "hvkvm-shell ready"
# Markers are put together by the guest, so that an echo of what was typed is none.
SHELL = (
    "stty -echo; echo hvkvm-shell $(echo ready);"
    ' while read -r line; do eval "$line"; echo "hvkvm-status $?"; done'
)
"""What such a guest runs: each line of its console is a command, and its status follows the output."""
# Its line's end must have come: "$" would also take the first digit of three.
_STATUS = re.compile(r"^hvkvm-status (\d+)\n", re.MULTILINE)


class Result(NamedTuple):
    """What a command printed (kernel messages between it too) and its exit status."""

    status: int
    output: str

    @property
    def lines(self) -> list[str]:
        """The output by lines."""
        return self.output.splitlines()


class Shell:
    """The shell that runs at present; `ready()` after each boot of a kernel in the same machine."""

    def __init__(self, guest: LinuxGuest) -> None:
        self.guest = guest
        self._boots = 0
        self._at = 0

    def ready(self, seconds: float = SECONDS) -> Shell:
        """Wait for the next boot's shell."""
        self._boots += 1
        text = self.guest.wait_for(READY, count=self._boots, seconds=seconds)
        self._at = text.rindex(READY) + len(READY)
        return self

    def send(self, command: str) -> None:
        """Type a command and do not wait: one that ends the kernel has no status."""
        self.guest.type(command)

    def run(self, command: str, seconds: float = SECONDS) -> Result:
        """Run a command and wait for its end."""
        start = self._at
        self.send(command)

        def ended() -> re.Match[str] | None:
            return _STATUS.search(self.guest.text, start)

        match = self.guest.wait_until(ended, f"running {command!r}", seconds)
        self._at = match.end()
        return Result(int(match[1]), self.guest.text[start : match.start()].strip("\n"))

    def check(self, command: str, seconds: float = SECONDS) -> str:
        """What a command printed; AssertionError when its status is not 0."""
        result = self.run(command, seconds)
        assert result.status == 0, f"{command!r}: status {result.status}\n{result.output}"
        return result.output
