"""Disks and NICs in a recording: SCSI and RNDIS with named fields, the same in words and in Wireshark."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from dissected import dissected, fields_of
from storvsp_bench import Bench

from hvkvm.abi import device_layouts, hvsock, pcapng, record_format, rndis, scsi
from hvkvm.abi import vmbus_messages as wire
from hvkvm.abi.layout import Layout, every
from hvkvm.abi.record_format import Entry, Kind
from hvkvm.devices.scsi.fault_rules import OPERATIONS, Action, Plan, Rule
from hvkvm.devices.scsi.faulty import FaultyDisk
from hvkvm.devices.synth.netvsp import Netvsp
from hvkvm.record import explain
from hvkvm.record.dissector import message_layouts
from hvkvm.record.recorder import Recorder
from hvkvm.testing.netvsc_driver import NetvscDriver, data_message
from hvkvm.testing.replay import replay
from hvkvm.testing.scripted_port import ScriptedPort
from hvkvm.testing.storvsc_driver import PAGE
from hvkvm.testing.vmbus_loopback import MIB, Loopback

needs_tshark = pytest.mark.skipif(
    shutil.which("tshark") is None, reason="needs tshark (the package of that name)"
)
FRAME = (bytes.fromhex("020304050607020000000001") + b"\x88\xb5").ljust(60, b"\7")


def recorded_network(path: Path) -> None:
    """A driver sets a NIC up, and sends and gets frames with and without marks."""
    loop = Loopback(pages=list(range(64, 1020)), vp_count=2)
    port = ScriptedPort(loop.call_soon)
    nic = Netvsp(loop.memory, port, name="net0", address=FRAME[:6], queues=1)
    port.attach(nic)
    loop.host.add(nic)
    port.start()
    recorder = Recorder(path, "full", facts(loop))
    recorder.start()
    loop.host.listen(recorder)
    driver = NetvscDriver(loop).start()
    driver.send_pages_of(data_message(FRAME))
    driver.send_pages_of(data_message(FRAME, [(rndis.IEEE_8021Q_INFO, 5 << 4)]))
    port.inject(FRAME, FRAME)
    loop.run()
    assert len(driver.received) == 2
    assert driver.query(rndis.RNDIS_OID_GEN_LINK_SPEED)
    loop.close()
    recorder.close()


def recorded_disk(folder: Path, path: Path) -> None:
    """A driver reads, and meets an error."""
    bench = Bench(folder)
    recorder = Recorder(path, "full", facts(bench.loop))
    recorder.start()
    bench.loop.host.listen(recorder)
    disk = bench.unit(bench.paths[0]).disk
    plan = Plan([Rule(Action.ERROR, OPERATIONS["read"])])
    bench.device.attach(
        0,
        5,
        FaultyDisk(disk, "faulty", plan, bench.loop.call_later, lambda: None),  # type: ignore[arg-type]
    )
    driver = bench.start()
    read = scsi.cdb10.pack(scsi.READ_10, 0, 0, 0, 8, 0)
    for lun in (0, 5):
        for _ in range(2):  # the first is told of a unit attention
            driver.execute(bytes(6), lun=lun)
        driver.execute(read, lun=lun, pages=[900], length=PAGE)
    bench.close()
    recorder.close()


def facts(loop: Loopback) -> dict[str, object]:
    return {"cpus": loop.synic.vp_count, "memory": 4 * MIB, "vmbus_max_version": "6.0"}


def words(path: Path) -> list[str]:
    with path.open("rb") as file:
        return list(explain.lines(file))


def test_rndis_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net"
    recorded_network(path)
    text = "\n".join(words(path))
    for said in (
        "guest> net0: ndis_msg_type=RNDIS_MSG_INIT msg_len=0x18 req_id=1 major_ver=1",
        "host> net0: ndis_msg_type=RNDIS_MSG_INIT_C msg_len=0x34 req_id=1 status=RNDIS_STATUS_SUCCESS",
        "ndis_msg_type=RNDIS_MSG_SET",
        "oid=OID_GEN_CURRENT_PACKET_FILTER",
        "ndis_msg_type=RNDIS_MSG_QUERY_C",
        "guest> net0: ndis_msg_type=RNDIS_MSG_PACKET msg_len=0x68 data_offset=0x24 data_len=0x3c\n",
        "per_pkt_info_len=0x10 size=0x10 type=IEEE_8021Q_INFO ppi_offset=0xc value=0x50",
        "host> net0: ndis_msg_type=RNDIS_MSG_PACKET",
    ):
        assert said in text, text
    assert "cut short" not in text


def test_scsi_is_named(tmp_path: Path) -> None:
    path = tmp_path / "disk.pcapng"
    recorded_disk(tmp_path, path)
    text = "\n".join(words(path))
    good = [line for line in text.splitlines() if "cdb_opcode=READ_10" in line]
    assert len(good) == 2
    assert all("data_in=READ_TYPE data_transfer_length=0x1000" in line for line in good)
    assert "srb_status=SRB_STATUS_SUCCESS scsi_status=GOOD" in text
    failed = next(line for line in text.splitlines() if "sense_key=MEDIUM_ERROR" in line)
    assert "srb_status=SRB_STATUS_ERROR|AUTOSENSE_VALID scsi_status=CHECK_CONDITION" in failed
    assert "sense_asc=0x11" in failed
    assert "cut short" not in text


def test_such_a_recording_is_played_a_hundred_times_alike(tmp_path: Path) -> None:
    for number, make in enumerate((recorded_network, lambda path: recorded_disk(tmp_path, path))):
        path = tmp_path / f"r{number}"
        make(path)
        data = path.read_bytes()
        results = {repr(replay(io.BytesIO(data))) for _ in range(100)}
        assert len(results) == 1
        assert replay(io.BytesIO(data)).difference is None, results


@needs_tshark
def test_wireshark_shows_the_same_of_disks_and_nics(tmp_path: Path) -> None:
    for name in ("net", "disk"):
        path = tmp_path / f"{name}.pcapng"
        if name == "net":
            recorded_network(path)
        else:
            recorded_disk(tmp_path, path)
        agree(path, tmp_path)


@needs_tshark
def test_wireshark_shows_the_same_of_every_layout(tmp_path: Path) -> None:
    """Each message and each row of each device's protocol, with random bytes behind its own value."""
    path = tmp_path / "all.pcapng"
    written(path, list(every_layout(Random(4))))
    assert agree(path, tmp_path, cut=True) > 1300


def written(path: Path, entries: list[Entry]) -> None:
    link = pcapng.interface_description(pcapng.LINKTYPE_USER0, record_format.LINK_NAME)
    blocks = [pcapng.enhanced_packet(0, at * 1000, entry.pack()) for at, entry in enumerate(entries)]
    path.write_bytes(pcapng.section_header("test") + link + b"".join(blocks))


def agree(path: Path, folder: Path, *, cut: bool = False) -> int:
    """How many fields of it tshark and our own tables both find, the same in name and bytes.

    `cut`: a message may end too early.
    """
    with path.open("rb") as file:
        entries = [entry for _at, entry in explain.read(file)]
    shown = dissected(path, folder, cut=cut)
    assert len(shown) == len(entries)
    compared = 0
    for entry, fields in zip(entries, shown, strict=True):
        wanted = [(name, raw.hex()) for name, raw in fields_of(entry)]
        assert fields == wanted, explain.described(entry)
        compared += len(wanted)
    return compared


def every_layout(random: Random) -> Iterator[Entry]:
    for number in wire.KINDS:
        size = 8 + sum(row.size for row in every(message_layouts()[number]))
        yield Entry(Kind.MESSAGE, True, number.to_bytes(4, "little") + random.randbytes(size))
    guids = {protocol.name: guid for guid, protocol in device_layouts.PROTOCOLS.items()}
    guids["hvsock"] = bytes(4) + hvsock.SERVICE_TEMPLATE[4:]
    for guid in guids.values():
        protocol = device_layouts.protocol_of(guid)
        for layout in (protocol.payload, protocol.pointed):
            for body in bodies(layout, random):
                if layout is protocol.pointed:
                    yield Entry(Kind.POINTED, False, body, 3, guid)
                else:
                    whole = body + bytes(-len(body) % 8)
                    head = bytes([6, 0, 2, 0]) + (2 + len(whole) // 8).to_bytes(2, "little") + bytes(10)
                    yield Entry(Kind.PACKET, True, head + whole, 3, guid)


def bodies(layout: Layout | None, random: Random) -> Iterator[bytes]:
    """Bytes for a layout: one for each value of each switch in it."""
    if layout is None:
        return
    body = bytearray(random.randbytes(layout.size))
    if not layout.switch:
        for rest in bodies(layout.then, random) if layout.then is not None else [b""]:
            yield bytes(body) + rest
        return
    switch = next((field for field in layout.fields if field.name == layout.switch), None)
    for value, case in layout.cases.items():
        if switch is not None:
            body[switch.offset : switch.offset + switch.size] = value.to_bytes(switch.size, "little")
        for rest in bodies(case, random):
            yield bytes(body) + rest
    yield bytes(body)


def test_rndis_beginnings_take_any_bytes() -> None:
    random = Random(7)
    whole = data_message(FRAME)
    assert rndis.beginnings(whole * 3) == [whole[: rndis.packet.size]] * 3
    assert rndis.beginnings(b"\1\0\0\0\0\0\0\0" * 9) == []
    assert len(rndis.beginnings(rndis.header.pack(8, 8) * 1000)) == rndis.MAX_TOLD
    for _ in range(2000):
        found = rndis.beginnings(random.randbytes(random.randrange(200)))
        assert all(len(one) <= rndis.MAX_TOLD_BYTES for one in found)
