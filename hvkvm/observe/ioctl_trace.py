"""Follows another process with ptrace and reports each KVM ioctl it makes.

`Tracer` starts a command or attaches to a process, follows its threads and
children, and hands every ioctl to `emit` as a `Call`. For `hvkvm trace` and for
scripts that compare VMMs.

Owner: one thread, the process's main one: ptrace belongs to a thread, and `follow`
takes SIGCHLD, SIGINT, SIGTERM, SIGHUP and SIGQUIT over and reaps every child. Where
SIGHUP is ignored (nohup) it stays so: blocked, it would wait for us all the same.

python-ptrace's own debugger polls its tracees with sleeps and knows neither
PTRACE_SEIZE (attach without a stop signal, let go without a trace) nor
PTRACE_GET_SYSCALL_INFO (Linux 5.3: which stop is an entry, which a return). So its
binding does each request and the loop is here. Every system call of the traced
process stops twice, which costs it some tens of microseconds.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from ctypes import addressof, c_ulong, sizeof
from time import perf_counter

from hvkvm.errors import CapabilityMissing, ConfigError
from hvkvm.observe import kvm_ioctls
from hvkvm.observe import ptrace_door as door
from hvkvm.observe.kvm_names import request_name
from hvkvm.observe.spawn import Command
from hvkvm.observe.tracee import UNKNOWN, Scope, Tracee, group_of, status_field, thread_name, threads_of
from hvkvm.tuples import NamedTuple

STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
SYSCALL_STOP = signal.SIGTRAP | 0x80  # with PTRACE_O_TRACESYSGOOD
# System calls of x86-64 that matter: the ioctl, and those that change what an fd is.
IOCTL, CLOSE, MMAP, DUP2, DUP3, CLOSE_RANGE = 16, 3, 9, 33, 292, 436

ROOT = "be root, or start it with hvkvm trace --"
CONTAINER = "trace a user program, and let the container have CAP_SYS_PTRACE"


class Call(NamedTuple):
    """One KVM ioctl. `error` is an errno name or ""; `seconds` includes what tracing costs."""

    pid: int
    tid: int
    thread: str
    scope: Scope
    fd: int
    request: str
    fields: kvm_ioctls.Fields
    result: int
    error: str
    seconds: float


class _Thread:
    """A traced thread: `call` is what it is inside of, `stopped` says that ptrace may talk to it."""

    __slots__ = ("call", "process", "signal", "stopped", "tid")

    def __init__(self, tid: int, process: Tracee) -> None:
        self.tid = tid
        self.process = process
        self.stopped = False
        self.signal = 0  # to be delivered when it is let go
        self.call: tuple[int, int, int, int, Scope, kvm_ioctls.Fields, float] | None = None


def error_name(result: int) -> str:
    """The errno name of a failed call's return value."""
    return errno.errorcode.get(-result) or f"E{-result}"


class Tracer:
    """Follows what `spawn` or `attach` took on.

    `emit` is called for each KVM ioctl that returned, while its thread still stands.
    With `wanted`, only requests of these names are decoded and reported.
    `runs` decodes the exit of each KVM_RUN; without it KVM_RUN is reported bare.
    """

    def __init__(
        self,
        emit: Callable[[Call], None],
        *,
        runs: bool = False,
        wanted: frozenset[str] | None = None,
    ) -> None:
        self._emit = emit
        self._runs = runs
        self._wanted = wanted
        self._threads: dict[int, _Thread] = {}
        self._processes: dict[int, Tracee] = {}
        self._main = 0
        self._command = False
        self._status = 0
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._asking = tuple(n for n in ASKING if n != signal.SIGHUP or not nohup)
        self._signals = (signal.SIGCHLD, *self._asking)
        self._info = door.ptrace_syscall_info()
        self._info_at = addressof(self._info)

    def spawn(self, argv: Sequence[str]) -> int:
        """Start a command, traced from its first instruction; its pid.

        ConfigError if it cannot be started, CapabilityMissing if ptrace is forbidden here.
        """
        child = Command(argv)
        try:
            door.binding.ptrace(door.PTRACE_SEIZE, child.pid, 0, door.OPTIONS)
        except door.PtraceError as error:
            child.abandon()
            raise door.forbidden(argv[0], error, CONTAINER) from error
        self._main, self._command = child.pid, True
        self._add(child.pid)
        child.go()
        return child.pid

    def attach(self, pid: int) -> None:
        """Take on the running process `pid` with all its threads.

        ConfigError: no such process, or one that cannot be traced. CapabilityMissing: not permitted.
        """
        state = status_field(pid, "State")
        if not state or pid <= 0:
            raise ConfigError(f"--pid {pid}: no such process; look it up with ps")
        pid = group_of(pid)
        if state.startswith(("Z", "X")):
            raise ConfigError(f"--pid {pid}: that process has ended; choose a running one")
        if pid == os.getpid():
            raise ConfigError(f"--pid {pid}: that is hvkvm itself; choose another process")
        tracer = status_field(pid, "TracerPid")
        if tracer not in ("", "0"):
            raise ConfigError(f"--pid {pid}: process {tracer} traces it already; end that one first")
        self._main = pid
        try:
            # A thread born between the listing and its parent's seizing shows up in the next listing.
            while missing := [tid for tid in threads_of(pid) if tid not in self._threads]:
                seized = [tid for tid in missing if self._seize(tid)]
                if not seized:
                    break
        except door.PtraceError as error:
            self.let_go()
            raise door.forbidden(f"--pid {pid}", error, ROOT if os.geteuid() else CONTAINER) from error
        if not self._threads:
            raise ConfigError(f"--pid {pid}: that process has just ended; choose a running one")

    def _seize(self, tid: int) -> bool:
        try:
            door.binding.ptrace(door.PTRACE_SEIZE, tid, 0, door.OPTIONS)
        except door.PtraceError as error:
            if error.errno == errno.ESRCH or status_field(tid, "State").startswith(("Z", "X")):
                return False  # ended meanwhile
            if error.errno == errno.EPERM and status_field(tid, "TracerPid") == str(os.getpid()):
                self._add(tid)  # born of a thread we had seized already: ours, and about to say so
                return True
            raise
        self._add(tid)
        door.request(door.PTRACE_INTERRUPT, tid)
        return True

    def follow(self) -> int:
        """Trace until everything traced has ended; its exit status as a shell would give it.

        A signal to us ends the trace and leaves an attached process running (128 + its number). A command
        gets the signal, unless the terminal gave it one already; a second one lets it go.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        # Where it is ignored (inherited so), no stop of a tracee would wake us.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            asked = False
            while self._threads:
                reports = self._gather()
                for report in reports:
                    self._handle(*report)
                if not self._threads:
                    break
                # A busy tracee always has something to report: a signal to us must not wait for a pause.
                info = signal.sigtimedwait(self._asking, 0) if reports else signal.sigwaitinfo(self._signals)
                if info is None or info.si_signo == signal.SIGCHLD:
                    continue
                if not self._command or asked or self._main not in self._threads:
                    return 128 + info.si_signo
                asked = True
                if info.si_code <= 0:  # SI_USER and its kin: sent to us alone, not by the terminal to both
                    os.kill(self._main, info.si_signo)
            return self._status
        finally:
            self.let_go()
            signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def let_go(self) -> None:
        """Detach from all that is traced; it runs on. Waits for each to stop; a signal to us ends that."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        try:
            for thread in list(self._threads.values()):
                if thread.stopped:
                    self._detach(thread)
                else:
                    door.request(door.PTRACE_INTERRUPT, thread.tid)
            while self._threads:
                reports = self._gather()
                for thread, _event, _number in reports:
                    self._detach(thread)
                # What is left when a signal comes is let go by the kernel when we end.
                if (
                    not reports
                    and self._threads
                    and signal.sigwaitinfo(self._signals).si_signo != signal.SIGCHLD
                ):
                    break
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for process in self._processes.values():
            process.close()
        self._threads.clear()
        self._processes.clear()

    # Stops.

    def _gather(self) -> list[tuple[_Thread, int, int]]:
        """All that stand still now, with event and signal number. Nothing is resumed meanwhile: this ends.

        One after the other, a busy thread would be back before a quiet one had its turn.
        """
        reports = []
        while self._threads:
            try:
                tid, status = os.waitpid(-1, door.WALL | os.WNOHANG)
            except ChildProcessError:
                self._threads.clear()  # nothing left to wait for: all that was known has ended
                break
            if tid == 0:
                break
            if not os.WIFSTOPPED(status):
                self._ended(tid, status)
                continue
            thread = self._threads.get(tid) or self._add(tid)
            event, number = status >> 16, os.WSTOPSIG(status)
            thread.stopped = True
            thread.signal = 0 if event or number == SYSCALL_STOP else number
            if event in door.BIRTHS:
                born = (
                    c_ulong()
                )  # the binding's own reader has room for an int only: the kernel writes a long
                if door.request(door.binding.PTRACE_GETEVENTMSG, tid, 0, addressof(born)):
                    self._threads.get(born.value) or self._add(born.value)
            reports.append((thread, event, number))
        return reports

    def _handle(self, thread: _Thread, event: int, number: int) -> None:
        if event == door.PTRACE_EVENT_STOP and number in STOPPING:
            self._resume(thread, door.PTRACE_LISTEN)  # stays stopped, as it would without us
            return
        if number == SYSCALL_STOP:
            self._syscall_stop(thread)
        elif event == door.binding.PTRACE_EVENT_EXEC:
            self._executed(thread)
        self._resume(thread, door.binding.PTRACE_SYSCALL)

    def _add(self, tid: int) -> _Thread:
        pid = group_of(tid)
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = Tracee(pid)
        thread = self._threads[tid] = _Thread(tid, process)
        return thread

    def _ended(self, tid: int, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        if tid == self._main:
            self._status = (128 - code if code < 0 else code) if self._command else 0
        thread = self._threads.pop(tid, None)
        if thread is not None and not any(t.process is thread.process for t in self._threads.values()):
            thread.process.close()
            self._processes.pop(thread.process.pid, None)

    def _executed(self, thread: _Thread) -> None:
        """exec: the caller took the leader's id, its siblings are gone without a word, memory is new."""
        for other in [t for t in self._threads.values() if t.process is thread.process and t is not thread]:
            self._threads.pop(other.tid, None)
        thread.call = None
        thread.process.close()

    def _resume(self, thread: _Thread, how: int) -> None:
        thread.stopped = False
        door.request(how, thread.tid, 0, thread.signal)

    def _detach(self, thread: _Thread) -> None:
        door.request(door.binding.PTRACE_DETACH, thread.tid, 0, thread.signal)
        self._threads.pop(thread.tid, None)

    # System calls.

    def _syscall_stop(self, thread: _Thread) -> None:
        info = self._info
        try:
            door.binding.ptrace(door.PTRACE_GET_SYSCALL_INFO, thread.tid, sizeof(info), self._info_at)
        except door.PtraceError as error:
            if error.errno == errno.EIO:
                raise CapabilityMissing("hvkvm trace needs PTRACE_GET_SYSCALL_INFO; use Linux 5.3") from error
            return
        if info.op == door.ENTRY and info.arch == door.AUDIT_ARCH_X86_64:
            self._enter(thread, info.entry.nr, info.entry.args)
        elif info.op == door.EXIT:
            self._leave(thread, info.exit.rval)

    def _enter(self, thread: _Thread, nr: int, args: Sequence[int]) -> None:
        thread.call = None
        process = thread.process
        if nr == IOCTL:
            number, fd = args[1] & 0xFFFFFFFF, _fd(args[0])
            if number >> 8 & 0xFF != 0xAE:
                return
            scope = process.scope(fd)
            if scope is None:
                return
            fields: kvm_ioctls.Fields = {}
            if self._is_wanted(number) and not kvm_ioctls.wants_answer(number):
                fields = kvm_ioctls.decode(number, args[2], process.read)
            thread.call = (nr, fd, number, args[2], scope, fields, perf_counter())
        elif nr == MMAP:
            fd = _fd(args[4])
            if process.fds and args[5] == 0 and fd >= 0 and (process.scope(fd) or UNKNOWN).kind == "vcpu":
                thread.call = (nr, fd, 0, 0, UNKNOWN, {}, 0.0)
        elif nr == CLOSE:
            process.closed(_fd(args[0]), _fd(args[0]))
        elif nr in (DUP2, DUP3):
            process.closed(_fd(args[1]), _fd(args[1]))
        elif nr == CLOSE_RANGE:
            process.closed(args[0] & 0xFFFFFFFF, args[1] & 0xFFFFFFFF)

    def _is_wanted(self, number: int) -> bool:
        return self._wanted is None or request_name(number) in self._wanted

    def _leave(self, thread: _Thread, result: int) -> None:
        call, thread.call = thread.call, None
        if call is None:
            return
        nr, fd, number, arg, scope, fields, since = call
        process = thread.process
        if nr == MMAP:
            if not -4096 < result < 0:
                process.mapped(fd, result)
            return
        seconds = perf_counter() - since
        if result >= 0 and number in kvm_ioctls.CREATES:
            kind = kvm_ioctls.CREATES[number]
            process.created(result, Scope(kind, arg & 0xFFFFFFFF if kind == "vcpu" else None))
        if not self._is_wanted(number):
            return
        if kvm_ioctls.wants_answer(number):
            fields = kvm_ioctls.decode(number, arg, process.read)
        shown = self._runs or number != kvm_ioctls.KVM_RUN
        if number == kvm_ioctls.KVM_RUN and shown and result >= 0:
            fields = kvm_ioctls.decode_run(process.run_pages(fd))
        name = thread_name(process.pid, thread.tid) if shown else ""
        failed = error_name(result) if result < 0 else ""
        self._emit(
            Call(
                process.pid,
                thread.tid,
                name,
                scope,
                fd,
                request_name(number),
                fields,
                result,
                failed,
                seconds,
            )
        )


def _fd(register: int) -> int:
    low = register & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
