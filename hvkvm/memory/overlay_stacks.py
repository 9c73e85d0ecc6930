"""Which overlay page shows where, and what reappears when it goes.

The rule when several pages pick one gpa (two vCPUs, or SIMP equal to SIEFP; S6):
the page placed last shows; removing it uncovers the one placed before, and
under the last of them lies RAM, untouched (S4). Inside RAM a change is one
mmap(MAP_FIXED) over the RAM page's host address: no slot changes, no vCPU
stops, and a running vCPU meets the old page or the new one (S5). Outside RAM
the first page to arrive gets a one-page memory slot over a window of host
address space; later changes there replace what the window shows, in the same
way.

`OverlayPage` is the only caller. Any thread; one lock per GuestMemory.
"""

from __future__ import annotations

import errno
import threading
from typing import Protocol

from hvkvm.errors import KvmIoctlError
from hvkvm.memory.address_space import AddressSpace, NoSlotLeft
from hvkvm.memory.mapping import PAGE_SIZE, Mapping
from hvkvm.memory.private import NoPageLeft


class Layer(Protocol):
    """One page that can lie in a stack: the memfd that holds it."""

    fd: int


class Ram(Protocol):
    """What is needed of RAM: see `guest.GuestMemory`."""

    def contains(self, gpa: int, n: int) -> bool: ...

    def show_page(self, gpa: int, fd: int) -> None: ...

    def restore_page(self, gpa: int) -> None: ...


class _Window:
    """A one-page memory slot outside RAM and the host page behind it."""

    def __init__(self, space: AddressSpace, gpa: int, fd: int) -> None:
        self._space = space
        self._mapping = Mapping(fd, 0, PAGE_SIZE)
        try:
            self._slot = space.show(gpa, PAGE_SIZE, self._mapping.hva)
        except BaseException:
            self._mapping.close()
            raise

    def show(self, fd: int) -> None:
        self._mapping.show(0, PAGE_SIZE, fd, 0)

    def close(self) -> None:
        self._space.hide(self._slot)
        self._mapping.close()


class OverlayStacks:
    """The stack of overlay pages at each gpa that has any."""

    def __init__(self, space: AddressSpace, ram: Ram) -> None:
        self._space = space
        self._ram = ram
        self._lock = threading.Lock()
        self._stacks: dict[int, list[Layer]] = {}
        self._windows: dict[int, _Window] = {}

    def lay(self, page: Layer, gpa: int) -> bool:
        """Show `page` at `gpa`, above what is there.

        False when KVM has no room for a page there (past the guest's physical
        address width, or on an internal slot of its own), or no slot, or when overlays have lain on
        `private.MAX_MOVED` other pages of a restored guest. OSError when the host fails.
        """
        with self._lock:
            return self._lay(page, gpa)

    def lift(self, page: Layer, gpa: int) -> None:
        """Take `page` away from `gpa`, where it lies; what it covered reappears. OSError."""
        with self._lock:
            self._lift(page, gpa)

    def at(self, gpa: int) -> tuple[Layer, ...]:
        """The pages at `gpa`, lowest first."""
        with self._lock:
            return tuple(self._stacks.get(gpa, ()))

    def _lay(self, page: Layer, gpa: int) -> bool:
        stack = self._stacks.get(gpa, [])
        if self._ram.contains(gpa, PAGE_SIZE):
            try:
                self._ram.show_page(gpa, page.fd)
            except NoPageLeft:
                return False
        elif stack:
            self._windows[gpa].show(page.fd)
        else:
            try:
                self._windows[gpa] = _Window(self._space, gpa, page.fd)
            except NoSlotLeft:
                return False
            except KvmIoctlError as error:
                if error.errno in (errno.EINVAL, errno.EEXIST):
                    return False
                raise
        self._stacks[gpa] = [*stack, page]
        return True

    def _lift(self, page: Layer, gpa: int) -> None:
        stack = [layer for layer in self._stacks[gpa] if layer is not page]
        shown = self._stacks[gpa][-1] is page
        window = self._windows.get(gpa)
        if shown and stack:
            if window is None:
                self._ram.show_page(gpa, stack[-1].fd)
            else:
                window.show(stack[-1].fd)
        elif shown and window is None:
            self._ram.restore_page(gpa)
        elif shown and window is not None:
            window.close()
            del self._windows[gpa]
        if stack:
            self._stacks[gpa] = stack
        else:
            del self._stacks[gpa]
