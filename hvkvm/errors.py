"""The exceptions that hvkvm raises at its users, each with the process exit status it maps to.

Those that one module alone raises and catches, or that carry its data, stand in that module.

Exceptions are for the host side: bad configuration, a kernel that refuses, a
closed object. What a guest does wrong is answered with a value (`HvStatus`),
never with an exception.
"""

from __future__ import annotations

import errno
import os


def harmless(text: str) -> str:
    """`text` of a guest or of a file without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class HvkvmError(Exception):
    """Base of all hvkvm errors; `exit_status` is what the command returns."""

    exit_status = 1


class ConfigError(HvkvmError):
    """The user asked for something that cannot be: names the flag, the reason and the remedy."""

    exit_status = 2


class FolderUnusable(ConfigError):
    """No folder for control sockets can be had; the text says why."""


class NameTaken(ConfigError):
    """A socket cannot be put at a path, since something is there. `reason` is the text without a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}, or name another")
        self.reason = reason


class BootError(ConfigError):
    """A kernel, initrd or module file cannot be booted (not a kernel, does not fit, missing)."""


class StateError(ConfigError):
    """A saved machine cannot be used: damaged, foreign, made by a newer hvkvm, or in need of another host.

    Its text may quote a file that anybody made: it is one line, as a terminal shows it, of bounded length.
    """

    MAX_CHARACTERS = 800

    def __init__(self, text: str) -> None:
        shown = text[: self.MAX_CHARACTERS] + "..." * (len(text) > self.MAX_CHARACTERS)
        super().__init__(harmless(shown))


class KvmUnavailable(HvkvmError):
    """/dev/kvm is missing, not permitted, or speaks another API version."""

    exit_status = 69


class VmmNotRun(HvkvmError):
    """The command of a VMM that is to be tried cannot be started."""

    exit_status = 69


class HostExhausted(HvkvmError):
    """The host has no more files, memory or threads for what was asked: names what, and the remedy."""

    exit_status = 69


class CapabilityMissing(HvkvmError):
    """The running kernel's KVM lacks something that was asked for."""

    exit_status = 77


class KvmIoctlError(HvkvmError, OSError):
    """A KVM ioctl failed.

    `request` is the C name (`KVM_IRQFD`), `scope` the fd it went to (`system`,
    `vm`, `vcpu`, `device`), `errno` the kernel's answer. It has the status of a run that KVM ends.
    """

    exit_status = 254

    def __init__(self, errno: int, request: str, scope: str, detail: str = "") -> None:
        self.request = request
        self.scope = scope
        self.detail = detail
        OSError.__init__(self, errno, os.strerror(errno))

    def __str__(self) -> str:
        tail = f" ({self.detail})" if self.detail else ""
        return f"{self.request} on the {self.scope} fd: {self.strerror}{tail}"


class GuestMemoryError(HvkvmError):
    """An access left guest RAM: `gpa` and `size` (bytes) say which."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(f"guest physical range {gpa:#x}+{size:#x} is not inside guest RAM")
        self.gpa = gpa
        self.size = size


class Stopped(HvkvmError):
    """Work was offered to a vCPU thread or an I/O loop that takes none any more."""


class RouteError(HvkvmError):
    """A SINT route cannot be opened: bad VP or SINT, no SynIC there, or the line is taken."""


class UnhandledExit(HvkvmError):
    """A vCPU left the guest for a reason that nobody handles: `reason` is its KVM_EXIT_* number."""

    exit_status = 254

    def __init__(self, vcpu_index: int, reason: int, detail: str) -> None:
        super().__init__(f"vCPU {vcpu_index} left the guest and nobody handles it: {detail}")
        self.vcpu_index = vcpu_index
        self.reason = reason


class OutputError(HvkvmError):
    """What was asked for was done, but its result could not be written (EX_IOERR of <sysexits.h>)."""

    exit_status = 74


class Refused(HvkvmError):
    """A running VM, or its guest, did not do what was asked of it, or did not answer."""


class VmGone(HvkvmError):
    """No VM is where one was looked for, or it ended before it answered."""

    exit_status = 69


class Stuck(HvkvmError, TimeoutError):
    """Threads that did not pause or end in time; the text names each and what it is doing."""

    exit_status = 254


class ImageError(ConfigError):
    """A disk image, or the server of one, cannot be used as asked: names it, the reason and the remedy."""


class ImageDamaged(ImageError):
    """An image file contradicts its format: `structure` at byte `offset` of `path`, and what is wrong."""

    def __init__(self, path: object, structure: str, offset: int, what: str) -> None:
        super().__init__(f"{path}: {structure} at byte {offset:#x}: {what}")
        self.structure = structure
        self.offset = offset
        self.what = what


_REMEDIES = {
    errno.EMFILE: "this process may open no more files; raise `ulimit -n`",
    errno.ENFILE: "no process may open more files; raise the sysctl fs.file-max, or end other programs",
    errno.ENOBUFS: "end other programs",
    errno.ENOMEM: "end other programs, or give the guest less memory or fewer vCPUs",
    errno.ENOSPC: "end other programs, or give the guest fewer devices",
    errno.EAGAIN: "end other programs, or raise `ulimit -u`, or give the guest fewer vCPUs",
}

NO_FILE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Why a host has no file descriptor to give, whatever it was to be for."""

NO_MEMORY = frozenset({errno.ENOMEM, errno.ENOBUFS})
"""Why a host cannot send or receive at this moment, whatever else is right: nothing has gone, nor is lost."""


def is_temporary(error: OSError) -> bool:
    """Whether a non-blocking file is full, or the host has no memory now: its other end has not gone."""
    return isinstance(error, BlockingIOError) or error.errno in NO_MEMORY


def exhausted(error: BaseException) -> str | None:
    """What `error` says of a host that has no more of something, and the remedy; None of another error."""
    if isinstance(error, HostExhausted):
        return str(error)
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    remedy = _REMEDIES.get(number or 0)
    if remedy is None:
        return None
    what = str(error) if isinstance(error, KvmIoctlError) else os.strerror(number or 0)
    return f"{what}; {remedy}"
