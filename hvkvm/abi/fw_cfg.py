"""fw_cfg: keys, DMA commands and the table loader's commands, by the names of QEMU's specification.

Source: QEMU docs/specs/fw_cfg.rst and hw/acpi/bios-linker-loader.c, Linux uapi/linux/qemu_fw_cfg.h.
Numbers and layouts only. Directory and DMA descriptor are big-endian, everything else little-endian.
"""

from __future__ import annotations

import struct

FW_CFG_SIGNATURE = 0x00
FW_CFG_ID = 0x01
FW_CFG_RAM_SIZE = 0x03
FW_CFG_NB_CPUS = 0x05
FW_CFG_KERNEL_SIZE = 0x08
FW_CFG_INITRD_SIZE = 0x0B
FW_CFG_BOOT_MENU = 0x0E
FW_CFG_MAX_CPUS = 0x0F
FW_CFG_MAX_RAM = 0x11
"""kvm-unit-tests' own use of the key; 0 means no limit."""
FW_CFG_KERNEL_DATA = 0x11
FW_CFG_INITRD_DATA = 0x12
FW_CFG_CMDLINE_SIZE = 0x14
FW_CFG_CMDLINE_DATA = 0x15
FW_CFG_SETUP_SIZE = 0x17
FW_CFG_SETUP_DATA = 0x18
FW_CFG_FILE_DIR = 0x19
FW_CFG_FILE_FIRST = 0x20

FW_CFG_VERSION = 0x01
FW_CFG_VERSION_DMA = 0x02

FW_CFG_DMA_CTL_ERROR = 0x01
FW_CFG_DMA_CTL_READ = 0x02
FW_CFG_DMA_CTL_SKIP = 0x04
FW_CFG_DMA_CTL_SELECT = 0x08
FW_CFG_DMA_CTL_WRITE = 0x10
FW_CFG_DMA_SIGNATURE = b"QEMU CFG"

FW_CFG_MAX_FILE_PATH = 56
FILE_ENTRY = struct.Struct(f">IHH{FW_CFG_MAX_FILE_PATH}s")
"""size, select, reserved, name."""
DMA_ACCESS = struct.Struct(">IIQ")
"""control, length, address."""

LOADER_FILE_SIZE = 56
LOADER_COMMAND_SIZE = 128
LOADER_ALLOCATE = 1
LOADER_ADD_POINTER = 2
LOADER_ADD_CHECKSUM = 3
LOADER_ZONE_HIGH = 1
LOADER_ZONE_FSEG = 2

RAMFB_FILE = "etc/ramfb"
RAMFBCfg = struct.Struct(">QIIIII")
"""addr, fourcc, flags, width, height, stride; big-endian (QEMU hw/display/ramfb.c)."""
DRM_FORMAT_RGB888 = b"RG24"
DRM_FORMAT_BGR888 = b"BG24"
DRM_FORMAT_XRGB8888 = b"XR24"
DRM_FORMAT_ARGB8888 = b"AR24"
DRM_FORMAT_XBGR8888 = b"XB24"
DRM_FORMAT_ABGR8888 = b"AB24"
DRM_FORMAT_RGBX8888 = b"RX24"
DRM_FORMAT_RGBA8888 = b"RA24"
DRM_FORMAT_BGRX8888 = b"BX24"
DRM_FORMAT_BGRA8888 = b"BA24"
"""Linux uapi/drm/drm_fourcc.h: the letters of a pixel's components from its high bits to its low ones."""
