"""What an NVMe controller says of itself and its namespace. Pure: each function makes 4096 bytes."""

from __future__ import annotations

import struct
import uuid

from hvkvm.abi import nvme
from hvkvm.abi.pci import PCI_VENDOR_ID_MICROSOFT

MDTS = 8
"""A command moves at most 2**MDTS pages: 1 MiB."""
MAX_TRANSFER = 4096 << MDTS
MODEL = b"hvkvm NVMe"
FIRMWARE = b"1.0"
ABORT_LIMIT = 3
ASYNC_EVENT_LIMIT = 3
_WARNING_KELVIN, _CRITICAL_KELVIN = 343, 373


def controller(serial: str) -> bytes:
    """Identify Controller; `serial` has up to 20 letters."""
    data = bytearray(nvme.NVME_IDENTIFY_DATA_SIZE)

    def put(offset: int, code: str, *values: int) -> None:
        struct.pack_into("<" + code, data, offset, *values)

    put(0, "HH", PCI_VENDOR_ID_MICROSOFT, PCI_VENDOR_ID_MICROSOFT)
    data[4:24] = serial.encode("ascii", "replace")[:20].ljust(20)
    data[24:64] = MODEL.ljust(40)
    data[64:72] = FIRMWARE.ljust(8)
    put(72, "B", 6)  # RAB: arbitration burst of 64 commands
    put(77, "B", MDTS)
    put(80, "I", nvme.NVME_VS_1_4)
    put(111, "B", nvme.NVME_CTRL_CNTRLTYPE_IO)
    optional = nvme.NVME_CTRL_OACS_DBBUF_SUPP | nvme.NVME_CTRL_OACS_SELF_TEST_SUPP
    put(256, "HBBB", optional, ABORT_LIMIT, ASYNC_EVENT_LIMIT, 0b11)  # FRMW: one slot
    put(266, "HH", _WARNING_KELVIN, _CRITICAL_KELVIN)
    put(316, "HB", 1, 1)  # EDSTT: a minute at most; DSTO: one self-test at a time
    put(512, "BB", nvme.NVME_NVM_IOSQES * 0x11, nvme.NVME_NVM_IOCQES * 0x11)
    put(516, "I", 1)  # NN
    put(520, "H", nvme.NVME_CTRL_ONCS_DSM | nvme.NVME_CTRL_ONCS_WRITE_ZEROES)
    put(525, "B", nvme.NVME_CTRL_VWC_PRESENT | nvme.NVME_CTRL_VWC_FLUSH_NSID_ALL)
    name = f"nqn.2014-08.org.nvmexpress:uuid:{namespace_uuid(serial)}".encode()
    data[768 : 768 + len(name)] = name
    put(2048, "H", 2500)  # power state 0: 25 W
    return bytes(data)


def namespace(size: int, sector_size: int, *, read_only: bool) -> bytes:
    """Identify Namespace, for a disk of `size` bytes."""
    data = bytearray(nvme.NVME_IDENTIFY_DATA_SIZE)
    sectors = size // sector_size
    struct.pack_into("<QQQ", data, 0, sectors, sectors, sectors)
    data[99] = nvme.NVME_NS_ATTR_RO if read_only else 0
    data[130] = sector_size.bit_length() - 1  # LBAF 0: LBADS
    return bytes(data)


def active_list(after: int) -> bytes:
    """The ids of active namespaces above `after`: 1 is the only one there is."""
    return struct.pack("<I", 1 if after < 1 else 0).ljust(nvme.NVME_IDENTIFY_DATA_SIZE, b"\0")


def descriptors(serial: str) -> bytes:
    """The namespace's identification descriptors: a UUID that the serial number decides."""
    head = struct.pack("<BB2x", nvme.NVME_NIDT_UUID, nvme.NVME_NIDT_UUID_LEN)
    return (head + namespace_uuid(serial).bytes).ljust(nvme.NVME_IDENTIFY_DATA_SIZE, b"\0")


def namespace_uuid(serial: str) -> uuid.UUID:
    """The same for the same serial number."""
    return uuid.uuid5(uuid.UUID("6a1ee9d6-5f0b-4d5e-8a55-6f7c3ad7b1f0"), serial)


def smart(read_units: int, written_units: int, reads: int, writes: int) -> bytes:
    """The SMART log: units are thousands of 512 bytes, rounded up."""
    data = bytearray(512)
    struct.pack_into("<BHBB", data, 0, 0, 310, 100, 10)  # 37 C, spare 100 %, threshold 10 %
    for offset, value in ((32, read_units), (48, written_units), (64, reads), (80, writes)):
        struct.pack_into("<Q", data, offset, value)
    return bytes(data)


def firmware_slots() -> bytes:
    """The firmware slot log: slot 1 is active."""
    return (bytes([1]) + bytes(7) + FIRMWARE.ljust(8)).ljust(512, b"\0")
