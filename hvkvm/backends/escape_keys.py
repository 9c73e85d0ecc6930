"""The keys that speak to hvkvm and not to the guest: Ctrl-a, then a letter.

Pure: bytes in, bytes for the guest and commands out, whatever way the input is
cut. The console owns one and feeds it on the I/O loop.
"""

from __future__ import annotations

from enum import Enum

ESCAPE = 0x01  # Ctrl-a

HELP = """
Ctrl-a x       end the guest
Ctrl-a d       say who waits for what
Ctrl-a b       send a break: Linux takes the next key as SysRq
Ctrl-a h       this help
Ctrl-a Ctrl-a  send Ctrl-a to the guest
Ctrl-c         goes to the guest; while nothing there reads the console, it ends the guest
"""


class Command(Enum):
    """What the user asked of hvkvm."""

    QUIT = "x"
    DUMP = "d"
    HELP = "h"
    BREAK = "b"


_COMMANDS = {ord(command.value): command for command in Command}


class EscapeKeys:
    """Remembers a Ctrl-a at the end of one piece of input for the start of the next."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, list[Command]]:
        """Split `data` into what the guest gets and the commands in it, in order; see `pieces`."""
        pieces = self.pieces(data)
        commands = [piece for piece in pieces if isinstance(piece, Command)]
        return b"".join(piece for piece in pieces if isinstance(piece, bytes)), commands

    def pieces(self, data: bytes) -> list[bytes | Command]:
        """What the guest gets and the commands between, in the order in which they were typed.

        A Ctrl-a before any other key goes to the guest together with that key,
        so a shell's "start of line" only waits for the next key.
        """
        if not self._escaped and ESCAPE not in data:
            return [data] if data else []
        found: list[bytes | Command] = []
        guest = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    guest.append(byte)
                continue
            self._escaped = False
            if byte in _COMMANDS:
                if guest:
                    found.append(bytes(guest))
                    guest.clear()
                found.append(_COMMANDS[byte])
            elif byte == ESCAPE:
                guest.append(ESCAPE)
            else:
                guest += bytes((ESCAPE, byte))
        if guest:
            found.append(bytes(guest))
        return found
