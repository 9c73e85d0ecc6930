"""The control plane of a VMBus host, without I/O: messages in, messages and actions out.

`receive(message)` takes one message of the guest, `take()` gives what must be
done about it, in order (`actions`). Versions 0.13 to 6.0; a guest may connect
anew at any moment, so that a kexec'ed or crashed kernel finds its bus (S62).

A connection is DISCONNECTED, CONNECTED, or RESETTING: devices are told to stop
and the answer to INITIATE_CONTACT or UNLOAD waits for the last of them; the last
request counts.

Owner: the I/O loop (or one test). Nothing here raises for guest bytes, and all
that a guest makes grow has a bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

from hvkvm.abi import vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.hv_synic import HV_SYNIC_SINT_COUNT
from hvkvm.abi.vmbus import version_text
from hvkvm.abi.vmbus_messages import Kind, Message
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.vmbus.actions import Action, DropMessages, RetargetChannel, SendMessage, SharePage, TlConnect
from hvkvm.vmbus.channels import Channels
from hvkvm.vmbus.gpadl import PageCheck
from hvkvm.vmbus.offer import Channel, Offer
from hvkvm.vmbus.report import Reports

MAX_TL_CONNECTS = 64
"""Most hvsock connects that wait for the host's answer; more are refused at once."""


class BusState(Enum):
    """Whether a guest is connected."""

    DISCONNECTED = "disconnected"
    CONNECTED = "connected"
    RESETTING = "resetting"


class Server:
    """The host side of one bus.

    `contains(gpa, size)` tells guest RAM. `trace(to_host, message)` sees every message.
    """

    def __init__(
        self,
        contains: PageCheck,
        vp_count: int,
        *,
        max_version: int = vmbus.HOST_VERSIONS[-1],
        observer: Observer = NULL_OBSERVER,
        trace: Callable[[bool, Message], None] | None = None,
    ) -> None:
        self.state = BusState.DISCONNECTED
        self.version = 0
        self.features = 0
        self.client_id = b""
        self.interrupt_page = 0
        """Its address, for versions before 2.4."""
        self.reports = Reports(observer)
        self.accepts_sockets = False
        """Whether the host handles `TlConnect`; else all are refused."""
        self._contains = contains
        self._vp_count = vp_count
        self.limit_version(max_version)
        self.trace = trace
        self.target = (0, vmbus.VMBUS_MESSAGE_SINT)
        self._pending: Message | None = None  # what is answered when the reset is done
        self._sharing: SharePage | None = None  # the contact that waits for its interrupt page
        self.tl_connects: list[TlConnect] = []
        self._out: deque[Action] = deque()
        self.channels = Channels(contains, vp_count, self._send, self._out.append, self.reports)
        on = self.channels
        self._handlers: dict[int, Callable[[Message], None]] = {
            wire.REQUESTOFFERS: self._on_request_offers,
            wire.OPENCHANNEL: on.on_open,
            wire.CLOSECHANNEL: on.on_close,
            wire.GPADL_HEADER: on.gpadl_requests.on_header,
            wire.GPADL_BODY: on.gpadl_requests.on_body,
            wire.GPADL_TEARDOWN: on.gpadl_requests.on_teardown,
            wire.RELID_RELEASED: on.on_released,
            wire.TL_CONNECT_REQUEST: self._on_tl_connect,
            wire.MODIFYCHANNEL: self._on_modify_channel,
            wire.MODIFY_CONNECTION: self._on_modify_connection,
            wire.CLOSE_RESERVED_CHANNEL: self._on_close_reserved,
        }

    # Out.

    @property
    def sint(self) -> int:
        """The SINT that this guest's interrupts come by."""
        return self.target[1]

    def take(self) -> list[Action]:
        """What is to be done, in this order. Take it after every call that changes something."""
        actions = list(self._out)
        self._out.clear()
        return actions

    def _send(self, type_or_bytes: int | bytes, **values: Any) -> None:
        payload = type_or_bytes if isinstance(type_or_bytes, bytes) else wire.build(type_or_bytes, **values)
        if self.trace is not None and (message := wire.parse(payload)) is not None:
            self.trace(False, message)
        self._out.append(SendMessage(*self.target, payload))

    # In, from the host.

    def limit_version(self, newest: int) -> None:
        """Speak no version above `newest`, beginning with the next INITIATE_CONTACT."""
        self.versions = frozenset(v for v in vmbus.HOST_VERSIONS if v <= newest)

    def offer(self, offer: Offer) -> Channel:
        """Offer a channel: with the others when the guest asks, or at once (hot add). ValueError: twice."""
        return self.channels.add(offer)

    def rescind(self, channel: Channel) -> None:
        """Take a channel back. Idempotent."""
        self.channels.withdraw(channel)

    def broken(self, channel: Channel, reason: str) -> None:
        """The guest broke this channel's rules: its device ends, with a line, until a guest connects anew."""
        if channel in self.channels.all and not channel.withdrawn:
            self.reports.add("channel broken", f"{channel}: {reason}")
            self.channels.withdraw(self.channels.primary(channel), broken=True)

    def opened(self, channel: Channel, status: int = vmbus.STATUS_SUCCESS) -> None:
        """Answer to `OpenChannel`."""
        self.channels.opened(channel, status)

    def closed(self, channel: Channel) -> None:
        """Answer to `CloseChannel`: nothing of the host touches the channel's memory any more."""
        self.channels.closed(channel)
        self._finish_reset()

    def gpadl_released(self, channel: Channel, gpadl_id: int) -> None:
        """Answer to `ReleaseGpadl`: nothing of the host touches its pages any more."""
        self.channels.gpadl_requests.let_go(channel, gpadl_id)

    def retargeted(self, request: RetargetChannel, status: int = vmbus.STATUS_SUCCESS) -> None:
        """Answer to `RetargetChannel`."""
        self.channels.retargeted(request, status)

    def refuse_connect(self, request: TlConnect, status: int = vmbus.STATUS_CONNECTION_REFUSED) -> None:
        """Nobody takes this `TlConnect`."""
        if self._settle(request) and self.version >= wire.KINDS[wire.TL_CONNECT_RESULT].since:
            self._send(
                wire.TL_CONNECT_RESULT,
                endpoint_id=request.endpoint_id,
                service_id=request.service_id,
                status=status,
            )

    def accept_connect(self, request: TlConnect, offer: Offer) -> Channel | None:
        """Offer the channel that carries this `TlConnect`; None if its guest has gone.

        ValueError if it cannot be offered, and then it still waits for an answer.
        """
        if not any(waiting is request for waiting in self.tl_connects):
            return None
        channel = self.channels.add(offer)
        self._settle(request)
        return channel

    def _settle(self, request: TlConnect) -> bool:
        for index, waiting in enumerate(self.tl_connects):
            if waiting is request:
                del self.tl_connects[index]
                return True
        return False

    def reset(self) -> None:
        """The machine is being reset: as if the guest had left, but nobody is told."""
        self._pending = None
        self._disconnect()
        self._finish_reset()

    # In, from the guest.

    def receive(self, message: Message) -> None:
        """Take one message that `wire.parse` made of a guest's bytes."""
        if self.trace is not None:
            self.trace(True, message)
        kind = message.kind
        if kind.type in (wire.INITIATE_CONTACT, wire.UNLOAD):
            self._pending = message
            self._disconnect()
            self._finish_reset()
            return
        why = self._why_not(kind)
        if why:
            # Linux releases relids behind its UNLOAD when the driver is removed: no mistake worth a line.
            if kind.type != wire.RELID_RELEASED or self.state is BusState.CONNECTED:
                self.reports.add("message ignored", f"{kind} {why}")
            return
        self._handlers[kind.type](message)

    def _why_not(self, kind: Kind) -> str:
        if not kind.to_host:
            return "is for guests"
        if self.state is not BusState.CONNECTED:
            return f"while {self.state.value}"
        if self.version < kind.since:
            return f"at version {version_text(self.version)}"
        if kind.feature & ~self.features or kind.type not in self._handlers:
            return "was not negotiated"
        return ""

    # Connecting and leaving.

    def _disconnect(self) -> None:
        self._out.append(DropMessages())
        self.state = BusState.RESETTING
        self._sharing, self.interrupt_page = None, 0
        self.tl_connects.clear()
        self.channels.stop_all()

    def _finish_reset(self) -> None:
        if self.state is not BusState.RESETTING or self.channels.stopping:
            return
        self.channels.hide_all()
        self.state = BusState.DISCONNECTED
        self.version = self.features = self.channels.opening.version = 0
        message, self._pending = self._pending, None
        if message is None:
            self.target = (0, vmbus.VMBUS_MESSAGE_SINT)
        elif message.kind.type == wire.UNLOAD:
            self._send(wire.UNLOAD_RESPONSE)
        else:
            self._contact(message)

    def _contact(self, message: Message) -> None:
        version, vp_index = message["version"], message["target_vcpu"]
        sint, vtl, offered = vmbus.VMBUS_MESSAGE_SINT, 0, 0
        if version >= vmbus.VERSION_WIN10_V5:
            packed = message["interrupt_page"]
            sint, vtl, offered = packed & 0xFF, packed >> 8 & 0xFF, packed >> 32
        if version < vmbus.VERSION_WIN8_1:
            vp_index = 0  # such guests listen on the boot VP, whatever the field holds
        why = ""
        if vp_index >= self._vp_count:
            why, vp_index = f"no VP {vp_index}", 0
        elif sint >= HV_SYNIC_SINT_COUNT:
            why, sint = f"no SINT {sint}", vmbus.VMBUS_MESSAGE_SINT
        elif vtl:
            why = f"no VTL {vtl}"
        elif bool(message["monitor_page1"]) != bool(message["monitor_page2"]):
            why = "one monitor page of two"
        elif version < vmbus.VERSION_WIN8:
            why = self.why_not_page(message["interrupt_page"])
        self.target = (vp_index, sint)
        if why:
            self.reports.add("INITIATE_CONTACT refused", why)
        if why or version not in self.versions:
            state = vmbus.VMBUS_CONNECTION_FAILURE if why else vmbus.VMBUS_CONNECTION_OK
            self._send(wire.VERSION_RESPONSE, version_supported=0, connection_state=state)
            return
        if version < vmbus.VERSION_WIN8:
            self._sharing = SharePage(message["interrupt_page"], version)
            self._out.append(self._sharing)
            return
        answer = {"version_supported": 1, "msg_conn_id": version}
        if version >= vmbus.VERSION_WIN10_V5:
            answer["msg_conn_id"] = vmbus.VMBUS_MESSAGE_CONNECTION_ID_4
        features = offered & vmbus.HOST_FEATURES if version >= vmbus.VERSION_COPPER else 0
        if version >= vmbus.VERSION_COPPER:
            answer["supported_features"] = features
        client_id = message["client_id"] or b"" if features & vmbus.FEATURE_CLIENT_ID else b""
        self.connect(version, features, client_id, self.target)
        self._send(wire.VERSION_RESPONSE, **answer)

    def why_not_page(self, gpa: int) -> str:
        """Why no interrupt page can lie there; empty if one can."""
        size = vmbus.HV_HYP_PAGE_SIZE
        return "" if gpa and not gpa % size and self._contains(gpa, size) else f"no page at {gpa:#x}"

    def shared(self, request: SharePage, status: int = vmbus.STATUS_SUCCESS) -> None:
        """Answer to `SharePage`: the host uses the page, or (status not 0) cannot."""
        if self._sharing is not request:
            return
        self._sharing = None
        if status:
            low = vmbus.VMBUS_CONNECTION_LOW_RESOURCES
            self._send(wire.VERSION_RESPONSE, version_supported=0, connection_state=low)
            return
        self.connect(request.version, 0, b"", self.target, request.gpa)
        self._send(wire.VERSION_RESPONSE, version_supported=1, msg_conn_id=request.version)

    def connect(
        self, version: int, features: int, client_id: bytes, target: tuple[int, int], page: int = 0
    ) -> None:
        """Be connected, by a contact or a restore. All of it has been checked."""
        self.state = BusState.CONNECTED
        self.interrupt_page, self.channels.opening.version = page, version
        self.version, self.features, self.client_id, self.target = version, features, client_id, target
        chosen = vmbus.FEATURE_GUEST_SPECIFIED_SIGNAL_PARAMETERS
        self.channels.opening.guest_signals = bool(features & chosen)

    def valid_vp(self, vp_index: int) -> bool:
        """Whether the guest has this VP."""
        return 0 <= vp_index < self._vp_count

    def restore_connect(self, endpoint_id: bytes, service_id: bytes, silo_id: bytes) -> None:
        """A TL_CONNECT_REQUEST that was not answered when the guest was saved: refuse it. ValueError."""
        if any(len(guid) != vmbus.GUID_BYTES for guid in (endpoint_id, service_id, silo_id)):
            raise ValueError("a connect that waits has no GUIDs")
        request = TlConnect(endpoint_id, service_id, silo_id)
        self.tl_connects.append(request)
        self.refuse_connect(request)

    # The rest.

    def _on_request_offers(self, _message: Message) -> None:
        """Every channel once a connection; asked again, only the end of the list is said again."""
        self.channels.offering = True
        self.channels.offer_hidden()
        self._send(wire.ALLOFFERS_DELIVERED)

    def _on_modify_channel(self, message: Message) -> None:
        self.channels.on_modify(message, self.version >= wire.KINDS[wire.MODIFYCHANNEL_RESPONSE].since)

    def _on_modify_connection(self, message: Message) -> None:
        """New monitor pages: we use none, so only the pair must be one."""
        good = bool(message["monitor_page1"]) == bool(message["monitor_page2"])
        state = vmbus.VMBUS_CONNECTION_OK if good else vmbus.VMBUS_CONNECTION_FAILURE
        self._send(wire.MODIFY_CONNECTION_RESPONSE, connection_state=state)

    def _on_close_reserved(self, message: Message) -> None:
        """We reserve no channels, but who closes one waits for the answer."""
        self._send(wire.CLOSE_RESERVED_RESPONSE, relid=message["relid"])

    def _on_tl_connect(self, message: Message) -> None:
        silo = bytes(vmbus.GUID_BYTES)
        if self.version >= vmbus.VERSION_WIN10_V5_2 and "silo_id" in message.values:
            silo = message["silo_id"]
        request = TlConnect(message["endpoint_id"], message["service_id"], silo)
        self.tl_connects.append(request)
        if not self.accepts_sockets or len(self.tl_connects) > MAX_TL_CONNECTS:
            self.refuse_connect(request)
        else:
            self._out.append(request)

    def snapshot(self) -> dict[str, object]:
        """The connection, without the channels. Any thread."""
        gpadls = self.channels.gpadls
        return {
            "state": self.state.value,
            "version": version_text(self.version) if self.version else None,
            "features": self.features,
            "interrupt_page": self.interrupt_page or None,
            "message_vp": self.target[0],
            "message_sint": self.target[1],
            "gpadls": len(gpadls),
            "gpadls_unfinished": gpadls.unfinished,
            "gpadl_values": gpadls.values,
            "connects_waiting": len(self.tl_connects),
            "complaints": dict(self.reports.counts),
        }
