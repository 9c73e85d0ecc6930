"""HvPostMessage and HvSignalEvent: from the two numbers of a hypercall to a status.

Pure logic over guest memory and the connection tables; which SynIC delivered the
call is unknown here. Runs on the calling vCPU's thread and must not block. What
a guest does wrong is answered with an HvStatus number, in the order the TLFS and
QEMU check (S44, S51).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hvkvm.abi.hv_synic import (
    HV_CONNECTION_ID_MASK,
    HV_MESSAGE_PAYLOAD_BYTE_COUNT,
    HV_SIGNAL_EVENT_FLAG_NUMBER_MASK,
    HV_SIGNAL_EVENT_FLAG_NUMBER_SHIFT,
    hv_post_message_input,
)
from hvkvm.abi.tlfs import (
    HV_HYPERCALL_CODE_MASK,
    HV_HYPERCALL_FAST_BIT,
    HV_HYPERCALL_RSVD_MASK,
    HVCALL_POST_MESSAGE,
    HVCALL_SIGNAL_EVENT,
    HvStatus,
)
from hvkvm.errors import GuestMemoryError

_CODE = HV_HYPERCALL_CODE_MASK
_FAST = HV_HYPERCALL_FAST_BIT
_NOT_SIMPLE = ~(_CODE | _FAST)
"""Variable header, rep count and start, nested, reserved: all must be 0 for a simple call (S53)."""

_FLAG_NUMBER = HV_SIGNAL_EVENT_FLAG_NUMBER_MASK << HV_SIGNAL_EVENT_FLAG_NUMBER_SHIFT
_POST_INPUT_SIZE = 256
_POST_ALIGNMENT = 4  # QEMU's: the input is a struct of u32 (S45)
_STRICT_ALIGNMENT = 8  # the TLFS's

_SUCCESS = int(HvStatus.SUCCESS)
_INVALID_HYPERCALL_CODE = int(HvStatus.INVALID_HYPERCALL_CODE)
_INVALID_HYPERCALL_INPUT = int(HvStatus.INVALID_HYPERCALL_INPUT)
_INVALID_ALIGNMENT = int(HvStatus.INVALID_ALIGNMENT)
_INSUFFICIENT_MEMORY = int(HvStatus.INSUFFICIENT_MEMORY)
_INVALID_PORT_ID = int(HvStatus.INVALID_PORT_ID)


class GuestReader(Protocol):
    """What hypercalls need of GuestMemory; raises GuestMemoryError outside RAM."""

    def read(self, gpa: int, n: int) -> bytes: ...

    def read_u64(self, gpa: int) -> int: ...


class ConnectionTables(Protocol):
    """What hypercalls need of `Connections`."""

    def post(self, message: hv_post_message_input) -> int: ...

    def signal(self, conn_id: int) -> int: ...


class Hypercalls:
    """The hypercalls that reach user space. `strict_alignment` asks 8 bytes of HvPostMessage (S45)."""

    def __init__(
        self, memory: GuestReader, connections: ConnectionTables, *, strict_alignment: bool = False
    ) -> None:
        self._memory = memory
        self._connections = connections
        self.listeners: list[Callable[[int, int, int], object]] = []
        """Told of each call: control, first input, result. Added before vCPUs run, called on theirs."""
        self._post_misaligned = (_STRICT_ALIGNMENT if strict_alignment else _POST_ALIGNMENT) - 1
        self._calls: dict[int, Callable[[int, int], int]] = {
            HVCALL_POST_MESSAGE: self.post_message,
            HVCALL_SIGNAL_EVENT: self.signal_event,
        }

    def call(self, control: int, param: int) -> int:
        """The result of the hypercall `control` with first input `param`; the low 16 bits are the status.

        A code nobody knows is INVALID_HYPERCALL_CODE, and the guest goes on (S56). Reserved bits are looked
        at before the code, as KVM does.
        """
        result = self._call(control, param)
        for tell in self.listeners:
            tell(control, param, result)
        return result

    def _call(self, control: int, param: int) -> int:
        handler = self._calls.get(control & _CODE)
        if handler is not None:
            return handler(control, param)
        return _INVALID_HYPERCALL_INPUT if control & HV_HYPERCALL_RSVD_MASK else _INVALID_HYPERCALL_CODE

    def post_message(self, control: int, gpa: int) -> int:
        """HvPostMessage with its input at `gpa`."""
        if control & _NOT_SIMPLE:
            return _INVALID_HYPERCALL_INPUT
        if control & _FAST:
            return _INVALID_HYPERCALL_CODE
        if gpa & self._post_misaligned:
            return _INVALID_ALIGNMENT
        try:
            # Copied once: what is checked below is what the handler gets, whatever the guest does now (S48).
            data = self._memory.read(gpa, _POST_INPUT_SIZE)
        except GuestMemoryError:
            return _INSUFFICIENT_MEMORY  # any byte outside RAM (S47)
        message = hv_post_message_input.from_buffer_copy(data)
        if message.payload_size > HV_MESSAGE_PAYLOAD_BYTE_COUNT:
            return _INVALID_HYPERCALL_INPUT
        return self._connections.post(message)

    def signal_event(self, control: int, param: int) -> int:
        """HvSignalEvent: `param` is the value itself (fast) or the gpa of its 8 bytes (slow)."""
        if control & _NOT_SIMPLE:
            return _INVALID_HYPERCALL_INPUT
        if not control & _FAST:
            if param & 7:
                return _INVALID_ALIGNMENT
            try:
                param = self._memory.read_u64(param)
            except GuestMemoryError:
                return _INVALID_ALIGNMENT  # KVM's answer, where it loads the value itself (S53)
        if param & _FLAG_NUMBER:
            return _INVALID_PORT_ID
        if param & ~HV_CONNECTION_ID_MASK:
            return _INVALID_HYPERCALL_INPUT
        return self._connections.signal(param)
