"""The NVSP side of a NIC: which version, which buffers, how many sub-channels, up to which MTU.

A message goes in, what completes it comes out. Owner: the I/O loop. Nothing here raises for guest bytes: what
breaks the rules is told by `fail(reason)`, and the guest's channel ends; what comes too early or twice is
refused with a status.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvkvm.abi import nvsp
from hvkvm.abi.ring import Packet
from hvkvm.devices.synth.netvsp_buffer import GuestBuffer
from hvkvm.devices.synth.netvsp_receive import MAX_RANGES, Receive
from hvkvm.devices.synth.netvsp_send import SECTION_BYTES, Send
from hvkvm.net.port import ETHERNET_BYTES, MAX_MTU, MIN_MTU, VLAN_BYTES
from hvkvm.vmbus.channel_io import ChannelIo
from hvkvm.vmbus.device import SubChannels
from hvkvm.vmbus.pages import Ram

MAX_MDL_CHAIN = 34
"""What Hyper-V answers; no guest looks at it."""

DEFAULT_MTU = 1500
"""Until a guest says another: NVSP 1 has no word for it."""


class Agreement:
    """What a guest's driver and its NIC have agreed on. `queues`: channels at most."""

    def __init__(
        self,
        memory: Ram,
        send: Send,
        receive: Receive,
        wire_mtu: int,
        queues: int,
        fail: Callable[[str], object],
    ) -> None:
        self.sub_channels: SubChannels | None = None
        """The bus's, once the NIC is on one."""
        self._memory = memory
        self._send = send
        self._receive = receive
        self._wire_mtu = wire_mtu
        self._queues = queues
        self._fail = fail
        self.clear()

    def clear(self) -> None:
        """As a NIC that no driver has taken."""
        self.agree(0)
        self.subchannels = 0
        """How many a guest was promised."""
        self.unoffered = False
        """Whether they are still to be offered."""
        self._receive.drop()
        self._receive.vlan_marks = False
        self._send.buffer = None
        self.set_mtu(min(self._wire_mtu, DEFAULT_MTU))

    def agree(self, version: int) -> None:
        """The guest speaks this NVSP version; 0 for none yet."""
        self.version = version
        # iPXE, the guest of NVSP 1 that we know, takes the frames of a packet last first, and its TCP asks
        # for each of them again.
        self._receive.ranges = 1 if version == nvsp.NVSP_PROTOCOL_VERSION_1 else MAX_RANGES

    def offer_sub_channels(self, io: ChannelIo) -> None:
        """Behind the answer that says how many: a table of where to send, and the offers."""
        if not self.unoffered or self.sub_channels is None:
            return
        self.unoffered = False
        queues = self.subchannels + 1
        table = [index % queues for index in range(nvsp.INDIRECTION_ENTRIES)]
        message = nvsp.indirection_table.pack(
            nvsp.NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE,
            nvsp.INDIRECTION_ENTRIES,
            nvsp.INDIRECTION_OFFSET,
            *table,
        )
        io.send(message)  # without it the guest sends on the primary channel
        for index in range(1, queues):
            self.sub_channels.add(index)

    def set_mtu(self, mtu: int) -> None:
        """The guest's MTU: it is not given longer frames. The wire's decides on those that it sends."""
        self.mtu = mtu
        self._receive.max_frame = mtu + ETHERNET_BYTES + VLAN_BYTES
        self._send.max_frame = self._wire_mtu + ETHERNET_BYTES + VLAN_BYTES

    def buffer(self, gpadl_id: int) -> GuestBuffer | None:
        """A GPADL of the guest as a buffer; None if it is none."""
        gpadl = None if self.sub_channels is None else self.sub_channels.gpadl(gpadl_id)
        try:
            return None if gpadl is None else GuestBuffer(self._memory, gpadl)
        except ValueError:
            return None

    def send_buffer(self, gpadl_id: int) -> GuestBuffer | None:
        """A GPADL of the guest as a send buffer; None if it has no room for a section."""
        buffer = self.buffer(gpadl_id)
        return None if buffer is None or buffer.size < SECTION_BYTES else buffer

    def release(self, gpadl_id: int) -> None:
        """A GPADL is torn down, revoked or not: what was lent in it is the guest's own again."""
        if self._receive.buffer is not None and self._receive.buffer.gpadl_id == gpadl_id:
            self._receive.drop()
        if self._send.buffer is not None and self._send.buffer.gpadl_id == gpadl_id:
            self._send.buffer = None

    def request(self, packet: Packet) -> bytes | None:
        """A message of the guest that is no RNDIS; what completes it."""
        payload = packet.payload
        handler = _REQUESTS.get(int.from_bytes(payload[:4], "little"))
        if handler is None:
            return None
        shape, act = handler
        if len(payload) < shape.size:
            self._fail(f"an NVSP message of {len(payload)} bytes")
            return None
        answer: bytes | None = act(self, *shape.unpack_from(payload)[1:])
        return answer

    def _init(self, least: int, most: int) -> bytes:
        best = max((one for one in nvsp.NVSP_VERSIONS if least <= one <= most), default=0)
        status = nvsp.NVSP_STAT_SUCCESS if best else nvsp.NVSP_STAT_PROTOCOL_UNSUPPORTED
        if self.version:
            best, status = 0, nvsp.NVSP_STAT_FAIL
        self.agree(self.version or best)
        return nvsp.init_complete.pack(nvsp.NVSP_MSG_TYPE_INIT_COMPLETE, best, MAX_MDL_CHAIN, status)

    def _ndis_version(self, _major: int, _minor: int) -> None:
        """Nothing hangs on it."""

    def _config(self, mtu: int, _reserved: int, capabilities: int) -> None:
        if self._receive.buffer is None:  # else it is cut into sections for the MTU that was said before
            self.set_mtu(min(max(mtu - ETHERNET_BYTES, MIN_MTU), MAX_MTU))
        self._receive.vlan_marks = bool(capabilities & nvsp.NDIS_CONFIG_IEEE8021Q)
        self._receive.forget()

    def _lend_receive(self, gpadl_id: int, set_id: int) -> bytes:
        buffer = self.buffer(gpadl_id) if self.version and self._receive.buffer is None else None
        kind = nvsp.NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE
        if buffer is None or not self._receive.lend(buffer, set_id, self.mtu):
            return nvsp.recv_buf_complete.pack(kind, nvsp.NVSP_STAT_FAIL, 0, 0, 0, 0, 0)
        section, sections = self._receive.section, self._receive.sections
        return nvsp.recv_buf_complete.pack(
            kind, nvsp.NVSP_STAT_SUCCESS, 1, 0, section, sections, section * sections
        )

    def _lend_send(self, gpadl_id: int, _id: int) -> bytes:
        kind = nvsp.NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE
        buffer = self.send_buffer(gpadl_id) if self.version and self._send.buffer is None else None
        if buffer is None:
            return nvsp.send_buf_complete.pack(kind, nvsp.NVSP_STAT_FAIL, 0)
        self._send.buffer = buffer
        return nvsp.send_buf_complete.pack(kind, nvsp.NVSP_STAT_SUCCESS, SECTION_BYTES)

    def _revoke_receive(self, _id: int) -> None:
        self._receive.drop()

    def _revoke_send(self, _id: int) -> None:
        self._send.buffer = None

    def _allocate(self, operation: int, count: int) -> bytes:
        """Sub-channels: as many as are asked for and can be."""
        known = operation == nvsp.NVSP_SUBCHANNEL_ALLOCATE and self.version >= nvsp.NVSP_PROTOCOL_VERSION_5
        kind = nvsp.NVSP_MSG5_TYPE_SUBCHANNEL
        if not known or self.subchannels or self.sub_channels is None:
            return nvsp.subchannel_complete.pack(kind, nvsp.NVSP_STAT_FAIL, 0)
        self.subchannels = min(count, self._queues - 1)
        self.unoffered = True
        return nvsp.subchannel_complete.pack(kind, nvsp.NVSP_STAT_SUCCESS, self.subchannels)


_REQUESTS: dict[int, tuple[Any, Callable[..., bytes | None]]] = {
    nvsp.NVSP_MSG_TYPE_INIT: (nvsp.init, Agreement._init),
    nvsp.NVSP_MSG1_TYPE_SEND_NDIS_VER: (nvsp.ndis_version, Agreement._ndis_version),
    nvsp.NVSP_MSG1_TYPE_SEND_RECV_BUF: (nvsp.send_buf, Agreement._lend_receive),
    nvsp.NVSP_MSG1_TYPE_REVOKE_RECV_BUF: (nvsp.revoke_buf, Agreement._revoke_receive),
    nvsp.NVSP_MSG1_TYPE_SEND_SEND_BUF: (nvsp.send_buf, Agreement._lend_send),
    nvsp.NVSP_MSG1_TYPE_REVOKE_SEND_BUF: (nvsp.revoke_buf, Agreement._revoke_send),
    nvsp.NVSP_MSG2_TYPE_SEND_NDIS_CONFIG: (nvsp.ndis_config, Agreement._config),
    nvsp.NVSP_MSG5_TYPE_SUBCHANNEL: (nvsp.subchannel, Agreement._allocate),
}
