"""The two SynIC pages of one VP: message slots and event flags, as host and guest share them.

Both lie in an `OverlayPage` and are reached through its own mapping, which stays
put wherever the guest places the page: so writing never races with a move (S36).

`MessagePage.post` belongs to whoever may write this VP's slots (the vCPU's
thread outside KVM_RUN, for the kernel's SynIC). `EventFlagsPage.set` is called
from any thread, one at a time. Only `synic.vp` calls this module.
"""

from __future__ import annotations

import errno
from typing import Protocol

from hvkvm.abi.hv_synic import HV_EVENT_FLAGS_BYTE_COUNT, HV_MESSAGE_FLAG_PENDING, HV_MESSAGE_SIZE
from hvkvm.memory.atomics import fetch_or_8, load_4, store_4

_PENDING = HV_MESSAGE_FLAG_PENDING << 40
"""The flags are byte 5 of a slot: here as they stand in its first 8-byte word."""


class Overlay(Protocol):
    """What these pages need of `OverlayPage`."""

    hva: int
    view: memoryview

    @property
    def gpa(self) -> int | None: ...

    def place(self, gpa: int | None) -> bool: ...

    def zero(self) -> None: ...

    def close(self) -> None: ...


class SynicPage:
    """An overlay page, and the host's own map of it."""

    __slots__ = ("_hva", "_view", "overlay")

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self._hva = overlay.hva
        self._view = overlay.view


class MessagePage(SynicPage):
    """HV_SYNIC_SINT_COUNT slots of HV_MESSAGE_SIZE bytes."""

    __slots__ = ()

    def post(self, sint: int, message: bytes) -> int:
        """Write `message` into the slot of `sint`: 0, or -EAGAIN with the pending flag set.

        `message` is a whole slot, type first; its flags are 0, which clears
        "pending" (S28).
        """
        at = sint * HV_MESSAGE_SIZE
        slot = self._hva + at
        if load_4(slot):
            # The slot's owner may be another vCPU that frees it right now. It looks at "pending" after
            # it zeroed the type, so either it sees the flag, or we see the zero (S30).
            fetch_or_8(slot, _PENDING)
            if load_4(slot):
                return -errno.EAGAIN
        self._view[at + 4 : at + HV_MESSAGE_SIZE] = message[4:]
        # The type makes the slot valid: one store, after the body (S27).
        store_4(slot, int.from_bytes(message[:4], "little"))
        return 0


class EventFlagsPage(SynicPage):
    """HV_EVENT_FLAGS_COUNT flags for each SINT."""

    __slots__ = ()

    def set(self, sint: int, number: int) -> bool:
        """Set flag `number` of `sint`; whether it was clear. The guest clears flags at the same time.

        One thread at a time: `VpSynic` has the lock.
        """
        at = sint * HV_EVENT_FLAGS_BYTE_COUNT + (number >> 3)
        if not self._view[at]:
            # Flags are set here alone, under the caller's lock, and a guest only clears them: in a byte
            # without any there is nothing that it could clear between our look and our store. A third of the
            # time of an atomic OR by ctypes, and the usual case. With the flag clear, an interrupt follows.
            self._view[at] = 1 << (number & 7)
            return True
        # A flag found set means no interrupt: that needs the full fence of an atomic operation, or we might
        # see it as it was before the guest took it, and the guest what we signal as it was before our write.
        mask = 1 << (number & 63)
        return not fetch_or_8(self._hva + sint * HV_EVENT_FLAGS_BYTE_COUNT + (number >> 6) * 8, mask) & mask
