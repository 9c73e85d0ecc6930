"""A tap interface made for one run, as the user wants it: MTU, addresses, bridge, network namespace.

Not persistent: when the process ends, however it does, Linux takes the interface away, and with it its
addresses and its place in the bridge. Namespace and bridge are the user's, and are not made here. Blocking;
it works in a thread of its own, because a network namespace is a thread's. Needs pyroute2 and CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from hvkvm.abi import if_tun
from hvkvm.errors import ConfigError
from hvkvm.net.tap_open import (
    DEFAULT_MTU,
    Tap,
    check_name,
    more_queues,
    open_tun,
    prepared,
    refusal,
    set_interface,
)
from hvkvm.runtime.thread_start import start_thread
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from pyroute2 import IPRoute

NAMES = "hvkvm%d"
"""Linux puts the lowest free number in."""


class NewTap(NamedTuple):
    """`addresses` are the host's, such as "192.0.2.1/24". `netns` is a name of `ip netns` or a path.

    `mac` is the interface's own; Linux chooses one for "".
    """

    name: str = ""
    mtu: int = DEFAULT_MTU
    addresses: tuple[str, ...] = ()
    bridge: str = ""
    netns: str = ""
    queues: int = 1
    mac: str = ""


def host_mac(guest: str) -> str:
    """The MAC of the interface whose guest has `guest`.

    The same whenever that guest runs, so that what it knows of its neighbour still holds in a restored one.
    The first byte is libvirt's: a bridge takes the lowest MAC of its ports for its own, and so none of these.
    """
    return f"{'fa' if guest[:2].lower() == 'fe' else 'fe'}{guest[2:]}"


def make_tap(wanted: NewTap) -> Tap:
    """Make it and bring it up. ConfigError, HostExhausted, and then nothing is left."""
    results: list[Tap] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(_make(wanted))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="make-tap")
    start_thread(thread)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _make(wanted: NewTap) -> Tap:
    what = "--net create" + (f"={wanted.name}" if wanted.name else "")
    try:
        from pyroute2 import IPRoute, NetlinkError
        from pyroute2.netns import setns
    except ImportError:
        raise ConfigError(f"{what}: needs pyroute2; install it by: pip install 'hvkvm[net]'") from None
    if wanted.name:
        check_name(what, wanted.name)
    if wanted.netns:
        try:
            setns(wanted.netns, flags=os.O_CLOEXEC)
        except OSError as error:
            remedy = (
                "needs CAP_SYS_ADMIN; run as root"
                if error.errno == errno.EPERM
                else f"an administrator makes it by: ip netns add {wanted.netns}"
            )
            where = f"network namespace {wanted.netns}"
            raise refusal(f"{what}: {where}", error, f"{error.strerror}; {remedy}") from None
    fd = open_tun(what)
    try:
        flags = if_tun.IFF_TAP | if_tun.IFF_NO_PI | if_tun.IFF_VNET_HDR | if_tun.IFF_TUN_EXCL
        flags |= if_tun.IFF_MULTI_QUEUE if wanted.queues > 1 else 0
        try:
            name = set_interface(fd, wanted.name or NAMES, flags)
        except OSError as error:
            raise refusal(what, error, _why_not_made(error)) from None
        try:
            with IPRoute() as ip:
                _set_up(ip, what, name, wanted)
        except NetlinkError as error:
            reason = error.args[1] if len(error.args) > 1 else str(error)
            raise ConfigError(f"{what}: {name}: {reason}; check mtu=, ip= and bridge=") from None
        tap = prepared(fd, name, wanted.mtu, vnet_header=True)
        return tap._replace(more=more_queues(name, flags, wanted.queues - 1))
    except BaseException:
        os.close(fd)
        raise


def _set_up(ip: IPRoute, what: str, name: str, wanted: NewTap) -> None:
    index = ip.link_lookup(ifname=name)[0]
    ip.link("set", index=index, mtu=wanted.mtu)
    if wanted.mac:
        ip.link("set", index=index, address=wanted.mac)
    if wanted.bridge:
        bridges = ip.link_lookup(ifname=wanted.bridge, kind="bridge")
        if not bridges:
            raise ConfigError(
                f"{what}: no bridge {wanted.bridge}; an administrator makes it by:"
                f" ip link add {wanted.bridge} type bridge && ip link set {wanted.bridge} up"
            )
        ip.link("set", index=index, master=bridges[0])
    for address in wanted.addresses:
        host, _slash, length = address.partition("/")
        ip.addr("add", index=index, address=host, prefixlen=int(length))
    ip.link("set", index=index, state="up")


def _why_not_made(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        from hvkvm.net.tap_open import reason_of

        return f"needs CAP_NET_ADMIN: {reason_of(error, 'tap0')}"
    if error.errno in (errno.EBUSY, errno.EEXIST):
        return "an interface of that name is there; use tap=NAME for it, or name another"
    return f"{error.strerror}; name another interface"
