"""Finds a running VM's control socket and asks it one thing after another.

Used by the verbs `ctl` and `top`, on the main thread. Every wait has an end.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from hvkvm.errors import ConfigError, Refused, VmGone
from hvkvm.observe import control_path

CONNECT_SECONDS = 5.0
GRACE_SECONDS = 5.0
"""How much longer than the VM itself we wait for an answer."""
MAX_REPLY = 1 << 23
MAX_PID_DIGITS = 10
_ucred = struct.Struct("iII")


class MissingKey(Refused):
    """Key-value exchange: no such key."""


def _how_to_look(pid: int) -> str:
    """What else can be done with a process that does not answer on its socket."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        state = ""
    if state in ("T", "t"):
        return f"its process {pid} is stopped: `kill -CONT {pid}` has it go on"
    return f"if it is a `hvkvm run`, `kill -QUIT {pid}` has it print who waits for what"


class Vm:
    """A connection to one VM. VmGone when nobody listens at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)
        except TimeoutError:
            self._socket.close()
            text = f"{path}: the VM is busy: it takes no connection within {CONNECT_SECONDS:g} s; try again"
            raise Refused(text) from None
        except OSError as error:
            self._socket.close()
            raise VmGone(f"{path}: no VM listens there ({error.strerror or error})") from None
        self.pid: int = _ucred.unpack(credentials)[0]

    def _connect(self) -> None:
        """OSError; TimeoutError while as many as the VM lets wait do so already."""
        self._socket.settimeout(CONNECT_SECONDS)
        end = monotonic() + CONNECT_SECONDS
        while True:
            try:
                self._socket.connect(str(self.path))
                return
            except BlockingIOError:  # a Unix socket has its timeout for something else
                if monotonic() >= end:
                    raise TimeoutError from None
                sleep(CONNECT_SECONDS / 100)

    def ask(self, do: str, seconds: float, **request: Any) -> Any:
        """The result of one request, for which the VM may take `seconds`.

        Refused with the VM's reason, ConfigError if it does not know such a
        request, VmGone if it ends before it answers.
        """
        from json import dumps, loads

        line = dumps({"do": do, "timeout": seconds, **request}).encode() + b"\n"
        try:
            self._socket.settimeout(seconds + GRACE_SECONDS)
            self._socket.sendall(line)
            reply = loads(self._line(seconds + GRACE_SECONDS))
            if not isinstance(reply, dict):
                raise ValueError("it speaks another language")
        except TimeoutError:
            text = f"the VM does not answer within {seconds + GRACE_SECONDS:g} s"
            raise Refused(f"{text}; {_how_to_look(self.pid)}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise VmGone(f"the VM went before it answered ({error})") from None
        if reply.get("ok"):
            return reply.get("result")
        kinds = {"usage": ConfigError, "missing": MissingKey}
        raise kinds.get(str(reply.get("kind")), Refused)(reply.get("error", "no reason given"))

    def _line(self, seconds: float) -> bytes:
        end = monotonic() + seconds
        while b"\n" not in self._buffer:
            left = end - monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(1 << 16)
            if not data:
                raise ValueError("its connection closed")
            self._buffer += data
            if len(self._buffer) > MAX_REPLY:
                raise ValueError("it says too much")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def find(wanted: str | None) -> Vm:
    """The VM of that name, PID or path; without one, the only VM there is.

    VmGone when there is no such VM; ConfigError when there is none or a choice; Refused for one that is busy.
    """
    if wanted is not None and "/" in wanted:
        return Vm(Path(wanted))
    paths = control_path.sockets()
    names = ", ".join(path.stem for path in paths)
    if wanted is None:
        if not paths:
            raise ConfigError("no VM is running; start one with hvkvm run, or name its socket with --vm PATH")
        if len(paths) > 1:
            raise ConfigError(f"{len(paths)} VMs are running: {names}; choose one with --vm NAME")
        return Vm(paths[0])
    for path in paths:
        if path.stem == wanted:
            return Vm(path)
    mute: Refused | None = None
    for path in paths if wanted.isdecimal() and len(wanted) <= MAX_PID_DIGITS else []:
        try:
            vm = Vm(path)
        except Refused as error:  # it may be the one, and says nothing of its process; or another is
            mute = mute or error
            continue
        except VmGone:
            continue
        if vm.pid == int(wanted):
            return vm
        vm.close()
    if mute is not None:
        raise mute
    shown = wanted if len(wanted) <= 200 else f"{wanted[:200]}..."
    raise VmGone(f"--vm {shown}: no such VM; running: {names or 'none'}")
