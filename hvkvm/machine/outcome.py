"""How a machine's run ended, and the process exit status that says so."""

from __future__ import annotations

from enum import Enum

from hvkvm.errors import HvkvmError, exhausted
from hvkvm.runtime.guard import is_callers
from hvkvm.tuples import NamedTuple


class Ending(Enum):
    """Why the machine stopped; the value is the word shown to the user and in JSON."""

    POWERED_OFF = "powered off"
    COMMAND_EXITED = "command exited"
    DEBUG_EXIT = "debug exit"
    RESET = "reset"
    PANIC = "guest panic"
    TRIPLE_FAULT = "triple fault"
    KVM_ERROR = "KVM internal error"
    HOST_ERROR = "error in the host's code"
    HOST_EXHAUSTED = "the host has no more to give"
    STUCK = "the host does not answer"
    TIMEOUT = "timeout"
    QUIT = "quit"
    SAVED = "saved"
    NOT_SAVED = "not saved"


EXIT_TIMEOUT = 124
EXIT_MACHINE_FAULT = 254
EXIT_PANIC = 255


class Outcome(NamedTuple):
    """The end of a run: `status` is the process exit status, `detail` one line for the user."""

    ending: Ending
    status: int
    detail: str = ""

    @property
    def clean(self) -> bool:
        """True when the run came to its end: by command, debug exit, power-off, reset, or as a warm guest.

        One that its host ended, also by `save` with `end`, is a QUIT and did not.
        """
        if self.ending is Ending.RESET:
            return self.status == 0  # not of one that could not be started again
        return self.ending in (
            Ending.POWERED_OFF,
            Ending.COMMAND_EXITED,
            Ending.DEBUG_EXIT,
            Ending.SAVED,
        )

    def __str__(self) -> str:
        tail = f": {self.detail}" if self.detail else ""
        return f"{self.ending.value}{tail}"


def is_mistake(error: BaseException) -> bool:
    """Whether code is at fault, a caller's callback or ours: KVM refuses nothing, nor does the host want."""
    if exhausted(error) is not None:
        return False
    return not isinstance(error, HvkvmError) or is_callers(error)


def of_fault(error: BaseException, detail: str) -> Outcome:
    """The end that an `error` on a thread of the machine's makes: the host's want, or a fault in `detail`."""
    what = exhausted(error)
    if what is not None:
        return Outcome(Ending.HOST_EXHAUSTED, EXIT_MACHINE_FAULT, what)
    ending = Ending.HOST_ERROR if is_mistake(error) else Ending.KVM_ERROR
    return Outcome(ending, EXIT_MACHINE_FAULT, detail)
