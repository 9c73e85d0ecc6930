"""One command run in the lab: its script, its streams, its signals, its end.

Why: the command must behave as if it had been started here: live output on the
right stream, standard input, Ctrl-C, the true exit status. Called by
`scripts/lab`. One thread; the machine may die at any moment, and that is an
outcome of its own, never a hang.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from steps.distribution import say
from steps.lab_processor import Processor

BOOT_SECONDS = 120.0
# L1 says it is alive every 5 s. Silent with an idle processor, it stands still; with a busy one it is slow
# or loops, and only time tells which.
SILENCE_SECONDS = 60.0
BUSY_SILENCE_SECONDS = 900.0
# How long a command that is asked what it waits for has to say so. That takes its processor some seconds,
# which are no sign of life: what it does after it is.
TELL_SECONDS = 20.0
AFTER_TELL_SECONDS = 20.0
# Once in some hundred guest runs L1 was seen halted for ever, interrupts on and no tick coming: QEMU 7.2's
# nested SVM seems to lose a pending one. Any other interrupt makes the local APIC look again.
POKE_SECONDS = 1.0
GRACE_SECONDS = 5.0
STATUS_TIMEOUT = 124

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Outcome(NamedTuple):
    """How a job ended. `status` None: the machine died under it, for `reason`.

    `printed`, `fed`: whether the job had given output and taken standard input by then.
    """

    status: int | None
    reason: str = ""
    printed: bool = False
    fed: bool = False


class Tail:
    """Takes a stream's bytes and withholds the mark that ends it."""

    def __init__(self, token: str) -> None:
        self._mark = b"\0" + token.encode()
        self._held = b""
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """The bytes that are output for certain; `ended` once the mark has come."""
        data = self._held + data
        self._held = b""
        before, mark, _ = data.partition(self._mark)
        if mark:
            self.ended = True
            return before
        # Only the mark's first byte is NUL, so at most one place can begin a half-received mark.
        start = data.rfind(b"\0", -len(self._mark))
        if start >= 0 and self._mark.startswith(data[start:]):
            self._held = data[start:]
            return data[:start]
        return data


def job_script(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> bytes:
    """The shell script that becomes `command` in `folder` with `environment`."""
    # A shell ends at a name that is none to it, as other programs' variables may have.
    named = {name: value for name, value in environment.items() if _NAME.fullmatch(name)}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in named.items()]
    complaint = shlex.quote(f"lab: {folder.name}: not there in the lab")
    lines += [f"cd {shlex.quote(str(folder))} || {{ printf '%s\\n' {complaint} >&2; exit 126; }}"]
    # The process id is the session and the group id too, because setsid ran this shell.
    lines += ["echo $$ >/run/lab/pid", f"exec {shlex.join(command)}"]
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")


class Session:
    """The connections of one job to a lab machine whose sockets lie in `folder`."""

    def __init__(
        self,
        folder: Path,
        pid: int,
        *,
        tty: bool,
        fresh: bool,
        detail: Callable[[str], None],
        stall: float | None = None,
    ) -> None:
        self.tty, self.detail = tty, detail
        # After `stall` seconds of an idle processor the command is asked what it waits for, and given up.
        self.stall, self.asked_at = stall, math.inf
        self.processor = Processor(pid)
        self.ready = not fresh
        self.heard = self.poked = self.rested = time.monotonic()
        self.token = os.urandom(8).hex()
        self.poll = selectors.PollSelector()
        self.sockets: dict[str, socket.socket] = {}
        self.tails: dict[str, Tail] = {}
        self.outputs = {"terminal": 1} if tty else {"stdout": 1, "stderr": 2}
        self.printed = self.fed = self.dead = self.ending = False
        self.status: int | None = None
        self.reason = ""
        self.control = b""
        self.pending = b""
        self.interrupts = 0
        self.pid = os.pidfd_open(pid)
        self.poll.register(self.pid, selectors.EVENT_READ, self._on_death)
        for name in ("control", "signals", *self.outputs, *(() if tty else ("stdin",))):
            link = self.sockets[name] = socket.socket(socket.AF_UNIX)
            link.connect(str(folder / name))
        self.poll.register(self.sockets["control"], selectors.EVENT_READ, self._on_control)
        for name in self.outputs:
            self.tails[name] = Tail(self.token)
            self.poll.register(
                self.sockets[name], selectors.EVENT_READ, lambda name=name: self._on_output(name)
            )
        self.input = self.sockets["terminal" if tty else "stdin"]

    def close(self) -> None:
        """Let go of the machine; a kept one is then free for the next job."""
        self.poll.close()
        os.close(self.pid)
        for link in self.sockets.values():
            link.close()

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, script: bytes, timeout: float | None) -> Outcome:
        """Run `script` to its end, or the machine's, or the deadline (`timeout` seconds)."""
        with _signals_as_bytes() as wakeup, _raw_terminal(self.tty):
            self.poll.register(wakeup, selectors.EVENT_READ, lambda: self._on_signal(os.read(wakeup, 64)))
            early = self._until_up()
            if early is not None:
                return early
            header = f"job {len(script)} {self.token} {'tty' if self.tty else 'pipes'}\n"
            # Should it have died just now, the loop will hear of that.
            with contextlib.suppress(OSError):
                self.sockets["control"].sendall(header.encode() + script)
            if self.tty:
                self._send_window_size()
            self._watch_input()
            return self._until_end(timeout)

    def wait_up(self) -> Outcome | None:
        """Wait until a machine just started is ready for jobs; an Outcome when it will not be."""
        with _signals_as_bytes() as wakeup:
            self.poll.register(wakeup, selectors.EVENT_READ, lambda: self._on_signal(os.read(wakeup, 64)))
            early = self._until_up()
            self.poll.unregister(wakeup)
            return early

    def _until_up(self) -> Outcome | None:
        deadline = time.monotonic() + BOOT_SECONDS
        while not self.ready:
            self._turn(deadline)
            if not self.reason and not self.ready and time.monotonic() >= deadline:
                self.reason = f"it did not come up in {BOOT_SECONDS:g} s"
            if self.reason:
                return Outcome(self.status, self.reason)
        return None

    def _until_end(self, timeout: float | None) -> Outcome:
        deadline = time.monotonic() + timeout if timeout else None
        late = False
        while not self._over():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                if late:
                    return self._outcome(STATUS_TIMEOUT, "the command did not end when told to")
                late, deadline = True, now + GRACE_SECONDS
                say(f"lab: the command ran into its {timeout:g} s deadline")
                self._forward("TERM")
            self._turn(deadline)
        if late and self.status is not None:
            return self._outcome(STATUS_TIMEOUT, "")
        self.detail(f"lab: its processor was idle for {self.processor.longest:.0f} s at most")
        return self._outcome(self.status, self.reason)

    def _outcome(self, status: int | None, reason: str) -> Outcome:
        return Outcome(status, reason, self.printed, self.fed)

    def _over(self) -> bool:
        if self.reason:
            return True
        return self.status is not None and all(tail.ended for tail in self.tails.values())

    def _turn(self, deadline: float | None) -> None:
        """Wait for events once, at most to `deadline`; a machine that stands still counts as dead."""
        poke = self._poke() if self.ready else math.inf
        limit = min(poke, math.inf if deadline is None else deadline)
        events = self.poll.select(0 if self.dead else max(0.0, limit - time.monotonic()))
        for key, _ in events:
            # An event may have taken away another's cause.
            if key.fd in self.poll.get_map():
                key.data()
            if self.reason:
                return
        if self.dead and not events:
            self._conclude()
        if self.ready and not self.dead:
            self._look_for_standstill(time.monotonic())

    def _look_for_standstill(self, now: float) -> None:
        idle, silent = self.processor.idle(now), now - self.heard
        if idle >= SILENCE_SECONDS and silent >= SILENCE_SECONDS:
            self.reason = (
                f"it stands still: nothing said and its processor idle for {int(min(idle, silent))} s"
            )
        elif silent >= BUSY_SILENCE_SECONDS:
            self.reason = f"it has said nothing for {BUSY_SILENCE_SECONDS:g} s, though its processor works"
        elif self.asked_at != math.inf:
            self._look_after_asking(now, idle)
        elif self.stall is not None and min(idle, now - self.rested) >= self.stall:
            # It is alive and what runs in it waits for ever: that is worth a look before it is ended.
            self.asked_at = now
            say(f"lab: its processor has been idle for {int(idle)} s: asking the command what it waits for")
            self._forward("TELL")

    def _look_after_asking(self, now: float, idle: float) -> None:
        if self.rested > self.asked_at:
            self.asked_at = math.inf
        elif now >= self.asked_at + TELL_SECONDS + AFTER_TELL_SECONDS:
            if idle >= AFTER_TELL_SECONDS:
                self.reason = f"it stands still: idle again for {int(idle)} s after it was asked"
            self.asked_at = math.inf

    def _poke(self) -> float:
        """Send L1 an interrupt if it is time; returns when it next is."""
        now = time.monotonic()
        if now >= self.poked + POKE_SECONDS:
            self.poked = now
            with contextlib.suppress(OSError):
                self.sockets["signals"].send(b"\n", socket.MSG_DONTWAIT)
        return self.poked + POKE_SECONDS

    # --- what can happen --------------------------------------------------------------------------

    def _on_death(self) -> None:
        # What it sent is still in the sockets' buffers, and a status there counts: see _turn.
        self.dead = True
        self.poll.unregister(self.pid)
        with contextlib.suppress(KeyError):
            self.poll.unregister(0)

    def _conclude(self) -> None:
        """The machine is gone and all it said has been read."""
        if self.status is None:
            self.reason = "its process ended"
        for tail in self.tails.values():
            tail.ended = True

    def _on_control(self) -> None:
        data = self._receive("control")
        if data:
            self.heard = time.monotonic()
        self.control += data
        *lines, self.control = self.control.split(b"\n")
        for line in lines:
            verb, _, rest = line.decode(errors="replace").partition(" ")
            if verb == "hello":
                self.ready = True
                self.detail(f"lab: up after {rest} s of its own time")
            elif verb == "beat" and rest == "resting":
                self.rested = self.heard
            elif verb == "fatal":
                self.reason = rest
            elif verb == "ending":
                self.ending = True
            elif verb == "exit":
                self.status = int(rest)

    def _on_output(self, name: str) -> None:
        data = self._receive(name)
        if not self.ending:
            # A mark is sent after this news, so bytes that came before it are output, a NUL at their end too.
            self._on_control()
        text = self.tails[name].feed(data) if data and self.ending else data
        if text:
            self.printed = True
            try:
                _write_all(self.outputs[name], text)
            except BrokenPipeError:
                # Our reader has gone; so would the command's have, had it run here.
                self.outputs[name] = os.open(os.devnull, os.O_WRONLY)
                self._forward("PIPE")

    def _receive(self, name: str) -> bytes:
        try:
            data = self.sockets[name].recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except ConnectionError:
            data = b""
        if not data and self.sockets[name] in self.poll.get_map():
            # End of the machine; the process's own end says so too, with its reason.
            self.poll.unregister(self.sockets[name])
        return data

    def _on_signal(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                self._send_window_size()
                continue
            self.interrupts += 1
            if self.interrupts > 2 or not self.ready:
                self.status, self.reason = 128 + number, "interrupted"
                return
            self._forward(signal.Signals(number).name[3:])

    def _forward(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self.sockets["signals"].sendall(f"{name}\n".encode())

    def _send_window_size(self) -> None:
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(1)
            self._forward(f"WINCH {size.lines} {size.columns}")

    # --- standard input ---------------------------------------------------------------------------

    def _watch_input(self) -> None:
        self.input.setblocking(False)
        try:
            self.poll.register(0, selectors.EVENT_READ, self._on_input)
        except (ValueError, OSError):
            self._end_input()

    def _on_input(self) -> None:
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        self.poll.unregister(0)
        if data:
            self.fed = True
            self.pending = data
            self._flush_input()
        else:
            self._end_input()

    def _flush_input(self) -> None:
        """Send what is pending; standard input is read again only when all of it has gone."""
        with contextlib.suppress(BlockingIOError):
            try:
                self.pending = self.pending[self.input.send(self.pending) :]
            except ConnectionError:
                self.pending = b""
                return
        events = selectors.EVENT_READ if self.tty else 0
        registered = self.input in self.poll.get_map()
        if self.pending:
            if self.tty:
                self.poll.modify(self.input, events | selectors.EVENT_WRITE, self._on_terminal)
            elif not registered:
                self.poll.register(self.input, selectors.EVENT_WRITE, self._flush_input)
            return
        if self.tty:
            self.poll.modify(self.input, events, lambda: self._on_output("terminal"))
        elif registered:
            self.poll.unregister(self.input)
        self.poll.register(0, selectors.EVENT_READ, self._on_input)

    def _on_terminal(self) -> None:
        # Readable or writable, poll's answer is not kept: try both, neither blocks.
        self._flush_input()
        self._on_output("terminal")

    def _end_input(self) -> None:
        if not self.tty:
            # Not closed: on a hang-up QEMU drops what the command has not read yet.
            self.input.shutdown(socket.SHUT_WR)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            time.sleep(0.01)


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[int]:
    """Signals arrive as bytes on the descriptor, one each, and do no more. What nohup ignores stays so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = {*_FORWARDED, signal.SIGWINCH} - ({signal.SIGHUP} if nohup else set())
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    """The user's terminal passes every key on to the lab's, and is put back whatever happens."""
    if not wanted or not os.isatty(0):
        yield
        return
    import termios
    import tty

    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
        sys.stdout.flush()
