"""A running machine's control socket: what `hvkvm ctl` and other programs may ask of it.

Each line is a request, {"do": NAME, ...}, and brings one reply; the framing is
`observe.control_socket`. NAME is one of `Control.requests`; those that need the
guest are in `control_guest`. "timeout" (seconds) bounds how long the guest may
take. Only the user who runs the machine can connect.

Made by `control_door` when the first client comes, and owned by the I/O loop;
`close` and `tell_the_end` run on the main thread behind that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvkvm.errors import HostExhausted, HvkvmError, Refused, Stopped
from hvkvm.machine import control_guest, inspect
from hvkvm.machine.control_net import NetControl
from hvkvm.machine.outcome import Ending
from hvkvm.observe.control_socket import Answer, ControlSocket
from hvkvm.runtime.thread_start import start_thread

if TYPE_CHECKING:
    from hvkvm.machine.control_disks import DiskRequests
    from hvkvm.machine.lifecycle import Lifecycle
    from hvkvm.machine.parts import Parts

Request = dict[str, Any]

LONGEST = 24 * 3600.0
"""Most seconds that a request may wait."""
DEFAULT_SECONDS = 10.0
WATCH_SECONDS = 0.1
QUIT_STATUS = 130
"""Exit status of a run that `quit` ended: its command was interrupted."""
APART_JOIN_SECONDS = 5.0
MOST_KEYS = 64
"""Characters that may come with a break."""


class Control:
    """Answers requests about one machine. Raises OSError, Stopped; then `listener` is still the caller's."""

    def __init__(self, parts: Parts, listener: int) -> None:
        from socket import socket

        self._parts = parts
        self._io = parts.platform.io
        self.requests: dict[str, Callable[[Request, Answer], object]] = {
            "info": lambda _request, answer: answer.ok(inspect.info(parts)),
            "inspect": lambda _request, answer: answer.ok(inspect.inspect(parts)),
            "dump": self._dump,
            "dmesg": self._dmesg,
            "break": self._break,
            "nmi": self._nmi,
            "save": self._save,
            "screenshot": self._screenshot,
            "wait": self._wait,
            "quit": self._quit,
            "disk": self._disk,
            "net": NetControl(parts).handle,
            **control_guest.requests(parts, self.wait),
        }
        self._disks: DiskRequests | None = None
        self._waiting: list[tuple[Answer, int | None]] = []
        self._saved: Callable[[], object] | None = None
        """Answers a save with which the run has ended."""
        self._watching = False
        self._apart_thread: threading.Thread | None = None
        self._apart_now = ""
        """What is being made apart; the thread lives on for a moment when its answer is out."""
        listening = socket(fileno=listener)
        try:
            self._socket = ControlSocket(listening, self._io, self._handle)
        except BaseException:
            listening.detach()  # the fd is still the caller's
            raise

    def _handle(self, request: Request, answer: Answer) -> None:
        handler = self.requests.get(request["do"])
        if handler is None:
            answer.fail(
                "usage", f"{request['do'][:40]}: no such request; there are {', '.join(self.requests)}"
            )
            return
        try:
            seconds = control_guest.number(request, "timeout", DEFAULT_SECONDS, LONGEST)
            handler(request, answer)
            if answer.wanted:
                answer.timer = self._io.call_later(seconds, self._expire, answer, seconds)
        except ValueError as error:
            answer.fail("usage", str(error))
        except Stopped:
            return  # the machine is ending: `close` tells those who wait for that, the others see it

    def _expire(self, answer: Answer, seconds: float) -> None:
        waited = any(one is answer for one, _resets in self._waiting)
        answer.fail("guest", f"{'it has not happened' if waited else 'no answer'} within {seconds:g} s")

    def _dump(self, _request: Request, answer: Answer) -> None:
        def work() -> str:
            from hvkvm.machine.dump import describe

            return describe(self._parts)

        self._apart("dump", work, answer)  # it waits for the vCPUs' threads, and the loop must not

    def _dmesg(self, _request: Request, answer: Answer) -> None:
        """The lines of the guest's kernel log, as [seconds, text]."""

        def work() -> dict[str, Any]:
            from hvkvm.machine.kernel_log import kernel_log

            return {"lines": kernel_log(self._parts.platform)}

        self._apart("dmesg", work, answer)

    def _screenshot(self, request: Request, answer: Answer) -> None:
        """Write what the guest's framebuffer shows to "file", an absolute path."""
        path = _absolute(request)
        firmware = self._parts.firmware
        display = None if firmware is None else firmware.display
        if display is None:
            answer.fail("absent", "this VM has no framebuffer; start it in firmware with --display ramfb")
            return
        shelf = self._parts.disk_shelf
        specs = () if shelf is None else shelf.specs

        def work() -> dict[str, Any]:
            from hvkvm.machine.own_files import why_kept
            from hvkvm.machine.screenshot import screenshot

            if why := why_kept(path, self._parts.platform.config, specs):
                raise Refused(why)
            size = screenshot(display, self._parts.platform.memory, path)
            return {"file": str(path), **size._asdict()}

        self._apart("screenshot", work, answer)

    def _apart(self, what: str, work: Callable[[], object], answer: Answer) -> None:
        """Answer with what `work()` returns, on a thread of its own. One at a time."""
        if self._apart_now:
            answer.fail("busy", f"another {self._apart_now} is being made; try again")
            return

        def made(tell: Callable[..., None], *told: object) -> None:
            self._apart_now = ""
            tell(*told)

        def run() -> None:
            try:
                try:
                    result = work()
                except (ValueError, HvkvmError) as error:
                    self._io.call_soon(made, answer.fail, "guest", str(error))
                except OSError as error:
                    self._io.call_soon(made, answer.fail, "guest", f"{error.filename}: {error.strerror}")
                except Exception as error:
                    self._io.call_soon(made, answer.fail, "internal", f"{type(error).__name__}: {error}")
                else:
                    self._io.call_soon(made, answer.ok, result)
            except Stopped:
                return  # the machine ends, and the connection with it

        thread = threading.Thread(target=run, name=what, daemon=True)
        try:
            start_thread(thread)
        except HostExhausted as error:
            answer.fail("busy", str(error))
        else:
            self._apart_thread, self._apart_now = thread, what

    def _break(self, request: Request, answer: Answer) -> None:
        """A break on the serial console; with "keys", these behind it: Linux takes the first as SysRq."""
        keys = control_guest.text(request, "keys") if "keys" in request else ""
        if not (keys.isascii() and len(keys) <= MOST_KEYS):
            raise ValueError(f'"keys" are up to {MOST_KEYS} ASCII characters')
        serial = self._parts.board.serial
        if serial.rx_room() <= len(keys):
            answer.fail("guest", "the guest does not read its console: too much waits for it already")
            return
        serial.feed_break()
        serial.feed(keys.encode())
        answer.ok({"listens": serial.receive_interrupt_enabled})

    def _nmi(self, request: Request, answer: Answer) -> None:
        """A non-maskable interrupt for vCPU "cpu", or for each. Not waited for: a thread may be stuck."""
        vcpus = self._parts.platform.threads
        cpu = request.get("cpu")
        if cpu is not None:
            if isinstance(cpu, bool) or not isinstance(cpu, int) or not 0 <= cpu < len(vcpus):
                raise ValueError(f'"cpu" is the number of a vCPU, 0 to {len(vcpus) - 1}')
            vcpus = [vcpus[cpu]]
        for thread in vcpus:
            thread.submit(thread.vcpu.nmi)
        answer.ok({"cpus": [thread.vcpu.index for thread in vcpus]})

    def _save(self, request: Request, answer: Answer) -> None:
        """Write the machine to "file", an absolute path; answered when it is whole.

        The guest goes on, or with "end" true the run ends, which is answered as by "wait". "compress" true
        makes the file small. One that nobody waits for any more is given up.
        """
        path = _absolute(request)

        given = {key: request.get(key) is True for key in ("end", "compress")}

        def saved(size: int, why: str) -> None:
            if why:
                answer.fail("guest", f"not saved: {why}")
            elif given["end"]:
                if answer.timer is not None:
                    answer.timer.cancel()
                self._saved = partial(answer.ok, {"file": str(path), "bytes": size})
            else:
                answer.ok({"file": str(path), "bytes": size})

        if not self._parts.saver.save(path, saved, wanted=lambda: answer.wanted, **given):
            answer.fail("busy", "another save is being made; try again")

    def _disk(self, request: Request, answer: Answer) -> None:
        if self._disks is None:
            from hvkvm.machine.control_disks import DiskRequests

            self._disks = DiskRequests(self._parts)
        self._disks(request, answer)

    def _quit(self, _request: Request, answer: Answer) -> None:
        """Answered as "wait" is."""
        self._waiting.append((answer, None))
        self._parts.lifecycle.finish(Ending.QUIT, QUIT_STATUS, "by its control socket")

    def _wait(self, request: Request, answer: Answer) -> None:
        """Until the run has ended; with "resets": N, until the machine was reset more often than that too."""
        resets = request.get("resets")
        if resets is not None and not isinstance(resets, int):
            raise ValueError('"resets" is a number, as "info" tells it')
        self.wait(answer, resets)

    def wait(self, answer: Answer, resets: int | None) -> None:
        """Answer at the end of the run, or once there were more than `resets` resets."""
        self._waiting.append((answer, resets))
        if not self._watching:
            self._watching = True
            self._watch()

    def _watch(self) -> None:
        """A reset has no event of its own, and asking now and then costs nothing."""
        lifecycle, waiting = self._parts.lifecycle, self._waiting
        self._waiting = [(answer, resets) for answer, resets in waiting if answer.wanted]
        for answer, resets in list(self._waiting):
            if resets is not None and lifecycle.resets > resets:
                answer.ok(_end(lifecycle))
        self._watching = bool(self._waiting)
        if self._watching:
            self._io.call_later(WATCH_SECONDS, self._watch)

    def close(self) -> None:
        """Let go of what the machine is about to release. The I/O loop has ended. Idempotent."""
        if self._apart_thread is not None:
            self._apart_thread.join(APART_JOIN_SECONDS)

    def tell_the_end(self) -> None:
        """Tell those who wait how it ended, and go: nothing of the machine is there any more. Idempotent."""
        waiting, self._waiting = self._waiting, []
        for answer, _resets in waiting:
            answer.ok(_end(self._parts.lifecycle))
        saved, self._saved = self._saved, None
        if saved is not None:
            saved()
        self._socket.close()


def _absolute(request: Request) -> Path:
    """The "file" of a request. ValueError."""
    path = Path(control_guest.text(request, "file"))
    if not path.is_absolute() or "\0" in str(path):
        raise ValueError('"file" is an absolute path')
    return path


def _end(lifecycle: Lifecycle) -> dict[str, Any]:
    outcome = lifecycle.outcome
    found: dict[str, Any] = {"resets": lifecycle.resets}
    if outcome is not None:
        found |= {"ending": outcome.ending.value, "status": outcome.status, "detail": outcome.detail}
    return found
