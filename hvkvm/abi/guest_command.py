"""How the host and the guest's init carry the streams of a guest command: ports, lines, words.

Why: the init's scripts (`boot.guest_scripts`) and the host's end
(`machine.command`) must agree on them. Numbers and words only; anyone may import it.

There are four ways, each a stream of its own: standard input, output, error, and
control. The guest connects them to vsock ports of the host, or takes them from serial
ports: ttyS1 carries input and output, ttyS2 error, ttyS3 control.

Control is lines, at most MAX_LINE_BYTES each with its newline. From the guest:

- `ready`: the command is about to start, signals reach it from now on;
- `signaled`: a `signal` was carried out;
- `input`: serial ports only, asks for the next piece of standard input, which comes
  on ttyS1 as a decimal number, a newline and that many bytes; 0 is its end;
- `size`: a terminal only, asks for its size.

And from one that waits for its command (`guest_scripts.AWAIT`):

- `warm memory` or `warm serial`: it waits, and this is how it will take the command;
- `piece`: serial ports only, asks for the next piece of the archive, as `input` does;
- `now`: asks for the time and random digits, which come as a line `SECONDS SEED`;
- `taken`: it has the command.

To the guest:

- `orders SECONDS SEED`: take your command; time and digits are for inits that do not ask `now`;
- `signal NAME`: for the command's process group (`INT`, `TERM`, ...), or the
  terminal's foreground one;
- `size ROWS COLUMNS`: the terminal's;
- `close out`, `close err`: nobody reads that any more.
"""

from __future__ import annotations

import posixpath
from typing import Literal


def place_of(guest: str) -> str:
    """Where an archive has the file that is to be at `guest`: "/a", "//a" and "/./a" are one place, "a"."""
    return posixpath.normpath(f"/{guest}").lstrip("/")


CommandIo = Literal["console", "streams", "terminal"]
"""Where a command's input and output lead: the console, streams of its own, a terminal of its own."""

VSOCK_CONTROL = 0x68766B00
VSOCK_INPUT = 0x68766B01
VSOCK_OUTPUT = 0x68766B02
VSOCK_ERROR = 0x68766B03
"""AF_VSOCK ports of the host, where no program of a person's listens by chance."""

MAX_LINE_BYTES = 64

SERIAL_PIECE = 2048
"""Most bytes of one answer to `input`: Linux keeps 4095 for a reader of a raw terminal."""

SERIAL_PORTS = 3
"""Serial ports beyond COM1 that the streams may need."""
