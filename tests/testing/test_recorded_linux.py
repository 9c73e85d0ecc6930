"""A recorded boot of a stock Linux: in words, in tshark with nothing malformed, and played again."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from linux_guest import SECONDS, linux_guest

from hvkvm.devices.synth.heartbeat import Heartbeat
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.record_spec import RecordSpec
from hvkvm.record import explain
from hvkvm.record.dissector import dissector
from hvkvm.testing.replay import replay

REPLAYS = 100 if os.environ.get("HVKVM_SOAK") else 3

pytestmark = [pytest.mark.hyperv, pytest.mark.timeout(2 * SECONDS)]


def test_a_boot_is_recorded_whole(tmp_path: Path) -> None:
    path = tmp_path / "boot.pcapng"
    record = (RecordSpec(path, "full"),)
    image = tmp_path / "disk.raw"
    image.write_bytes(b"hello".ljust(1 << 20, b"\0"))
    settings = {
        "record": record,
        "command_io": "console",
        "modules": ("hv_vmbus", "hv_utils", "hv_storvsc", "sd_mod", "hv_netvsc"),
        "disks": (DiskSpec(str(image)),),
        "nets": (NicSpec(listen=tmp_path / "wire"),),
    }
    script = """
    until [ -b /dev/sda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
    head -c 5 /dev/sda; ip link set eth0 up; rmmod hv_utils
    """
    with linux_guest(script, **settings) as guest:
        assert guest.finish().status == 0
        assert "hello" in guest.text
    with path.open("rb") as file:
        text = "\n".join(explain.lines(file))
    for line in (
        "INITIATE_CONTACT version=5.3",
        "ICMSGTYPE_NEGOTIATE",
        "channel opened: heartbeat",
        "cdb_opcode=READ_10",
        "data_in=READ_TYPE data_transfer_length=0x1000",
        "NVSP_MSG1_TYPE_SEND_RNDIS_PKT",
        "ndis_msg_type=RNDIS_MSG_INIT_C",
        "oid=OID_GEN_CURRENT_PACKET_FILTER",
        "HvPostMessage",
    ):
        assert line in text, text
    for line in ("lost", "cut", "no message", "bytes are no"):
        assert line not in text
    with path.open("rb") as file:
        played = replay(file)
    assert played.difference is None, played.difference
    assert played.messages > 20
    assert played.packets > 4
    data = path.read_bytes()
    assert {repr(replay(io.BytesIO(data))) for _ in range(REPLAYS)} == {repr(played)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heartbeat, "MESSAGE_VERSIONS", ((3, 0),))
        changed = replay(io.BytesIO(data)).difference
    assert changed is not None
    assert "ICMSGTYPE_NEGOTIATE" in changed.recorded
    if shutil.which("tshark") is None:
        pytest.skip("the rest needs tshark (the package of that name)")
    script_file = tmp_path / "hvkvm.lua"
    script_file.write_text(dissector())
    done = subprocess.run(
        ["tshark", "-X", f"lua_script:{script_file}", "-r", path, "-Y", "hvkvm.short or _ws.malformed"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, "Lua" in done.stderr) == ("", False)
