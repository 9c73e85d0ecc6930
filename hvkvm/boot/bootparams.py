"""Linux's setup header and struct boot_params (the "zero page").

Pure; any thread. Offsets and names are those of
Linux Documentation/arch/x86/boot.rst and arch/x86/include/uapi/asm/bootparam.h;
a setup header lies at the same offsets in a bzImage and in boot_params.
"""

from __future__ import annotations

import struct

from hvkvm.boot.e820 import E820Entry, boot_params_table
from hvkvm.tuples import NamedTuple

BOOT_PARAMS_SIZE = 4096
HEADER_START = 0x1F1
HEADER_END_LIMIT = 0x290  # boot_params' next field, edd_mbr_sig_buffer
E820_MAX_ENTRIES_ZEROPAGE = 128

HEADER_MAGIC = b"HdrS"
BOOT_FLAG = 0xAA55
MIN_VERSION = 0x020C  # the first with xloadflags, that is, with a 64-bit entry (Linux 3.8)

LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
_TYPE_OF_LOADER_UNDEFINED = 0xFF
_VID_MODE_NORMAL = 0xFFFF
SETUP_RNG_SEED = 9
COMMAND_LINE_SIZE = 2048  # Linux on x86, the closing NUL included

_SYNTHETIC_INITRD_ADDR_MAX = 0x7FFFFFFF


class SetupHeader(NamedTuple):
    """The setup header of a bzImage; `raw` starts at HEADER_START."""

    raw: bytes

    def _get(self, offset: int, code: str) -> int:
        at = offset - HEADER_START
        if at + struct.calcsize(code) > len(self.raw):
            return 0
        return int(struct.unpack_from("<" + code, self.raw, at)[0])

    @property
    def setup_size(self) -> int:
        """Bytes of real-mode code and boot sector in front of the kernel."""
        return ((self._get(0x1F1, "B") or 4) + 1) * 512

    @property
    def system_size(self) -> int:
        """Bytes of the protected-mode part."""
        return self._get(0x1F4, "I") * 16

    @property
    def boot_flag(self) -> int:
        return self._get(0x1FE, "H")

    @property
    def version(self) -> int:
        """Boot protocol, 0xMMmm."""
        return self._get(0x206, "H")

    @property
    def kernel_version_offset(self) -> int:
        """File offset of the version string, 0 for none."""
        pointer = self._get(0x20E, "H")
        return pointer + 0x200 if pointer else 0

    @property
    def loadflags(self) -> int:
        return self._get(0x211, "B")

    @property
    def code32_start(self) -> int:
        return self._get(0x214, "I")

    @property
    def initrd_addr_max(self) -> int:
        """The highest address that an initrd's last byte may have."""
        return self._get(0x22C, "I")

    @property
    def relocatable_kernel(self) -> int:
        return self._get(0x234, "B")

    @property
    def xloadflags(self) -> int:
        return self._get(0x236, "H")

    @property
    def cmdline_size(self) -> int:
        """The longest command line in bytes, the closing NUL not counted."""
        return self._get(0x238, "I")

    @property
    def pref_address(self) -> int:
        return self._get(0x258, "Q")

    @property
    def init_size(self) -> int:
        """Bytes of RAM from the load address that decompression and early start need."""
        return self._get(0x260, "I")


def parse_header(head: bytes) -> SetupHeader | None:
    """The setup header in the first bytes of a file, None when there is none."""
    if head[0x202:0x206] != HEADER_MAGIC:
        return None
    end = min(0x202 + head[0x201], HEADER_END_LIMIT, len(head))
    return SetupHeader(head[HEADER_START:end])


def synthetic_header() -> SetupHeader:
    """The header for a vmlinux that came without its bzImage: only what the running kernel reads."""
    raw = bytearray(0x26C - HEADER_START)
    struct.pack_into("<H", raw, 0x1FE - HEADER_START, BOOT_FLAG)
    raw[0x202 - HEADER_START : 0x206 - HEADER_START] = HEADER_MAGIC
    struct.pack_into("<H", raw, 0x206 - HEADER_START, 0x020F)
    struct.pack_into("<B", raw, 0x211 - HEADER_START, LOADED_HIGH)
    struct.pack_into("<I", raw, 0x22C - HEADER_START, _SYNTHETIC_INITRD_ADDR_MAX)
    struct.pack_into("<H", raw, 0x236 - HEADER_START, XLF_KERNEL_64)
    struct.pack_into("<I", raw, 0x238 - HEADER_START, COMMAND_LINE_SIZE - 1)
    return SetupHeader(bytes(raw))


def build(
    header: SetupHeader,
    entries: list[E820Entry],
    *,
    rsdp: int,
    cmdline: int,
    initrd: int,
    initrd_size: int,
    setup_data: int,
) -> bytes:
    """The zero page: `header` as the kernel shipped it, with the loader's fields filled in.

    `rsdp`, `cmdline`, `initrd` and `setup_data` are guest addresses, 0 for none.
    """
    page = bytearray(BOOT_PARAMS_SIZE)

    def put(offset: int, code: str, value: int) -> None:
        struct.pack_into("<" + code, page, offset, value)

    page[HEADER_START : HEADER_START + len(header.raw)] = header.raw
    put(0x070, "Q", rsdp)  # acpi_rsdp_addr
    table = boot_params_table(entries[:E820_MAX_ENTRIES_ZEROPAGE])
    put(0x1E8, "B", len(table) // 20)  # e820_entries
    page[0x2D0 : 0x2D0 + len(table)] = table
    put(0x1FA, "H", _VID_MODE_NORMAL)
    put(0x210, "B", _TYPE_OF_LOADER_UNDEFINED)
    # No CAN_USE_HEAP, no QUIET, no KASLR_FLAG: the last is the decompressor's to set.
    put(0x211, "B", LOADED_HIGH)
    put(0x218, "I", initrd)  # ramdisk_image
    put(0x21C, "I", initrd_size)
    put(0x228, "I", cmdline)  # cmd_line_ptr
    put(0x250, "Q", setup_data)
    return bytes(page)


def rng_seed_node(seed: bytes) -> bytes:
    """A setup_data node that seeds the guest's random number generator (Linux 6.0 on; older ones skip it)."""
    return struct.pack("<QII", 0, SETUP_RNG_SEED, len(seed)) + seed
