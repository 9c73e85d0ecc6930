"""A recorded boot of a stock Linux: in words, in tshark with nothing malformed, and played again."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from linux_guest import SECONDS, linux_guest

from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.nic_spec import NicSpec
from hvkvm.machine.record_spec import RecordSpec
from hvkvm.record import explain
from hvkvm.record.dissector import dissector
from hvkvm.testing.replay import replay

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
    script = "head -c 5 /dev/sda; ip link set eth0 up; rmmod hv_utils"
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
        "NVSP_MSG1_TYPE_SEND_RNDIS_PKT",
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
