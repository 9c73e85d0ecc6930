"""The frame of all integration components: negotiate, then one request at a time.

Why: Linux's utility drivers take one packet an interrupt and answer it in the
same buffer, so a second request before the answer could lie in the ring unseen.
What is asked meanwhile waits here, in a bounded queue. A guest that comes back late
must not find what its operator has given up: what is no longer wanted is not sent.

Owner: the I/O loop, for every method.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from hvkvm.abi import ic, vmbus
from hvkvm.abi.ring import VM_PKT_DATA_INBAND, Packet
from hvkvm.runtime.guard import Guard, call_all
from hvkvm.tuples import NamedTuple
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import Done
from hvkvm.vmbus.offer import Offer, only_instance

MAX_WAITING = 16

_TRANSACTIONS = 1 << 63
"""More than a device ever counts to: a packet's id has 64 bits."""

Reply = Callable[[int, bytes], object]
"""reply(status, body): the guest's HRESULT and what follows its header; E_FAIL if it left without answer."""

Wanted = Callable[[], bool]
"""Whether somebody still waits for the answer."""


Body = bytes | Callable[[], bytes]
"""A request's body; if it tells the time, what makes it: called at each try to send it."""


class _Request:
    __slots__ = ("body", "kind", "reply", "wanted")

    def __init__(
        self, kind: int, body: Body, reply: Reply | None = None, wanted: Wanted | None = None
    ) -> None:
        self.kind = kind
        self.body = body  # bytes, or what makes them when the request is sent
        self.reply = reply
        self.wanted = wanted


class IcState(NamedTuple):
    """What was agreed, and what the guest still owes an answer to."""

    frame_version: tuple[int, int] | None
    message_version: tuple[int, int] | None
    transaction: int
    under_way: int | None
    """The kind of the request that the guest has; None for none. Who asked is not there after a restore."""
    negotiates: bool
    """Whether the first request of all waits for room."""


class IntegrationComponent:
    """Base of a device: subclasses give `NAME`, `INTERFACE`, `MESSAGE_VERSIONS` and act in `negotiated`."""

    NAME = ""
    INTERFACE = bytes(16)
    MESSAGE_VERSIONS: tuple[ic.Version, ...] = ()
    State: type[Any] = IcState

    def __init__(self) -> None:
        self.frame_version: ic.Version | None = None
        self.message_version: ic.Version | None = None
        """What the guest chose; None until it has."""
        self.failure = ""
        """While a reply is told E_FAIL that the guest did not say: why."""
        self.guard = Guard()
        self._io: ChannelIo | None = None
        self._sent: _Request | None = None
        self._waiting: deque[_Request] = deque()
        self._trans_id = 0

    @property
    def offer(self) -> Offer:
        """A message pipe; the instance is the same at each boot."""
        flags = vmbus.VMBUS_CHANNEL_ENUMERATE_DEVICE_INTERFACE | vmbus.VMBUS_CHANNEL_NAMED_PIPE_MODE
        pipe = vmbus.VMBUS_PIPE_TYPE_MESSAGE.to_bytes(4, "little")
        return Offer(self.INTERFACE, only_instance(self.INTERFACE), self.NAME, flags=flags, user_defined=pipe)

    @property
    def ready_for_requests(self) -> bool:
        """Whether a guest's driver has taken the device and speaks a common version."""
        return self.message_version is not None

    def negotiated(self) -> None:
        """The guest has chosen versions; for subclasses."""

    def left(self) -> None:
        """The guest closed the channel; for subclasses."""

    def ask(self, kind: int, body: Body, reply: Reply | None = None, wanted: Wanted | None = None) -> bool:
        """Send a request, or queue it; False when no driver is there or too much waits already.

        What can never fit in the ring that the guest chose is answered E_FAIL, `failure` says so meanwhile.
        So is what waits here still when `wanted()` is false: it is not sent.
        """
        if self.message_version is None:
            return False
        self._drop_unwanted()
        if len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting.append(_Request(kind, body, reply, wanted))
        self.ready()
        return True

    # vmbus.device.SavedDevice

    def save(self) -> Any:
        """See `vmbus.device.SavedDevice`; subclasses with more to keep have a state around this one."""
        return self.save_frame()

    def save_frame(self) -> IcState:
        """What this class keeps. Requests that wait here are lost with those who asked."""
        sent, waiting = self._sent, self._waiting
        negotiates = bool(waiting) and waiting[0].kind == ic.ICMSGTYPE_NEGOTIATE
        under_way = None if sent is None else sent.kind
        return IcState(self.frame_version, self.message_version, self._trans_id, under_way, negotiates)

    def load(self, io: ChannelIo | None, state: Any) -> None:
        """See `vmbus.device.SavedDevice`."""
        self.load_frame(io, state)

    def load_frame(self, io: ChannelIo | None, state: IcState) -> None:
        """Take back what `save_frame` gave."""
        if io is None:
            return  # a closed channel has agreed on nothing
        agreed = state.frame_version in ic.FRAME_VERSIONS and state.message_version in self.MESSAGE_VERSIONS
        if not agreed and (state.frame_version, state.message_version) != (None, None):
            raise ValueError(f"the {self.NAME} speaks a version that this host does not")
        if not 0 <= state.transaction < _TRANSACTIONS:
            raise ValueError(f"the {self.NAME} is at transaction {state.transaction}")
        self._io = io
        self.frame_version, self.message_version = state.frame_version, state.message_version
        self._trans_id = state.transaction
        if state.under_way is not None:
            self._sent = _Request(state.under_way, b"")
        if state.negotiates:
            self._negotiate()

    # vmbus.device.Device

    def opened(self, io: ChannelIo) -> None:
        """The host speaks first: which versions it can."""
        self._io = io
        self._negotiate()
        self.ready()

    def _negotiate(self) -> None:
        body = ic.negotiate_body(ic.FRAME_VERSIONS, self.MESSAGE_VERSIONS)
        self._waiting.append(_Request(ic.ICMSGTYPE_NEGOTIATE, body))

    def ready(self) -> None:
        """Send what waits and is wanted, if nothing is under way and there is room."""
        self._drop_unwanted()
        while self._io is not None and self._sent is None and self._waiting:
            request = self._waiting[0]
            payload = ic.build(
                request.kind,
                request.body if isinstance(request.body, bytes) else request.body(),
                frame=self.frame_version or (0, 0),
                message=self.message_version or (0, 0),
                transaction=self._trans_id,
            )
            if self._io.fits(len(payload)):
                if self._io.send(payload, trans_id=self._trans_id):
                    self._sent = self._waiting.popleft()
                return
            self._waiting.popleft()
            ring = self._io.writer.size
            self._fail(request, f"{len(payload)} bytes never fit in the guest's ring of {ring}")

    def _drop_unwanted(self) -> None:
        unwanted = [one for one in self._waiting if one.wanted is not None and not one.wanted()]
        for one in unwanted:
            self._waiting.remove(one)
        call_all(partial(self._fail, one, "nobody waits for it any more") for one in unwanted)

    def _fail(self, request: _Request, why: str) -> None:
        """Tell who asked that it cannot be done, with `failure` as the reason."""
        if request.reply is None:
            return
        self.failure = why
        try:
            request.reply(ic.HV_E_FAIL, b"")
        finally:
            self.failure = ""

    def received(self, packet: Packet) -> None:
        """The guest's answer: the same message, changed. What answers nothing is ignored.

        An answer that makes no sense has failed: the guest's driver is done with the
        request and sends no other, so that waiting on would be for ever.
        """
        message, sent = ic.parse(packet.payload), self._sent
        if sent is None or packet.trans_id != self._trans_id or packet.type != VM_PKT_DATA_INBAND:
            return
        self._sent = None
        self._trans_id += 1
        if message is None or message.type != sent.kind or not message.flags & ic.ICMSGHDRFLAG_RESPONSE:
            self._fail(sent, f"its answer of {len(packet.payload)} bytes makes no sense")
        elif sent.kind == ic.ICMSGTYPE_NEGOTIATE:
            chosen = ic.parse_negotiated(message.body)
            if chosen and chosen[0] in ic.FRAME_VERSIONS and chosen[1] in self.MESSAGE_VERSIONS:
                self.frame_version, self.message_version = chosen
                self.negotiated()
        elif sent.reply is not None:
            sent.reply(message.status, message.body)
        self.ready()

    def close(self, done: Done) -> None:
        """Whoever waits is told that no answer comes."""
        self._io = None
        self.frame_version = self.message_version = None
        unanswered = [self._sent, *self._waiting]
        self._sent = None
        self._waiting.clear()
        replies = [r.reply for r in unanswered if r is not None and r.reply is not None]
        call_all([self.left, *(partial(reply, ic.HV_E_FAIL, b"") for reply in replies)])
        done()
