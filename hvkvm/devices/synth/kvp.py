"""Key-value exchange: the host asks the guest's daemon for facts, and leaves pairs with it.

Why: how a host learns a guest's system and addresses, and hands it settings,
without a network. Linux passes each request to hv_kvp_daemon and answers
NEGOTIATE only once that has registered (or after 55 s), so until then there is
nobody to ask. While the daemon is away a request may wait for it without end.

Each request is answered exactly once: by the guest, by the guest's leaving, or at
once where it cannot be sent or, with a `wanted` as in `ask`, need not be any more.
Failures are values. Owner: the I/O loop.
"""

from __future__ import annotations

from collections.abc import Callable

from hvkvm.abi import ic, kvp, vmbus
from hvkvm.abi.kvp import IpInfo, KvpPair, Value
from hvkvm.devices.synth.ic import IntegrationComponent, Reply, Wanted
from hvkvm.tuples import NamedTuple

MAX_PAIRS = 1024
"""Of one enumeration: a guest must not let it go on for ever."""
_IP_VERSION = (4, 0)


class KvpReply(NamedTuple):
    """What became of a request: an HRESULT, `note` where there is more to say, and what was asked for.

    An enumeration that fails keeps the pairs it had.
    """

    status: int
    note: str = ""
    pairs: tuple[KvpPair, ...] = ()
    ip: IpInfo | None = None

    @property
    def ok(self) -> bool:
        """Whether it was done."""
        return self.status == ic.HV_S_OK

    @property
    def text(self) -> str:
        """The status in words."""
        return ic.status_text(self.status, self.note)

    @property
    def value(self) -> Value | None:
        """The value of a get; None if there is none."""
        return self.pairs[0].value if self.pairs else None


OnReply = Callable[[KvpReply], object]


class Kvp(IntegrationComponent):
    """One question at a time goes to the guest; up to 16 more wait."""

    NAME = "kvp"
    INTERFACE = vmbus.HV_KVP_GUID
    MESSAGE_VERSIONS = ((1, 0), (3, 0), (4, 0))

    def get(self, pool: int, key: str, reply: OnReply, wanted: Wanted | None = None) -> None:
        """The value of `key`; HV_S_CONT when there is none. Enumerates up to it, as Hyper-V's own tools do.

        `get_directly` says why.
        """

        def told(result: KvpReply) -> None:
            if not result.ok:
                reply(result._replace(pairs=()))
            elif result.pairs and result.pairs[-1].key == key:
                reply(KvpReply(ic.HV_S_OK, pairs=result.pairs[-1:]))
            else:
                reply(KvpReply(ic.HV_S_CONT, result.note))

        try:
            kvp.key_bytes(key)
        except ValueError as error:
            reply(KvpReply(ic.HV_INVALIDARG, str(error)))
            return
        self._enumerate_from(pool, (), key, told, wanted)

    def get_directly(self, pool: int, key: str, reply: OnReply) -> None:
        """The value of `key` by KVP_OP_GET, in one request.

        Linux finds the key and answers with an empty value (seen with 6.1 and 6.12): its
        daemon copies as much as the request has room for, and its driver does not tell how much.
        """

        def parse(body: bytes) -> KvpReply | None:
            pair = kvp.parse_get(body)
            return None if pair is None else KvpReply(ic.HV_S_OK, pairs=(KvpPair(key, pair.value),))

        self._exchange(pool, lambda: kvp.get_body(pool, key), reply, parse)

    def set(
        self, pool: int, key: str, value: str | int, reply: OnReply, wanted: Wanted | None = None
    ) -> None:
        """Leave a pair with the guest, in place of one of that key.

        Linux keeps a number as its digits. A key has room for 255 UTF-16 units and a value
        for 1023, but Linux tells no more than 254 and 1022 of them again.
        """
        self._exchange(pool, lambda: kvp.set_body(pool, key, value), reply, _done, wanted)

    def delete(self, pool: int, key: str, reply: OnReply, wanted: Wanted | None = None) -> None:
        """Take a pair away; HV_S_CONT when there is none."""
        self._exchange(pool, lambda: kvp.delete_body(pool, key), reply, _done, wanted)

    def enumerate(self, pool: int, reply: OnReply, wanted: Wanted | None = None) -> None:
        """All pairs of a pool, at most MAX_PAIRS. One request for each, so others may come in between."""
        self._enumerate_from(pool, (), None, reply, wanted)

    def _enumerate_from(
        self,
        pool: int,
        pairs: tuple[KvpPair, ...],
        until: str | None,
        reply: OnReply,
        wanted: Wanted | None,
    ) -> None:
        if len(pairs) == MAX_PAIRS:
            reply(KvpReply(ic.HV_S_OK, f"{MAX_PAIRS} pairs, and there may be more", pairs))
            return

        def took(result: KvpReply) -> None:
            if result.ok:
                so_far = pairs + result.pairs
                if so_far[-1].key == until:
                    reply(KvpReply(ic.HV_S_OK, pairs=so_far))
                else:
                    self._enumerate_from(pool, so_far, until, reply, wanted)
            elif result.status == ic.HV_S_CONT:
                reply(KvpReply(ic.HV_S_OK, pairs=pairs))
            else:
                reply(result._replace(pairs=pairs))

        def parse(body: bytes) -> KvpReply | None:
            pair = kvp.parse_enumerate(body)
            return None if pair is None else KvpReply(ic.HV_S_OK, pairs=(pair,))

        self._exchange(pool, lambda: kvp.enumerate_body(pool, len(pairs)), took, parse, wanted)

    def ip_info(self, adapter: str | None, reply: OnReply, *, family: int = kvp.ADDR_FAMILY_NONE) -> None:
        """Addresses, subnets, gateways and name servers of an adapter, in `KvpReply.ip`.

        Linux knows the adapter by its MAC address, AA:BB:CC:DD:EE:FF in capitals, and
        answers E_FAIL when none has it. None, for want of a synthetic adapter: all
        addresses that KVP_POOL_AUTO tells, without the rest.
        """
        if adapter is None:
            self.enumerate(kvp.KVP_POOL_AUTO, lambda result: reply(_addresses(result)))
            return
        asked = IpInfo(adapter, family)

        def parse(body: bytes) -> KvpReply | None:
            info = kvp.parse_ip_info(body)
            return None if info is None else KvpReply(ic.HV_S_OK, ip=info)

        self._ip(kvp.KVP_OP_GET_IP_INFO, asked, reply, parse)

    def set_ip_info(self, info: IpInfo, reply: OnReply) -> None:
        """Configure an adapter: `adapter_id` is its device's instance, {GUID} in braces.

        Linux answers HV_GUID_NOTFOUND when no adapter has it, and runs the
        distribution's hv_set_ifconfig script.
        """
        self._ip(kvp.KVP_OP_SET_IP_INFO, info, reply, _done)

    def _ip(self, operation: int, info: IpInfo, reply: OnReply, parse: _Parse) -> None:
        version = self.message_version
        if version is not None and version < _IP_VERSION:
            note = f"the guest speaks {version[0]}.{version[1]}, and addresses need 4.0"
            reply(KvpReply(ic.HV_ERROR_NOT_SUPPORTED, note))
            return
        self._exchange(kvp.KVP_POOL_EXTERNAL, lambda: kvp.ip_info_body(operation, info), reply, parse)

    def _exchange(
        self,
        pool: int,
        build: Callable[[], bytes],
        reply: OnReply,
        parse: _Parse,
        wanted: Wanted | None = None,
    ) -> None:
        if not 0 <= pool < kvp.KVP_POOL_COUNT:
            reply(KvpReply(ic.HV_INVALIDARG, f"there is no pool {pool}"))
            return
        try:
            body = build()
        except ValueError as error:
            reply(KvpReply(ic.HV_INVALIDARG, str(error)))
            return
        if not self.ready_for_requests:
            reply(KvpReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED))
        elif not self.ask(ic.ICMSGTYPE_KVPEXCHANGE, body, self._answer(reply, parse), wanted):
            reply(KvpReply(ic.HV_ERROR_BUSY, "too much waits for the guest already"))

    def _answer(self, reply: OnReply, parse: _Parse) -> Reply:
        def answered(status: int, body: bytes) -> None:
            if not self.ready_for_requests:
                reply(KvpReply(ic.HV_ERROR_DEVICE_NOT_CONNECTED, "the guest left without an answer"))
            elif status != ic.HV_S_OK:
                reply(KvpReply(status, self.failure))
            else:
                reply(parse(body) or KvpReply(ic.HV_E_FAIL, f"its answer has {len(body)} bytes, too few"))

        return answered


_Parse = Callable[[bytes], "KvpReply | None"]


def _done(_body: bytes) -> KvpReply:
    return KvpReply(ic.HV_S_OK)


def _addresses(result: KvpReply) -> KvpReply:
    if not result.ok:
        return result
    facts = dict(result.pairs)
    found: list[str] = []
    for key in ("NetworkAddressIPv4", "NetworkAddressIPv6"):
        value = facts.get(key)
        if isinstance(value, str):
            found += [part for part in value.split(";") if part]
    return KvpReply(ic.HV_S_OK, result.note, ip=IpInfo(ip_addr=tuple(found)))
