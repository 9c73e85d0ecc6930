"""From a packet of the guest to frames for the wire: send sections, page lists, RNDIS messages in a row.

What a guest sends lies in a section of its send buffer, in pages that the packet lists, or begins in the
first and goes on in the second. It is one or more RNDIS messages, each a frame. A section and the first bytes
of the pages are copied, and only the copy is looked at; the rest of the last frame goes to the wire from the
guest's own pages, without a copy.

Owner: the I/O loop. Nothing here raises for guest bytes: what breaks the rules is told as text, and the
guest's channel ends; what is sound and cannot be sent is dropped and counted.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.abi import nvsp, rndis
from hvkvm.abi.ring import VM_PKT_DATA_INBAND, VM_PKT_DATA_USING_GPA_DIRECT, Packet
from hvkvm.abi.virtio_net_hdr import PLAIN
from hvkvm.abi.vmbus import HV_HYP_PAGE_SIZE
from hvkvm.devices.synth import netvsp_offload as offload
from hvkvm.devices.synth.netvsp_buffer import GuestBuffer
from hvkvm.devices.synth.netvsp_rndis import MAX_PACKETS_PER_MESSAGE
from hvkvm.errors import GuestMemoryError
from hvkvm.net.port import ETHERNET_BYTES, MAX_FRAME_BYTES, Frame
from hvkvm.vmbus.pages import Ram

SECTION_BYTES = 6144
"""A section of the send buffer, Linux's own choice."""

MAX_PACKET_BYTES = 1 << 17
"""Most bytes of one packet: the longest frame with its header, and a section of short ones."""

MAX_MESSAGES = 8 * MAX_PACKETS_PER_MESSAGE
"""Most RNDIS messages of one packet; a guest is told fewer."""

MAX_RANGES = 256
"""Most ranges of one packet; Linux has up to 32."""

FRONT_BYTES = 512
"""So much of the pages is copied: an RNDIS header with its marks, and the frame's headers."""

HEADER_BYTES = 192
"""So much of a frame may be changed on its way: Ethernet, VLAN, IP and TCP headers with all options."""

_tag = Struct(">HH")


class SendCounters:
    """Frames that went to the wire, and those that did not."""

    __slots__ = ("bytes", "dropped", "frames", "large", "lost", "packets")

    def __init__(self) -> None:
        self.packets = self.frames = self.bytes = 0
        self.large = 0
        """Frames to be segmented."""
        self.dropped = 0
        """Too short, too long, or marked for what cannot be done."""
        self.lost = 0
        """Waited for the wire, and in the way of what the guest gives back (`netvsp_channel`)."""


class Send:
    """Reads the packets of one NIC. `buffer` is the send buffer, once the guest has lent one."""

    def __init__(self, memory: Ram) -> None:
        self._memory = memory
        self.counters = SendCounters()
        self.buffer: GuestBuffer | None = None
        self.max_frame = 0
        """Longest frame that is not to be segmented, its VLAN tag included."""
        self.work = 0
        """Pieces looked at by `bytes_of` and `frames_of`, whether they were sent or dropped: ranges and pages
        of page lists, RNDIS messages, and pages copied."""

    def bytes_of(self, packet: Packet) -> tuple[bytes, list[memoryview], int] | str:
        """What a packet of RNDIS messages holds: its copied beginning, the rest, and bytes in all."""
        _type, _channel, index, size = _rndis_pkt.unpack_from(packet.payload)
        blob = b""
        if index != nvsp.NETVSC_INVALID_INDEX:
            buffer = self.buffer
            if buffer is None or size > SECTION_BYTES or (index + 1) * SECTION_BYTES > buffer.size:
                return f"section {index:#x} of {size} bytes in the send buffer"
            blob = buffer.read(index * SECTION_BYTES, size)
        if packet.type == VM_PKT_DATA_INBAND:
            return blob, [], len(blob)
        if packet.type != VM_PKT_DATA_USING_GPA_DIRECT:
            return f"RNDIS in a packet of type {packet.type}"
        views = self._views(packet.header)
        if isinstance(views, str):
            return views
        self.work += len(packet.header) >> 4
        total = len(blob) + sum(map(len, views))
        return b"".join((blob, *_front(views))), views, total

    def quick(self, packet: Packet) -> Frame | None:
        """The frame of a packet as most are: one RNDIS message, all of it in a section of the send buffer.

        None for any other, and for one that is to be dropped or refused: that is for `bytes_of`, `frames_of`.
        """
        payload, buffer = packet.payload, self.buffer
        if packet.type != VM_PKT_DATA_INBAND or buffer is None or packet.header:
            return None
        if not nvsp.RNDIS_PKT_BYTES <= len(payload) <= _QUICK_BYTES:
            return None
        kind, channel, index, size = _rndis_pkt.unpack_from(payload)
        if kind != nvsp.NVSP_MSG1_TYPE_SEND_RNDIS_PKT or channel != nvsp.RMC_DATA:
            return None
        if not _packet_size <= size <= SECTION_BYTES or (index + 1) * SECTION_BYTES > buffer.size:
            return None
        blob = buffer.read(index * SECTION_BYTES, size)
        kind, length, data, n, _o, _ol, _on, ppi, marks, _vc, _rsvd = rndis.packet.unpack_from(blob)
        data += rndis.BODY
        if kind != rndis.RNDIS_MSG_PACKET or length != size or data < _packet_size + marks or data + n > size:
            return None
        info: dict[int, int] = {}
        if marks == rndis.VALUE_INFO_BYTES and ppi == _MARKS:
            one, mark, offset, value = rndis.value_info.unpack_from(blob, _packet_size)
            if one != rndis.VALUE_INFO_BYTES or offset != rndis.per_packet_info.size:
                return None
            if mark == rndis.TCPIP_CHKSUM_PKTINFO and ETHERNET_BYTES <= n <= self.max_frame:
                front = bytearray(blob[data : data + (n if n < HEADER_BYTES else HEADER_BYTES)])
                vnet = offload.plain_ipv4(front, n, value)
                if vnet is not None:  # most are this: `_frame` and `outgoing` in short
                    self.counters.packets += 1
                    self.counters.bytes += n
                    if n <= HEADER_BYTES:
                        return memoryview(vnet), memoryview(front)
                    rest = memoryview(blob)[data + HEADER_BYTES : data + n]
                    return memoryview(vnet), memoryview(front), rest
            info[mark] = value
        elif marks:
            if ppi != _MARKS or marks % rndis.VALUE_INFO_BYTES or marks > _MOST_MARKS:
                return None
            for one, mark, offset, value in rndis.value_info.iter_unpack(
                blob[_packet_size : _packet_size + marks]
            ):
                if one != rndis.VALUE_INFO_BYTES or offset != rndis.per_packet_info.size:
                    return None
                info[mark] = value
        frame = self._frame(blob, [], data, n, info)
        if frame is not None:
            self.counters.packets += 1
        return frame

    def _views(self, header: bytes) -> list[memoryview] | str:
        """The pages that a packet lists, neighbours as one: `abi.ring.parse_gpa_direct` in one go."""
        if not 24 <= len(header) <= MAX_RANGES * 64:
            return f"a page list of {len(header)} bytes"
        count, *words = Struct(f"<4xI{len(header) // 8 - 1}Q").unpack(header)
        views: list[memoryview] = []
        view = self._memory.view
        start = end = -1
        total = index = 0
        if count > MAX_RANGES:
            return f"{count} ranges in a page list"
        try:
            for _ in range(count):
                first = words[index]
                length, at = first & 0xFFFFFFFF, first >> 32
                total += length
                if not length or at >= HV_HYP_PAGE_SIZE or total > MAX_PACKET_BYTES:
                    return f"a range of {length} bytes at {at:#x} in a page list"
                stop = at + length
                while stop > 0:
                    index += 1
                    gpa = words[index] * HV_HYP_PAGE_SIZE
                    if gpa + at != end:
                        if end > start:
                            views.append(view(start, end - start))
                        start = gpa + at
                    end = gpa + min(HV_HYP_PAGE_SIZE, stop)
                    stop -= HV_HYP_PAGE_SIZE
                    at = 0
                index += 1
            if end <= start:
                return "a page list without ranges"
            views.append(view(start, end - start))
        except IndexError:
            return f"{count} ranges in a page list of {len(header)} bytes"
        except GuestMemoryError as error:
            return f"a page list outside RAM: {error}"
        return views

    def frames_of(self, blob: bytes, rest: list[memoryview], total: int) -> list[Frame] | str:
        """The frames of the RNDIS messages that `bytes_of` found; text for what breaks the rules."""
        found: list[Frame] = []
        at = count = 0
        while total - at >= rndis.header.size:
            if at + _packet_size > len(blob) and rest:
                blob, rest = b"".join([blob, *rest]), []
                self.work += total >> 12
            if at + _packet_size > len(blob):
                return f"an RNDIS message at {at} of {total} bytes"
            kind, length = rndis.header.unpack_from(blob, at)
            count += 1
            if kind != rndis.RNDIS_MSG_PACKET or at + length > total or count > MAX_MESSAGES:
                return f"RNDIS message {count}, type {kind:#x}, {length} bytes at {at} of {total}"
            parsed = rndis.parse_packet(blob, at, length)
            if parsed is None:
                return f"an RNDIS packet of {length} bytes that makes no sense"
            offset, size, info = parsed
            frame = self._frame(blob, rest, at + offset, size, info)
            if frame is None:
                self.counters.dropped += 1
            else:
                found.append(frame)
            at += length
        self.work += count
        return found

    def _frame(
        self, blob: bytes, rest: list[memoryview], at: int, size: int, info: dict[int, int]
    ) -> Frame | None:
        """A frame of `size` bytes at `at`, with its vnet header; None to drop it."""
        if at >= len(blob):
            if not rest or size < ETHERNET_BYTES:
                return None
            blob, rest, at = b"".join(_cut(rest, at - len(blob), size)), [], 0
        have = min(size, len(blob) - at)
        near = min(have, HEADER_BYTES)
        front = bytearray(blob[at : at + near])
        if near < ETHERNET_BYTES:
            return None
        length = size
        tag = info.get(rndis.IEEE_8021Q_INFO)
        if tag is not None:
            tci = (tag & 7) << 13 | (tag >> 3 & 1) << 12 | tag >> 4 & 0xFFF
            front[offload.ADDRESSES_BYTES : offload.ADDRESSES_BYTES] = _tag.pack(offload.ETH_P_8021Q, tci)
            length += 4
        large = rndis.TCP_LARGESEND_PKTINFO in info
        if length > (MAX_FRAME_BYTES if large else self.max_frame):
            return None
        vnet = offload.outgoing(front, length, info) if info else PLAIN
        if vnet is None:
            return None
        self.counters.large += large
        frame = [memoryview(vnet), memoryview(front)]
        if have > near:
            frame.append(memoryview(blob)[at + near : at + have])
        if size > have:
            frame += _cut(rest, 0, size - have)
        self.counters.bytes += length
        return frame


_rndis_pkt = Struct("<IIII")
_QUICK_BYTES = 256
"""More than a packet has that points to a section."""
_packet_size = rndis.packet.size
_MARKS = rndis.packet.size - rndis.BODY
"""Where Linux puts the marks: at once behind the message's head."""
_MOST_MARKS = 4 * rndis.VALUE_INFO_BYTES


def _take(views: list[memoryview], n: int) -> bytes:
    """The first `n` bytes, or as many as there are, copied and taken off the first of `views`."""
    taken = views[0][:n].tobytes()
    left = views[0][n:]
    if len(left):
        views[0] = left
    else:
        del views[0]
    return taken


def _front(views: list[memoryview]) -> list[bytes]:
    """The first FRONT_BYTES of `views`, copied and taken off."""
    parts: list[bytes] = []
    need = FRONT_BYTES
    while need and views:
        parts.append(_take(views, need))
        need -= len(parts[-1])
    return parts


def _cut(views: list[memoryview], skip: int, n: int) -> list[memoryview]:
    """`n` bytes of `views` behind the first `skip`."""
    found = []
    for view in views:
        size = len(view)
        if skip >= size:
            skip -= size
            continue
        part = view[skip : skip + n]
        skip = 0
        found.append(part)
        n -= len(part)
        if not n:
            break
    return found
