"""Volume snapshot messages: the bodies behind an integration component's header.

struct hv_vss_msg of include/uapi/linux/hyperv.h. Layout only; anyone may
import it. `parse_flags` takes a guest's bytes and raises nothing.
"""

from __future__ import annotations

from struct import Struct

VSS_OP_CREATE = 0
VSS_OP_DELETE = 1
VSS_OP_HOT_BACKUP = 2
VSS_OP_GET_DM_INFO = 3
VSS_OP_BU_COMPLETE = 4
VSS_OP_FREEZE = 5
VSS_OP_THAW = 6
VSS_OP_AUTO_RECOVER = 7

VSS_HBU_NO_AUTO_RECOVERY = 0x00000005
"""A guest's answer to VSS_OP_HOT_BACKUP: it can be backed up as it runs. Of Linux see `Vss.check`."""

hv_vss_msg = Struct("<B7xI")
"""operation; flags of hv_vss_check_feature."""


def request(operation: int) -> bytes:
    """A request of the host."""
    return hv_vss_msg.pack(operation, 0)


def parse_flags(body: bytes) -> int | None:
    """The flags in an answer to VSS_OP_HOT_BACKUP; None for fewer bytes than it has."""
    if len(body) < hv_vss_msg.size:
        return None
    flags: int = hv_vss_msg.unpack_from(body)[1]
    return flags
