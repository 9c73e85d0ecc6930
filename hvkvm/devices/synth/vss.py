"""Volume snapshot: the host has the guest's file systems stand still while it copies their disks.

Why: a disk copied under a mounted file system is as after a power cut; frozen, it is
whole. Linux passes FREEZE and THAW to hv_vss_daemon, which may take minutes over a
FREEZE (Linux gives it 15).

A guest must not stay frozen for a fault on this side. So there is never a second
FREEZE before a THAW; a THAW can always be asked for and follows what is under way; a
FREEZE that fails is thawed by itself (the daemon may come to it late); and a guest
that left frozen is thawed when it is back, for a while again and again: Linux refuses
as long as its daemon has not registered. Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hvkvm.abi import ic, vmbus, vss
from hvkvm.devices.synth.ic import MAX_WAITING, IcState, IntegrationComponent
from hvkvm.runtime.guard import call_all
from hvkvm.runtime.protocols import CallLater, TimerHandle
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo

RETRY_SECONDS = 2.0
RETRIES = 30
"""How often, and at what distance, a guest that left frozen is asked to thaw until it does."""
THAWED, FREEZING, FROZEN, THAWING = "thawed", "freezing", "frozen", "thawing"


class VssReply(NamedTuple):
    """What became of a request: an HRESULT, `note` where there is more to say, the flags of a check."""

    status: int
    note: str = ""
    flags: int = 0

    @property
    def ok(self) -> bool:
        """Whether it was done."""
        return self.status == ic.HV_S_OK

    @property
    def text(self) -> str:
        """The status in words."""
        return ic.status_text(self.status, self.note)


OnReply = Callable[[VssReply], object]


class VssState(NamedTuple):
    """Whether the guest is frozen, or may be."""

    frame: IcState
    frozen: bool


class Vss(IntegrationComponent):
    """`state` is "thawed", "freezing", "frozen" or "thawing", as far as the host knows.

    Without `call_later` a guest that is back is asked to thaw once.
    """

    NAME = "vss"
    INTERFACE = vmbus.HV_VSS_GUID
    MESSAGE_VERSIONS = ((5, 0),)
    State = VssState

    def __init__(self, call_later: CallLater | None = None) -> None:
        super().__init__()
        self.call_later = call_later
        self._timer: TimerHandle | None = None
        self.state = THAWED
        self.frozen = False
        """Whether a FREEZE was done and no THAW since."""
        self._thaw_replies: list[OnReply] = []
        self._owed = 0
        """How many more times to ask a guest that left frozen to thaw."""

    def save(self) -> VssState:
        """See `vmbus.device.SavedDevice`."""
        return VssState(self.save_frame(), self.state != THAWED or self._owed > 0)

    def load(self, io: ChannelIo | None, state: VssState) -> None:
        """See `vmbus.device.SavedDevice`: whoever had the guest frozen is not there, so it is thawed."""
        self.load_frame(io, state.frame)
        if state.frozen:
            self._owed = RETRIES
            self._thaw_again_later()

    def check(self, reply: OnReply) -> None:
        """Whether the guest can be backed up while it runs.

        `flags` would say how, but Linux's are 0: its daemon writes the result over the
        operation by which its driver would set them. So go by `ok`.
        """

        def answered(result: VssReply, body: bytes) -> None:
            flags = vss.parse_flags(body)
            if result.ok and flags is None:
                result = VssReply(ic.HV_E_FAIL, f"its answer has {len(body)} bytes, too few")
            elif result.ok and flags is not None:
                result = result._replace(flags=flags)
            reply(result)

        if not self.ready_for_requests:
            reply(_NOBODY)
        elif len(self._waiting) >= MAX_WAITING - 2:  # a FREEZE and its THAW always find room
            reply(VssReply(ic.HV_ERROR_BUSY, "too much waits for the guest already"))
        else:
            self._operate(vss.VSS_OP_HOT_BACKUP, answered)

    def freeze(self, reply: OnReply) -> None:
        """Freeze the mounted file systems; refused unless the guest is thawed. May take minutes."""

        def answered(result: VssReply, _body: bytes) -> None:
            self.frozen = result.ok
            if self.state == FREEZING:  # else a thaw is on its way already
                self.state = FROZEN if result.ok else THAWED
                if not result.ok and self.ready_for_requests:
                    self._thaw()
            reply(result)

        if not self.ready_for_requests:
            reply(_NOBODY)
        elif self.state != THAWED:
            reply(VssReply(ic.HV_ERROR_BUSY, f"the guest is {self.state}; thaw it first"))
        else:
            self.state = FREEZING
            self._operate(vss.VSS_OP_FREEZE, answered)

    def thaw(self, reply: OnReply) -> None:
        """Thaw the file systems, at any time: after the freeze under way, if one is."""
        if not self.ready_for_requests:
            reply(_NOBODY)
            return
        self._thaw_replies.append(reply)
        if self.state != THAWING:
            self._thaw()

    def _thaw(self) -> None:
        self.state = THAWING
        self._operate(vss.VSS_OP_THAW, self._thawed)

    def _thawed(self, result: VssReply, _body: bytes) -> None:
        if result.ok:
            self.frozen = False
            self._owed = 0
        self.state = FROZEN if self.frozen else THAWED
        self._thaw_again_later()
        replies, self._thaw_replies = self._thaw_replies, []
        call_all(partial(reply, result) for reply in replies)

    def _thaw_again_later(self) -> None:
        if self._owed and self._timer is None and self.call_later and self.ready_for_requests:
            self._timer = self.call_later(RETRY_SECONDS, self.guard.run, self._thaw_owed)

    def _thaw_owed(self) -> None:
        self._timer = None
        if self.state != THAWED:
            self._owed = 0  # somebody froze it since, so it thawed; or is thawing it
        elif self._owed:
            self._owed -= 1
            self._thaw()

    def _operate(self, operation: int, answered: Callable[[VssReply, bytes], object]) -> None:
        def took(status: int, body: bytes) -> None:
            answered(VssReply(status, self.failure) if self.ready_for_requests else _LEFT, body)

        if not self.ask(ic.ICMSGTYPE_VSS, vss.request(operation), took):
            took(ic.HV_ERROR_BUSY, b"")

    def negotiated(self) -> None:
        """Thaw what a driver left frozen. A guest booted anew may refuse: nothing is frozen there."""
        self._thaw_owed()

    def left(self) -> None:
        """Nothing more can be known of the guest; who waits is told next."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if self._owed or self.state != THAWED:
            self._owed = RETRIES
        self.frozen = False
        if self.state == FROZEN:
            self.state = THAWED


_NOBODY = VssReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED)
_LEFT = VssReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED, "the guest left without an answer")
