"""Runs the conformance guest under a VMM with a serial port, and says what it saw rule by rule.

The guest is a 32-bit multiboot ELF image of some 20 KiB; whatever VMM starts it shows
its serial console on standard output. Owner: the caller's thread.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from hvkvm.errors import ConfigError, VmmNotRun
from hvkvm.testing.conform_rules import FAULT, RULES, Rule, program
from hvkvm.testing.micro_image import micro_image
from hvkvm.testing.parent_death import signal_at_parents_death

MAX_OUTPUT = 1 << 20
LOOK_SECONDS = 1.0
"""So often a signal is seen that came just before a wait for output began, and so did not end it."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LINE = re.compile(rb"^([RF]) ([0-9a-f]{1,4}) ([0-9a-f]{1,16})\r?$", re.MULTILINE)

QEMU = (
    "qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -machine pc -accel kvm"
    " -cpu host,hv-passthrough -m 64 -device hyperv-testdev -device vmbus-bridge"
    " -device isa-debug-exit,iobase=0xf4,iosize=4 -serial stdio -kernel {kernel}"
)
"""What `--vmm qemu` runs."""
HVKVM = (
    "run --quiet --kernel {kernel} --memory 64M --hv passthrough --vmbus on --device hyperv-testdev"
    " --control off --no-reboot --synic {synic}"
)
"""What `--vmm hvkvm` runs, behind hvkvm itself."""


class Found(NamedTuple):
    """A rule and what the guest saw; None: the guest did not come so far."""

    rule: Rule
    seen: int | None

    @property
    def verdict(self) -> str:
        """ "ok", "absent", "not ok", or "no answer"."""
        return "no answer" if self.seen is None else self.rule.verdict(self.seen)

    @property
    def text(self) -> str:
        """What was seen, in words."""
        if self.seen is None:
            return "nothing"
        if self.seen & FAULT:
            return f"exception {self.seen - FAULT}"
        return f"{self.seen:#x}" if self.seen > 9 else str(self.seen)

    @property
    def wanted(self) -> str:
        """What is right, in words."""
        texts = [Found(self.rule, value).text for value in self.rule.expected]
        return " or ".join(texts) + (" or more" if self.rule.least else "")


def command_of(vmm: str, synic: str = "auto") -> list[str]:
    """The command for "qemu", "hvkvm", or one of the user's with {kernel} in it. ConfigError."""
    if vmm == "qemu":
        template = shlex.split(QEMU)
    elif vmm == "hvkvm":
        template = [sys.executable, "-m", "hvkvm", *shlex.split(HVKVM)]
    else:
        try:
            template = shlex.split(vmm)
        except ValueError as error:
            raise ConfigError(f"--vmm {vmm}: {error}; quote it as a shell wants it") from None
        if not any("{kernel}" in word for word in template):
            raise ConfigError(f"--vmm {vmm}: names no {{kernel}}; put it where the image's path belongs")
    kernel = micro_image(program())
    return [word.replace("{kernel}", str(kernel)).replace("{synic}", synic) for word in template]


def run(command: Sequence[str], seconds: float) -> tuple[list[Found], str]:
    """Run the guest, for `seconds` at most: what it saw, and all that the VMM printed. VmmNotRun."""
    output = _output(command, seconds)
    return findings(output), output.decode(errors="replace")


def findings(output: bytes) -> list[Found]:
    """What the lines of a guest's console say, by rule."""
    seen: dict[int, int] = {}
    for kind, number, value in _LINE.findall(output):
        seen[int(number, 16)] = int(value, 16) + (FAULT if kind == b"F" else 0)
    return [Found(rule, seen.get(number)) for number, rule in enumerate(RULES)]


def _start(command: Sequence[str], mask: set[int | signal.Signals]) -> subprocess.Popen[bytes]:
    """The VMM, with `mask` for its signals and a session of its own. VmmNotRun."""
    ask = signal_at_parents_death(signal.SIGKILL)

    def in_child() -> None:
        ask()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=in_child,  # noqa: PLW1509 (takes no lock)
        )
    except OSError as error:
        raise VmmNotRun(
            f"--vmm {command[0]}: {error.strerror}; install it, or name it with its path"
        ) from None


def _output(command: Sequence[str], seconds: float) -> bytes:
    # What ends us waits until we know the process: out of Popen, it would leave what that has started.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        process = _start(command, mask)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    assert process.stdout is not None
    end = monotonic() + seconds
    output = bytearray()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\nEND" not in output and len(output) < MAX_OUTPUT:
                left = end - monotonic()
                if left <= 0:
                    break
                if not selector.select(min(LOOK_SECONDS, left)):
                    continue
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                output += data
    finally:
        _end(process)
    return bytes(output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, with all that it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.5)  # it ends by itself where it knows our ports
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def table(found: Sequence[Found]) -> Iterator[str]:
    """For people."""
    width = max(len(one.rule.title) for one in found)
    yield f"{'RULE':9} {'':9} {'WHAT':{width}}  SEEN"
    for one in found:
        wrong = "" if one.verdict in ("ok", "absent") else f", not {one.wanted}"
        yield f"{one.rule.name:9} {one.verdict:9} {one.rule.title:{width}}  {one.text}{wrong}"
    yield summary(found)


def summary(found: Sequence[Found]) -> str:
    """One line."""
    counts = {
        word: sum(one.verdict == word for one in found) for word in ("ok", "not ok", "no answer", "absent")
    }
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "ok")


def tap(found: Sequence[Found]) -> Iterator[str]:
    """The Test Anything Protocol."""
    yield "TAP version 13"
    yield f"1..{len(found)}"
    for number, one in enumerate(found, 1):
        good = one.verdict in ("ok", "absent")
        skip = " # SKIP not offered" if one.verdict == "absent" else ""
        yield f"{'ok' if good else 'not ok'} {number} - {one.rule.name}: {one.rule.title}{skip}"
        if not good:
            yield f"  ---\n  seen: {one.text}\n  wanted: {one.wanted}\n  ..."


def junit(found: Sequence[Found], vmm: str) -> str:
    """JUnit's XML."""
    import xml.etree.ElementTree as ET

    failed = sum(one.verdict in ("not ok", "no answer") for one in found)
    absent = sum(one.verdict == "absent" for one in found)
    suite = ET.Element(
        "testsuite", name=f"conform {vmm}", tests=str(len(found)), failures=str(failed), skipped=str(absent)
    )
    for one in found:
        case = ET.SubElement(suite, "testcase", classname=one.rule.name, name=one.rule.title)
        if one.verdict == "absent":
            ET.SubElement(case, "skipped", message="not offered")
        elif one.verdict != "ok":
            ET.SubElement(case, "failure", message=f"seen {one.text}, wanted {one.wanted}")
    return ET.tostring(suite, encoding="unicode")


def as_json(found: Sequence[Found]) -> list[dict[str, object]]:
    """For programs."""
    return [
        {
            "rule": one.rule.name,
            "title": one.rule.title,
            "verdict": one.verdict,
            "seen": one.text,
            "wanted": one.wanted,
        }
        for one in found
    ]
