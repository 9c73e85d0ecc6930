"""What the command says: results on standard output, the rest on standard error.

A result that cannot be written is an error with its reason and a status of its
own, since whoever asked for it does not have it. What goes to standard error
never fails: a full disk behind `2>` must not end a guest. Any thread.
"""

from __future__ import annotations

import os
import sys

from hvkvm.errors import OutputError


def show(text: str) -> None:
    """Print `text` as a line on standard output, now. OutputError where it cannot be written.

    BrokenPipeError where nobody reads any more, which is no error but an end.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise OutputError(cannot_write("standard output", error)) from error


def complain(text: str) -> bool:
    """Print `text` as a line on standard error; whether it could be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # full, hung up, or closed
        return False
    return True


def cannot_write(what: str, error: OSError) -> str:
    """Which output failed, and why: "cannot write to standard output: No space left on device"."""
    return f"cannot write to {what}: {error.strerror or error}"


def drop_output() -> None:
    """Send what standard output still holds to /dev/null, or the interpreter would fail on it once more."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
    finally:
        os.close(null)
