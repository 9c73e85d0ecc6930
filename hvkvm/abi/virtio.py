"""virtio 1.x over PCI, split virtqueues and the block device: layouts by the names of Linux's headers.

Numbers only; sizes are bytes. Sources: virtio 1.2 sections 2 (status, virtqueues), 4.1 (PCI) and 5.2 (block);
Linux virtio_pci.h, virtio_config.h, virtio_ring.h, virtio_blk.h.
"""

from __future__ import annotations

from struct import Struct

# Device status.
VIRTIO_CONFIG_S_ACKNOWLEDGE = 1
VIRTIO_CONFIG_S_DRIVER = 2
VIRTIO_CONFIG_S_DRIVER_OK = 4
VIRTIO_CONFIG_S_FEATURES_OK = 8
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

# Features, by bit.
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32

# PCI.
VIRTIO_PCI_DEVICE_ID_BASE = 0x1040
"""A device's PCI id is this and its virtio id."""
VIRTIO_PCI_SUBSYSTEM_ID = 0x1100
"""Any of 0x40 or more: firmware takes smaller ones for devices of before virtio 1."""
VIRTIO_PCI_REVISION = 1
VIRTIO_PCI_CAP_COMMON_CFG = 1
VIRTIO_PCI_CAP_NOTIFY_CFG = 2
VIRTIO_PCI_CAP_ISR_CFG = 3
VIRTIO_PCI_CAP_DEVICE_CFG = 4
VIRTIO_PCI_CAP_PCI_CFG = 5
virtio_pci_cap = Struct("<BBB3xII")
"""What follows id and next: cap_len, cfg_type, bar, offset in the BAR, length."""
VIRTIO_PCI_CAP_SIZE = 16
VIRTIO_PCI_CAP_BAR = 4
VIRTIO_PCI_CAP_OFFSET = 8
VIRTIO_PCI_CAP_LENGTH = 12
VIRTIO_PCI_CAP_DATA = 16
"""pci_cfg_data of VIRTIO_PCI_CAP_PCI_CFG; notify_off_multiplier of VIRTIO_PCI_CAP_NOTIFY_CFG."""
VIRTIO_PCI_ISR_QUEUE = 1
VIRTIO_MSI_NO_VECTOR = 0xFFFF

# struct virtio_pci_common_cfg.
VIRTIO_PCI_COMMON_DFSELECT = 0
VIRTIO_PCI_COMMON_GFSELECT = 8
VIRTIO_PCI_COMMON_GF = 12
VIRTIO_PCI_COMMON_MSIX = 16
VIRTIO_PCI_COMMON_STATUS = 20
VIRTIO_PCI_COMMON_Q_SELECT = 22
VIRTIO_PCI_COMMON_Q_SIZE = 24
VIRTIO_PCI_COMMON_Q_MSIX = 26
VIRTIO_PCI_COMMON_Q_ENABLE = 28
VIRTIO_PCI_COMMON_Q_DESCLO = 32
VIRTIO_PCI_COMMON_Q_AVAILLO = 40
VIRTIO_PCI_COMMON_Q_USEDLO = 48
virtio_pci_common_cfg = Struct("<IIIIHHBBHHHHHQQQ")

# Split virtqueues.
VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4
VRING_AVAIL_F_NO_INTERRUPT = 1
vring_desc = Struct("<QIHH")
vring_used_elem = Struct("<II")
VRING_DESC_ALIGN_SIZE = 16
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4
VRING_MAX_SIZE = 32768

# The block device.
VIRTIO_ID_BLOCK = 2
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2
VIRTIO_BLK_ID_BYTES = 20
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1
VIRTIO_BLK_SECTOR = 512
"""What capacities and places are counted in, whatever the block size is."""
virtio_blk_outhdr = Struct("<I4xQ")
virtio_blk_discard_write_zeroes = Struct("<QII")
virtio_blk_config = Struct("<Q4xI4xI8x2xHII4xIIB3x")
"""capacity, seg_max, blk_size, num_queues, max_discard_sectors and _seg (discard_sector_alignment stays 0),
max_write_zeroes_sectors and _seg, write_zeroes_may_unmap."""
