"""A traced process as /proc shows it: its memory, its KVM fds, where its vCPUs' shared pages are.

Owner: the tracer's thread. Everything here may vanish or lie while we look (the
process dies, closes, forks): what cannot be known is None or empty, never an error.
"""

from __future__ import annotations

import os
import stat

from hvkvm.tuples import NamedTuple

KVM_DEVICE = os.makedev(10, 232)  # misc major, KVM_MINOR
PAGES_OF_RUN = 8192  # struct kvm_run, and the page behind it with the data of port I/O


class Scope(NamedTuple):
    """What a KVM fd is: `kind` is "system", "vm", "vcpu", "device" or "?"; `number` the vCPU's id."""

    kind: str
    number: int | None = None

    def __str__(self) -> str:
        return self.kind if self.number is None else f"{self.kind}{self.number}"


UNKNOWN = Scope("?")


class Tracee:
    """One traced process (a thread group). `fds` holds what is known of its KVM fds; `close` when it ends."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fds: dict[int, Scope] = {}
        self._run_at: dict[int, int] = {}
        self._memory = -1

    def read(self, address: int, size: int) -> bytes:
        """Up to `size` bytes of its memory; fewer, or none, where there is no more."""
        try:
            if self._memory < 0:
                self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._memory, size, address)
        except (OSError, OverflowError):  # not mapped; gone; beyond what an offset can be
            return b""

    def scope(self, fd: int) -> Scope | None:
        """What `fd` is, by what KVM returned or else by its link; None for no KVM fd."""
        known = self.fds.get(fd)
        if known is None:
            known = self._look(fd)
            if known is not None and known is not UNKNOWN:
                self.fds[fd] = known
        return known

    def _look(self, fd: int) -> Scope | None:
        path = f"/proc/{self.pid}/fd/{fd}"
        try:
            link = os.readlink(path)
            if not link.startswith("anon_inode:"):
                about = os.stat(path)
                is_kvm = stat.S_ISCHR(about.st_mode) and about.st_rdev == KVM_DEVICE
                return Scope("system") if is_kvm else None
        except OSError:
            return UNKNOWN  # closed, or hidden from us
        name = link.removeprefix("anon_inode:").strip("[]")
        if name == "kvm-vm":
            return Scope("vm")
        if name.startswith("kvm-vcpu"):
            index = name.partition(":")[2]
            return Scope("vcpu", int(index) if index.isdecimal() else None)
        return Scope("device") if name.startswith("kvm") else None

    def created(self, fd: int, scope: Scope) -> None:
        """KVM returned `fd`."""
        self.fds[fd] = scope
        self._run_at.pop(fd, None)

    def closed(self, first: int, last: int) -> None:
        """Fds `first` to `last` may mean something else from now on."""
        for fd in [fd for fd in self.fds if first <= fd <= last]:
            del self.fds[fd]
            self._run_at.pop(fd, None)

    def mapped(self, fd: int, address: int) -> None:
        """The start of vCPU `fd` was mapped at `address`."""
        self._run_at[fd] = address

    def run_pages(self, fd: int) -> bytes:
        """kvm_run of the vCPU `fd` and its I/O data, or b"" if it is not known where they are."""
        if fd not in self._run_at:
            self._run_at[fd] = self._find_run(fd)
        address = self._run_at[fd]
        return self.read(address, PAGES_OF_RUN) if address else b""

    def _find_run(self, fd: int) -> int:
        # Attached too late to see the mmap. Two VMs in one process have vCPUs of the same name: then
        # the maps do not tell whose it is, and no exit is better than another vCPU's.
        try:
            link = os.readlink(f"/proc/{self.pid}/fd/{fd}")
            with open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="replace") as maps:
                rows = [line.split(None, 5) for line in maps]
        except OSError:
            return 0
        found = [
            int(row[0].partition("-")[0], 16)
            for row in rows
            if len(row) == 6 and row[5].strip() == link and int(row[2], 16) == 0
        ]
        return found[0] if len(found) == 1 else 0

    def close(self) -> None:
        """Forget everything, also after an exec: the memory is another then. Idempotent."""
        memory, self._memory = self._memory, -1
        if memory >= 0:
            os.close(memory)
        self.fds.clear()
        self._run_at.clear()


def group_of(tid: int) -> int:
    """The process that thread `tid` belongs to; `tid` itself where that cannot be read."""
    value = status_field(tid, "Tgid")
    return int(value) if value.isdecimal() else tid


def status_field(tid: int, field: str) -> str:
    """A line of /proc/TID/status, "" if there is none."""
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name == field:
                    return value.strip()
    except OSError:
        pass
    return ""


def thread_name(pid: int, tid: int) -> str:
    """The name of a thread, with anything but printable characters replaced: it goes to a terminal."""
    try:
        with open(f"/proc/{pid}/task/{tid}/comm", "rb") as file:
            raw = file.read(64)
    except OSError:
        return "?"
    name = raw.decode("utf-8", "replace").rstrip("\n")
    return "".join(c if c.isprintable() and not c.isspace() else "?" for c in name) or "?"


def threads_of(pid: int) -> list[int]:
    """The threads of a process; [] if there is none such."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return []
