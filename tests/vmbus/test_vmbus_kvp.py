"""Key-value exchange against a guest's driver and daemon in the loopback."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack, pack_into, unpack_from
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import ic, kvp
from hvkvm.abi.kvp import IpInfo, KvpPair
from hvkvm.devices.synth.ic import MAX_WAITING
from hvkvm.devices.synth.kvp import MAX_PAIRS, Kvp, KvpReply
from hvkvm.testing.ic_driver import IcDriver
from hvkvm.testing.vmbus_loopback import Loopback

FACTS = [("FullyQualifiedDomainName", "guest.example"), ("NetworkAddressIPv4", "10.1.2.3;10.1.2.4")]


class Daemon:
    """What hv_kvp_daemon keeps and answers; offsets are those of the C structs, from their header."""

    def __init__(self) -> None:
        self.pools: dict[int, dict[str, str]] = {pool: {} for pool in range(5)}
        self.pools[kvp.KVP_POOL_AUTO] = dict(FACTS)
        self.asked: list[bytes] = []

    def __call__(self, body: bytes) -> tuple[int, bytes | None]:
        self.asked.append(body)
        op, pool = body[0], self.pools[body[1]]
        if op in (kvp.KVP_OP_GET_IP_INFO, kvp.KVP_OP_SET_IP_INFO):
            return self.addresses(body)
        key = self.key(body, 4 if op == kvp.KVP_OP_DELETE else 8)
        if op == kvp.KVP_OP_SET:
            kind, _key_size, size = unpack_from("<III", body, 4)
            raw = body[528 : 528 + size]
            text = raw.decode("utf-16-le").rstrip("\0") if kind == 1 else str(int.from_bytes(raw, "little"))
            pool[key] = text
            return 0, None
        if op == kvp.KVP_OP_ENUMERATE:
            (index,) = unpack_from("<I", body, 4)
            if index >= len(pool):
                return ic.HV_S_CONT, None
            key, text = list(pool.items())[index]
            return 0, self.pair(body, 8, key, text)
        if key not in pool:
            return ic.HV_S_CONT, None
        if op == kvp.KVP_OP_DELETE:
            del pool[key]
            return 0, None
        return 0, self.pair(body, 4, key, pool[key])

    def key(self, body: bytes, sizes_at: int) -> str:
        (size,) = unpack_from("<I", body, sizes_at)
        at = sizes_at + (4 if body[0] == kvp.KVP_OP_DELETE else 8)
        return body[at : at + size].decode("utf-16-le").partition("\0")[0]

    def pair(self, body: bytes, at: int, key: str, text: str) -> bytes:
        changed = bytearray(body)
        raw_key, raw = (f"{word}\0".encode("utf-16-le") for word in (key, text))
        pack_into("<III", changed, at, 1, len(raw_key), len(raw))
        changed[at + 12 : at + 12 + len(raw_key)] = raw_key
        changed[at + 524 : at + 524 + len(raw)] = raw
        return bytes(changed)

    def addresses(self, body: bytes) -> tuple[int, bytes | None]:
        adapter = body[2:258].decode("utf-16-le").rstrip("\0")
        if adapter != "00:15:5D:00:00:01":
            return (ic.HV_GUID_NOTFOUND if body[0] == kvp.KVP_OP_SET_IP_INFO else ic.HV_E_FAIL), None
        changed = bytearray(body)
        changed[258:260] = b"\3\1"
        lists = (
            (260, "10.0.0.2;fe80::1;"),
            (2308, "255.0.0.0;/64;"),
            (4356, "10.0.0.1;"),
            (5380, "1.1.1.1;"),
        )
        for at, text in lists:
            raw = text.encode("utf-16-le")
            changed[at : at + len(raw)] = raw
        return 0, bytes(changed)


class Asked:
    """A device that was asked, and its replies."""

    def __init__(self, loop: Any, version: tuple[int, int] = (4, 0), *, negotiate: bool = True) -> None:
        self.device = Kvp()
        self.driver = IcDriver(loop, self.device, version)
        self.replies: list[KvpReply] = []
        if negotiate:
            self.driver.negotiate()

    def ask(self, method: str, *args: Any, daemon: Callable[[bytes], Any] | None = None) -> KvpReply:
        """Ask, let `daemon` answer, and the one reply."""
        before = len(self.replies)
        getattr(self.device, method)(*args, self.replies.append)
        if daemon is not None:
            self.driver.serve(daemon)
        assert len(self.replies) == before + 1
        return self.replies[-1]


def test_the_layouts_are_those_of_the_c_structs() -> None:
    assert kvp.hv_kvp_exchg_msg_value.size == 2572
    assert kvp.hv_kvp_msg_delete.size == 516
    assert kvp.hv_kvp_ip_msg.size == 7428
    for body in (
        kvp.get_body(0, "k"),
        kvp.set_body(0, "k", 1),
        kvp.delete_body(0, "k"),
        kvp.enumerate_body(0, 0),
    ):
        assert len(body) == 7432


def test_a_pair_is_set_read_enumerated_and_deleted(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())
    pool = kvp.KVP_POOL_EXTERNAL
    assert asked.ask("get", pool, "colour", daemon=kept) == KvpReply(ic.HV_S_CONT)
    assert asked.ask("set", pool, "colour", "grün 🎨", daemon=kept).ok
    assert asked.ask("set", pool, "size", 7, daemon=kept).ok
    assert asked.ask("set", pool, "far", 1 << 40, daemon=kept).ok
    assert kept.pools[pool] == {"colour": "grün 🎨", "size": "7", "far": str(1 << 40)}
    found = asked.ask("get", pool, "colour", daemon=kept)
    assert (found.ok, found.value, found.text) == (True, "grün 🎨", "done")
    all_of_it = asked.ask("enumerate", pool, daemon=kept)
    assert all_of_it.pairs == tuple(KvpPair(*item) for item in kept.pools[pool].items())
    assert asked.ask("get_directly", pool, "colour", daemon=kept) == found
    assert asked.ask("delete", pool, "colour", daemon=kept).ok
    assert asked.ask("get_directly", pool, "colour", daemon=kept) == KvpReply(ic.HV_S_CONT)
    assert asked.ask("delete", pool, "colour", daemon=kept).text == "nothing there"
    assert asked.ask("enumerate", kvp.KVP_POOL_GUEST, daemon=kept) == KvpReply(0)


def test_a_get_asks_no_further_than_it_must(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())
    kept.pools[1] = {f"k{n}": f"v{n}" for n in range(20)}
    assert asked.ask("get", 1, "k3", daemon=kept).pairs == (KvpPair("k3", "v3"),)
    assert len(kept.asked) == 4


def test_requests_carry_the_chosen_version_and_their_sizes(loopback: Any) -> None:
    asked = Asked(loopback(), (3, 0))
    asked.device.set(kvp.KVP_POOL_GUEST, "ab", "c", asked.replies.append)
    asked.driver.loop.run()
    (payload,) = asked.driver.requests()
    assert unpack_from("<HHHHHH", payload, 8) == (3, 0, ic.ICMSGTYPE_KVPEXCHANGE, 3, 0, 7432)
    assert unpack_from("<BBHIII", payload, 28) == (kvp.KVP_OP_SET, kvp.KVP_POOL_GUEST, 0, 1, 6, 4)
    assert payload[44:50] == b"a\0b\0\0\0"
    assert payload[556:560] == b"c\0\0\0"


def test_numbers_are_told_as_numbers_where_the_guest_says_so(loopback: Any) -> None:
    asked = Asked(loopback())
    cases = ((4, 7, b"\xff\xff\xff\xff\xff", 0xFFFFFFFF), (8, 0, pack("<Q", 1 << 63), 1 << 63))
    for kind, size, raw, value in cases:
        body = pack("<BBHIII512s2048s", 0, 0, 0, kind, 0, size, b"", raw)
        assert asked.ask("get_directly", 0, "n", daemon=lambda _body, body=body: (0, body)).value == value
    body = pack("<BBHIII512s2048s", 0, 0, 0, 3, 0, 2, b"", b"abc")
    assert asked.ask("get_directly", 0, "n", daemon=lambda _body: (0, body)).value == b"ab"


@pytest.mark.parametrize("version", [(1, 0), (3, 0), (4, 0)])
def test_older_versions_do_without_addresses(loopback: Any, version: tuple[int, int]) -> None:
    kept, asked = Daemon(), Asked(loopback(), version)
    assert asked.device.message_version == version
    assert asked.ask("enumerate", kvp.KVP_POOL_AUTO, daemon=kept).ok
    told = asked.ask("ip_info", "00:15:5D:00:00:01", daemon=kept)
    assert told.status == (0 if version == (4, 0) else ic.HV_ERROR_NOT_SUPPORTED)
    if version != (4, 0):
        assert told.text == f"not supported: the guest speaks {version[0]}.0, and addresses need 4.0"


def test_an_adapters_addresses_are_told(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())
    told = asked.ask("ip_info", "00:15:5D:00:00:01", daemon=kept)
    assert told.ip == IpInfo(
        "00:15:5D:00:00:01",
        3,
        True,
        ("10.0.0.2", "fe80::1"),
        ("255.0.0.0", "/64"),
        ("10.0.0.1",),
        ("1.1.1.1",),
    )
    assert asked.ask("ip_info", "00:15:5D:00:00:02", daemon=kept) == KvpReply(ic.HV_E_FAIL)


def test_without_an_adapter_the_facts_tell_the_addresses(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())
    assert asked.ask("ip_info", None, daemon=kept).ip == IpInfo(ip_addr=("10.1.2.3", "10.1.2.4"))
    kept.pools[kvp.KVP_POOL_AUTO].clear()
    assert asked.ask("ip_info", None, daemon=kept).ip == IpInfo()
    assert asked.ask("ip_info", None, daemon=lambda _body: (ic.HV_E_FAIL, None)) == KvpReply(ic.HV_E_FAIL)


def test_an_adapter_is_configured(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())
    wanted = IpInfo("00:15:5D:00:00:01", kvp.ADDR_FAMILY_IPV4, False, ("10.9.9.9",), ("255.255.0.0",))
    assert asked.ask("set_ip_info", wanted, daemon=kept).ok
    assert kvp.parse_ip_info(kept.asked[-1]) == wanted
    assert kept.asked[-1][0] == kvp.KVP_OP_SET_IP_INFO
    told = asked.ask("set_ip_info", wanted._replace(adapter_id="{x}"), daemon=kept)
    assert told.text == "no such adapter"


@pytest.mark.parametrize(
    ("method", "args", "note"),
    [
        ("get", (5, "k"), "there is no pool 5"),
        ("enumerate", (-1,), "there is no pool -1"),
        ("get", (0, ""), "the key is empty"),
        ("set", (0, "", "v"), "the key is empty"),
        ("delete", (0, "a\0b"), "the key holds a NUL"),
        ("get", (0, "k" * 256), "the key: 256 UTF-16 units; 255 fit"),
        ("get", (0, "🎨" * 128), "the key: 256 UTF-16 units; 255 fit"),
        ("set", (0, "k", "v" * 1024), "the value: 1024 UTF-16 units; 1023 fit"),
        ("set", (0, "k", "\ud800"), "the value holds half a character (a lone surrogate)"),
        ("set", (0, "k", -1), "the value -1 is no unsigned number of 64 bits"),
        ("set", (0, "k", 1 << 64), f"the value {1 << 64} is no unsigned number of 64 bits"),
        ("ip_info", ("a" * 128,), "the adapter: 128 UTF-16 units; 127 fit"),
        ("set_ip_info", (IpInfo(gate_way=("x" * 512,)),), "the gateways: 512 UTF-16 units; 511 fit"),
    ],
)
def test_what_cannot_be_asked_is_told_at_once(
    loopback: Any, method: str, args: tuple[Any, ...], note: str
) -> None:
    asked = Asked(loopback())
    assert asked.ask(method, *args) == KvpReply(ic.HV_INVALIDARG, note)
    assert asked.driver.requests() == []


def test_the_longest_key_and_value_fit(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())
    assert asked.ask("set", 0, "k" * 255, "v" * 1023, daemon=kept).ok
    assert asked.ask("get", 0, "k" * 255, daemon=kept).value == "v" * 1023


def test_nobody_is_asked_before_the_daemon_has_registered(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback(), negotiate=False)
    for method, args in (("get", (0, "k")), ("enumerate", (2,)), ("ip_info", (None,)), ("ip_info", ("x",))):
        assert asked.ask(method, *args) == KvpReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED)
    assert asked.replies[-1].text == "no driver of the guest's is there"
    asked.driver.negotiate()
    assert asked.ask("enumerate", 2, daemon=kept).ok


def test_a_guest_without_a_daemon_fails(loopback: Any) -> None:
    asked = Asked(loopback())
    for method, args in (
        ("get", (0, "k")),
        ("set", (0, "k", "v")),
        ("delete", (0, "k")),
        ("enumerate", (2,)),
    ):
        told = asked.ask(method, *args, daemon=lambda _body: (ic.HV_E_FAIL, None))
        assert (told, told.text) == (KvpReply(ic.HV_E_FAIL), "the guest failed")


def test_everyone_is_told_when_the_guest_leaves(loopback: Any) -> None:
    asked = Asked(loopback())
    device, again = asked.device, []
    for _ in range(3):
        device.get(0, "k", asked.replies.append)
    device.enumerate(2, asked.replies.append)
    # Who asks again from his reply is told at once, and does not wait for the next guest.
    device.get(0, "k", lambda _reply: device.get(0, "k", again.append))
    asked.driver.loop.run()
    asked.driver.close()
    left = KvpReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED, "the guest left without an answer")
    assert asked.replies == [left] * 4
    assert again == [KvpReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED)]
    asked.driver.open()
    asked.driver.negotiate()
    assert asked.ask("enumerate", 2, daemon=Daemon()).ok


def test_an_enumeration_keeps_what_it_had_when_the_guest_leaves(loopback: Any) -> None:
    asked = Asked(loopback())
    kept = Daemon()
    asked.device.enumerate(2, asked.replies.append)
    asked.driver.loop.run()
    (payload,) = asked.driver.requests()
    status, body = kept(payload[28:])
    asked.driver.answer(payload, body, status)
    asked.driver.close()
    (told,) = asked.replies
    assert (told.status, told.pairs) == (ic.HV_ERROR_DEVICE_NOT_CONNECTED, (KvpPair(*FACTS[0]),))


def test_too_much_at_once_is_refused(loopback: Any) -> None:
    asked = Asked(loopback())
    for _ in range(MAX_WAITING + 3):  # each will ask once
        asked.device.get(0, "k", asked.replies.append)
    assert [told.status for told in asked.replies] == [ic.HV_ERROR_BUSY] * 2
    asked.driver.serve(Daemon())
    assert [told.status for told in asked.replies[2:]] == [ic.HV_S_CONT] * (MAX_WAITING + 1)


def test_two_enumerations_go_on_side_by_side(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())
    kept.pools[1] = {f"k{n}": "v" for n in range(20)}
    asked.device.enumerate(1, asked.replies.append)
    asked.device.enumerate(2, asked.replies.append)
    asked.driver.serve(kept)
    assert sorted(len(told.pairs) for told in asked.replies) == [2, 20]


def test_an_enumeration_that_never_ends_is_ended(loopback: Any) -> None:
    kept, asked = Daemon(), Asked(loopback())

    def endless(body: bytes) -> tuple[int, bytes]:
        return 0, kept.pair(body, 8, "again", "and again")

    told = asked.ask("enumerate", 2, daemon=endless)
    assert (told.ok, len(told.pairs)) == (True, MAX_PAIRS)
    assert told.text == f"done: {MAX_PAIRS} pairs, and there may be more"
    sought = asked.ask("get", 2, "k", daemon=endless)
    assert sought == KvpReply(ic.HV_S_CONT, told.note)


def answers() -> st.SearchStrategy[bytes]:
    """Whole bodies, cut ones and junk."""
    kinds = st.sampled_from((1, 4, 8, 3, 0xFFFFFFFF))
    sizes = st.one_of(st.integers(0, 2600), st.integers(0, 2**32 - 1))
    texts = st.binary(max_size=600)
    value = st.builds(lambda *fields: pack("<IIII512s2048s", 0, *fields), kinds, sizes, sizes, texts, texts)
    return st.one_of(texts, value, value.map(lambda raw: raw * 3), st.just(b"\xff" * 7600))


METHODS = (
    ("get", 0, "k"),
    ("get_directly", 0, "k"),
    ("enumerate", 1),
    ("delete", 0, "k"),
    ("ip_info", "a"),
    ("ip_info", None),
)


@given(answers(), st.one_of(st.just(0), st.integers(0, 2**32 - 1)), st.sampled_from(METHODS))
def test_any_answer_is_told_within_its_bounds(body: bytes, status: int, method: tuple[Any, ...]) -> None:
    loop = Loopback()
    try:
        asked = Asked(loop)
        getattr(asked.device, method[0])(*method[1:], asked.replies.append)
        loop.run()
        for code in (status, ic.HV_E_FAIL):  # the second ends an enumeration
            for payload in asked.driver.requests():
                changed = bytearray(payload[:28])
                changed[20:24] = pack("<I", code)
                changed[25] = 5
                asked.driver.answer_raw(bytes(changed) + body)
        (told,) = asked.replies
        for pair in told.pairs:
            assert len(pair.key) <= 256
            assert isinstance(pair.value, int) or len(pair.value) <= 2048
        if told.ip is not None:
            assert sum(map(len, told.ip.ip_addr)) <= 1024
        assert asked.ask("delete", 0, "k", daemon=Daemon()).status == ic.HV_S_CONT  # and it goes on
    finally:
        loop.close()


@given(st.binary(max_size=8000))
def test_parsers_take_any_bytes(body: bytes) -> None:
    for parse in (kvp.parse_get, kvp.parse_enumerate, kvp.parse_ip_info):
        parse(body)


@given(st.text(max_size=300), st.text(max_size=1100))
def test_every_text_that_fits_survives(key: str, value: str) -> None:
    try:
        body = kvp.set_body(0, key, value)
    except ValueError:
        assert not key or "\0" in key + value or len(key) > 127 or len(value) > 511
        return
    pair = kvp.parse_get(body)
    assert pair == KvpPair(key, value)


@pytest.mark.parametrize("pages", [2, 3])
def test_what_never_fits_in_the_guests_ring_is_answered(loopback: Any, pages: int) -> None:
    loop = loopback()
    device = Kvp()
    driver = IcDriver(loop, device, (4, 0), in_pages=pages)
    driver.negotiate()
    replies: list[KvpReply] = []
    device.get(kvp.KVP_POOL_AUTO, "OSName", replies.append)
    device.set(kvp.KVP_POOL_EXTERNAL, "a", "b", replies.append)
    device.enumerate(kvp.KVP_POOL_AUTO, replies.append)
    loop.synic.signal(driver.channel.connection_id)
    loop.run()
    fits = pages == 3
    if fits:
        assert driver.serve(lambda _body: (ic.HV_S_CONT, None)) == 3
    assert [reply.status for reply in replies] == [
        ic.HV_S_CONT if fits else ic.HV_E_FAIL,
        ic.HV_S_CONT if fits else ic.HV_E_FAIL,
        0 if fits else ic.HV_E_FAIL,
    ]
    assert fits or all("never fit in the guest's ring of 4096" in reply.text for reply in replies)
    assert not driver.channel.rescinded
