"""A guest of our own on a real vCPU that uses VMBus as no driver would, on both SynICs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from guest_agent import DRAIN, EOM_ALWAYS, SCRATCH
from guest_machine import Guest

from hvkvm.abi import ic, kvp, tlfs, vmbus
from hvkvm.abi import vmbus_messages as wire
from hvkvm.devices.synth.kvp import KvpReply
from hvkvm.testing.vmbus_client import gpadl_messages

PAGE = 4096
SIMP, SIEFP, INPUT = SCRATCH, SCRATCH + PAGE, SCRATCH + 2 * PAGE
RINGS = 0x200_0000 // PAGE
"""The first PFN of the rings."""
SYNICS = pytest.mark.parametrize(
    "synic",
    [
        pytest.param("user", marks=[pytest.mark.kvm, pytest.mark.user_synic]),
        pytest.param("kernel", marks=[pytest.mark.hyperv, pytest.mark.kernel_synic]),
    ],
)


class Client:
    """What a guest's driver does, by hand."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.cpu = guest[0]
        self.memory = guest.machine.memory
        self.got: list[wire.Message] = []
        guest.enlighten()
        self.cpu.synic_on(simp=SIMP, siefp=SIEFP, sints={2: DRAIN | EOM_ALWAYS})

    @property
    def bus(self) -> Any:
        bus = self.guest.machine.bus
        assert bus is not None
        return bus

    def post(self, payload: bytes) -> None:
        self.memory.write(INPUT, struct.pack("<IIII", 1, 0, 1, len(payload)) + payload.ljust(240, b"\0"))
        assert self.cpu.hypercall(0x5C, INPUT) == 0

    def ring(self, connection_id: int) -> None:
        assert self.cpu.hypercall(0x5D | 1 << 16, connection_id) == 0

    def until(self, number: int) -> wire.Message:
        """The first message of this type that comes, or came."""

        def came() -> bool:
            for message in self.cpu.messages():
                parsed = wire.parse(message.payload[: message.payload_size])
                assert parsed is not None
                self.got.append(parsed)
            return any(m.kind.type == number for m in self.got)

        self.guest.until(came, wire.KINDS[number].name)
        return next(m for m in self.got if m.kind.type == number)

    def connect(self) -> None:
        self.post(wire.build(wire.INITIATE_CONTACT, version=vmbus.VERSION_WIN10))
        self.until(wire.VERSION_RESPONSE)

    def offer_of(self, interface: bytes) -> wire.Message:
        self.post(wire.build(wire.REQUESTOFFERS))
        self.until(wire.ALLOFFERS_DELIVERED)
        offers = [m for m in self.got if m.kind.type == wire.OFFERCHANNEL]
        return next(m for m in offers if m["interface"] == interface)


@pytest.fixture
def client(boot_agent: Callable[..., Guest], synic: str) -> Client:
    return Client(boot_agent(cpus=1, synic=synic, vmbus="on"))


@SYNICS
def test_a_ring_too_small_for_a_request_costs_the_request_alone(client: Client) -> None:
    client.connect()
    offer = client.offer_of(vmbus.HV_KVP_GUID)
    pages = [RINGS + n for n in range(4)]
    for pfn in pages:
        client.memory.zero(pfn * PAGE, PAGE)
    for payload in gpadl_messages(offer["relid"], 7, [(4 * PAGE, 0, pages)]):
        client.post(payload)
    assert client.until(wire.GPADL_CREATED)["status"] == 0
    client.post(wire.build(wire.OPENCHANNEL, relid=offer["relid"], ring_gpadl=7, downstream_page_offset=2))
    assert client.until(wire.OPENCHANNEL_RESULT)["status"] == 0
    ours, data, theirs, asked = (pfn * PAGE for pfn in pages)
    client.guest.until(lambda: bool(client.memory.read_u32(theirs)), "the host's first packet")
    size = client.memory.read_u32(theirs)
    packet = bytearray(client.memory.read(asked, size))
    packet[16 + 25] = ic.ICMSGHDRFLAG_RESPONSE
    packet[16 + 28 : 16 + 44] = struct.pack("<HHIHHHH", 1, 1, 0, 3, 0, 4, 0)
    client.memory.write_u32(theirs + 4, size)
    client.memory.write(data, bytes(packet))
    client.memory.write_u32(ours, size)
    client.ring(offer["connection_id"])
    kvp_device = client.bus.kvp
    client.guest.until(lambda: kvp_device.ready_for_requests, "the answer is taken")
    replies: list[KvpReply] = []
    client.guest.machine.platform.io.call_soon(kvp_device.get, kvp.KVP_POOL_AUTO, "OSName", replies.append)
    client.guest.until(lambda: bool(replies), "the request is answered")
    assert replies[0].status == ic.HV_E_FAIL
    client.ring(offer["connection_id"])
    client.guest.io_barrier()
    assert client.guest.machine.outcome is None


@SYNICS
def test_messages_wait_for_the_page_that_the_guest_switched_off(client: Client) -> None:
    client.connect()
    client.cpu.simp(None)
    client.post(wire.build(wire.REQUESTOFFERS))
    complaints = client.bus.host.server.reports.counts
    client.guest.until(lambda: bool(complaints.get("message waits")), "a message that meets no page")
    client.cpu.simp(SIMP)
    client.until(wire.ALLOFFERS_DELIVERED)
    assert sum(m.kind.type == wire.OFFERCHANNEL for m in client.got) == 6
    assert "message dropped" not in complaints


@SYNICS
def test_a_cpu_that_crashed_reads_another_ones_messages(boot_agent: Callable[..., Guest], synic: str) -> None:
    """Linux's vmbus_wait_for_unload() empties the slots of all VPs, and writes EOM on its own."""
    client = Client(boot_agent(cpus=2, synic=synic, vmbus="on"))
    client.connect()
    client.cpu.policy(2, 0)  # hangs: what comes stays in its slot
    slot = SIMP + 2 * 256
    client.post(wire.build(wire.REQUESTOFFERS))
    client.guest.until(lambda: bool(client.memory.read(slot + 5, 1)[0]), "the second offer waits")
    client.post(wire.build(wire.UNLOAD))
    outbox = client.bus.host.outbox

    def last_waits() -> bool:
        return [wire.message_type(m.payload) for m in outbox] == [wire.UNLOAD_RESPONSE]

    client.guest.until(last_waits, "the answer to UNLOAD waits")

    def unloaded() -> bool:
        if not client.memory.read_u32(slot):
            return False
        if client.memory.read_u32(slot + 16) == wire.UNLOAD_RESPONSE:
            return True
        pending = client.memory.read(slot + 5, 1)[0]
        client.memory.write_u32(slot, 0)
        if pending:
            client.guest[1].wrmsr(tlfs.HV_X64_MSR_EOM, 0)
        return False

    client.guest.until(unloaded, "the answer to UNLOAD")
