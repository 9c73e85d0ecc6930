"""The requests and flags of /dev/net/tun, after include/uapi/linux/if_tun.h and if.h.

Numbers and layouts only; anyone may import it.
"""

from __future__ import annotations

from struct import Struct

TUNGETFEATURES = 0x800454CF
TUNSETIFF = 0x400454CA
TUNGETIFF = 0x800454D2
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC

IFF_TUN = 0x0001
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000

SIOCGIFMTU = 0x8921

IFNAMSIZ = 16
"""Bytes of an interface's name, the NUL counted."""

ifreq_flags = Struct("16sh22x")
"""struct ifreq: name, flags."""
ifreq_int = Struct("16si20x")
"""struct ifreq: name, an int such as the MTU."""
