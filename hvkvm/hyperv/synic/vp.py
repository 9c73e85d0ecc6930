"""One VP's SynIC registers and pages: what every SynIC keeps, whoever receives the MSR writes.

SCONTROL, SIMP and SIEFP arrive together (`update`), decide whether messages and
event flags may be written, and place the pages. Owner: the vCPU's thread writes
registers and messages; event flags come from any thread. `synic.kernel` and its
like derive from this and say where `submit` runs.
"""

from __future__ import annotations

import errno
import threading
from ctypes import string_at
from typing import Any

from hvkvm.abi.hv_synic import (
    HV_EVENT_FLAGS_BYTE_COUNT,
    HV_EVENT_FLAGS_COUNT,
    HV_MESSAGE_FLAG_PENDING,
    HV_MESSAGE_PAGE_SIZE,
    HV_MESSAGE_SIZE,
    HV_SYNIC_CONTROL_ENABLE,
    HV_SYNIC_PAGE_MASK,
    HV_SYNIC_SIEFP_ENABLE,
    HV_SYNIC_SIMP_ENABLE,
    HV_SYNIC_SINT_COUNT,
)
from hvkvm.errors import HvkvmError
from hvkvm.events import NULL_OBSERVER, Observer, SynicPageMoved, Warned
from hvkvm.hyperv.synic.pages import EventFlagsPage, MessagePage, Overlay, SynicPage
from hvkvm.tuples import NamedTuple


class VpState(NamedTuple):
    """A VP's registers, and what is in its pages, wherever they lie."""

    scontrol: int
    siefp: int
    simp: int
    message_page: bytes
    event_page: bytes


class VpSynic:
    """Registers and pages of the VP `vp_index`. Until `active` is set nothing here does anything (S1)."""

    __slots__ = (
        "_event_gpa",
        "_events_on",
        "_lock",
        "_message_gpa",
        "_messages_on",
        "_observer",
        "active",
        "event_page",
        "message_page",
        "scontrol",
        "siefp",
        "simp",
        "vp_index",
    )

    def __init__(
        self, vp_index: int, message: Overlay, event: Overlay, *, observer: Observer = NULL_OBSERVER
    ) -> None:
        self.vp_index = vp_index
        self.active = False
        self.scontrol = self.siefp = self.simp = 0
        self.message_page = MessagePage(message)
        self.event_page = EventFlagsPage(event)
        self._observer = observer
        self._messages_on = self._events_on = False
        # What the registers ask for; the overlays may have refused it.
        self._message_gpa: int | None = None
        self._event_gpa: int | None = None
        # One event flag's "is it on?" and its OR are one step against update and reset (S34, S36).
        self._lock = threading.Lock()

    def update(self, scontrol: int, siefp: int, simp: int) -> bool:
        """Take all three registers as the guest left them (S57); move a page only to a new address (S3).

        True when the message page has just come on. The vCPU's thread, before it
        re-enters the guest (S5). Raises OSError when the host cannot place a
        page; an address that KVM cannot map is the guest's doing and leaves the
        page off.
        """
        if not self.active or (scontrol, siefp, simp) == (self.scontrol, self.siefp, self.simp):
            return False
        was_on = self._messages_on
        moved: list[SynicPageMoved | Warned] = []
        with self._lock:
            self.scontrol, self.siefp, self.simp = scontrol, siefp, simp
            # Bit 0 decides; the address 0 is as good as any other (S2).
            message_gpa = simp & HV_SYNIC_PAGE_MASK if simp & HV_SYNIC_SIMP_ENABLE else None
            event_gpa = siefp & HV_SYNIC_PAGE_MASK if siefp & HV_SYNIC_SIEFP_ENABLE else None
            try:
                if message_gpa != self._message_gpa:
                    self._message_gpa = message_gpa
                    moved += self._move(self.message_page, "message", message_gpa)
                if event_gpa != self._event_gpa:
                    self._event_gpa = event_gpa
                    moved += self._move(self.event_page, "event", event_gpa)
            finally:
                # Messages need SIMP alone, event flags SCONTROL too (S9).
                self._messages_on = self.message_page.overlay.gpa is not None
                self._events_on = bool(
                    scontrol & HV_SYNIC_CONTROL_ENABLE and self.event_page.overlay.gpa is not None
                )
        for event in moved:
            self._observer.event(event)
        return self._messages_on and not was_on

    def _move(self, page: SynicPage, kind: str, gpa: int | None) -> list[SynicPageMoved | Warned]:
        if page.overlay.place(gpa):
            return [SynicPageMoved(self.vp_index, kind, gpa)]
        text = f"vp {self.vp_index}: no {kind} page can lie at gpa {gpa:#x}, where the guest wants it"
        return [Warned("synic-page", text), SynicPageMoved(self.vp_index, kind, None)]

    def post_message(self, sint: int, message: bytes) -> int:
        """See `seam.SynicVp.post_message`. Needs no lock: it runs where `update` runs."""
        if not self._messages_on:
            return -errno.ENXIO
        return self.message_page.post(sint, message)

    def set_event_flag(self, sint: int, number: int) -> int:
        """See `seam.SynicVp.set_event_flag`. Any thread."""
        with self._lock:
            if not self._events_on:
                return -errno.ENXIO
            return self.event_page.set(sint, number)

    def snapshot(self) -> dict[str, Any] | None:
        """The registers, and what its pages hold that the guest has not taken, by SINT. Any thread.

        None where there is no SynIC (any more), and while it is as at power-on.
        """
        with self._lock:  # against `close`, which takes the pages away
            if not self.active:
                return None
            messages = string_at(self.message_page.overlay.hva, HV_MESSAGE_PAGE_SIZE)
            flags = string_at(self.event_page.overlay.hva, HV_SYNIC_SINT_COUNT * HV_EVENT_FLAGS_BYTE_COUNT)
            on = bool(self.scontrol & HV_SYNIC_CONTROL_ENABLE)
            gpas = (self.message_page.overlay.gpa, self.event_page.overlay.gpa)
        from hvkvm.hyperv.synic_text import message_type

        sints: dict[str, dict[str, Any]] = {}
        for number in range(HV_SYNIC_SINT_COUNT):
            found: dict[str, Any] = {}
            if register := self._sint_text(number):
                found["register"] = register
            slot = messages[number * HV_MESSAGE_SIZE :][:HV_MESSAGE_SIZE]
            if kind := int.from_bytes(slot[:4], "little"):
                found["message"] = message_type(kind)
                found["pending"] = bool(slot[5] & HV_MESSAGE_FLAG_PENDING)
            at = number * HV_EVENT_FLAGS_BYTE_COUNT
            if bits := int.from_bytes(flags[at : at + HV_EVENT_FLAGS_BYTE_COUNT], "little"):
                found["flags"] = [flag for flag in range(HV_EVENT_FLAGS_COUNT) if bits >> flag & 1]
            if found:
                sints[str(number)] = found
        timers = self._timer_texts()
        if not (on or sints or timers or any(gpa is not None for gpa in gpas)):
            return None
        messages_at, events_at = (None if gpa is None else f"{gpa:#x}" for gpa in gpas)
        return {
            "vp": self.vp_index,
            "on": on,
            "messages_at": messages_at,
            "events_at": events_at,
            "sints": sints,
            "timers": timers,
        }

    def _sint_text(self, number: int) -> str:
        """A SINT's register in words: "" for one as at power-on, and where it is KVM's to know."""
        return ""

    def _timer_texts(self) -> dict[str, str]:
        """The timers that were set, in words, where they are not KVM's."""
        return {}

    def save(self) -> VpState:
        """Registers and pages. The VP is outside KVM_RUN, and nobody sets event flags."""
        message, event = self.message_page.overlay.view, self.event_page.overlay.view
        return VpState(self.scontrol, self.siefp, self.simp, bytes(message), bytes(event))

    def load(self, state: VpState) -> None:
        """Put them back on a VP that was reset. ValueError for pages of another size; OSError as `update`."""
        pages = (
            (self.message_page.overlay.view, state.message_page),
            (
                self.event_page.overlay.view,
                state.event_page,
            ),
        )
        if any(len(view) != len(data) for view, data in pages):
            raise ValueError(f"a SynIC page of VP {self.vp_index} has another size")
        if not all(0 <= register < 1 << 64 for register in state[:3]):
            raise ValueError(f"VP {self.vp_index} has a SynIC register that is no 64-bit number")
        for view, data in pages:
            view[:] = data
        self.update(state.scontrol, state.siefp, state.simp)

    def reset(self) -> None:
        """Enables off, both pages unplaced and zeroed (S4, S7). The vCPU is outside KVM_RUN."""
        if not self.active:
            return
        with self._lock:
            self._messages_on = self._events_on = False
            self.scontrol = self.siefp = self.simp = 0
            self._message_gpa = self._event_gpa = None
            for page in (self.message_page, self.event_page):
                page.overlay.place(None)
                page.overlay.zero()

    def close(self) -> None:
        """Free both pages. Idempotent; nothing may be posted any more, and attempts say -ENXIO."""
        with self._lock:
            self.active = self._messages_on = self._events_on = False
            for page in (self.message_page, self.event_page):
                try:
                    page.overlay.close()
                except HvkvmError as error:
                    self._observer.event(
                        Warned("synic-page", f"vp {self.vp_index}: closing a SynIC page: {error}")
                    )
