"""Tap interfaces: one of the host's opened by name, one taken as an fd, one made for a run.

One that is made is not persistent: it goes with its fd, and its address and its place in a bridge with it,
however the process ends. Blocking calls, so before the machine runs or on a thread of their own. pyroute2 is
imported only where an interface is made.
"""

from __future__ import annotations

import _socket  # of `socket`, which takes milliseconds to import
import errno
import os
import stat
from fcntl import F_DUPFD_CLOEXEC, F_GETFL, F_SETFL, fcntl, ioctl

from hvkvm.abi import if_tun
from hvkvm.abi.virtio_net_hdr import VIRTIO_NET_HDR_BYTES
from hvkvm.errors import NO_FILE, ConfigError, HostExhausted, HvkvmError, exhausted
from hvkvm.net.port import MAX_MTU
from hvkvm.tuples import NamedTuple

TUN_PATH = "/dev/net/tun"
DEFAULT_MTU = 1500


class Tap(NamedTuple):
    """An open tap interface: `fd` is non-blocking, and the caller's to close."""

    fd: int
    name: str
    mtu: int
    vnet_header: bool
    more: tuple[int, ...] = ()
    """The fds of further queues, as `fd`."""


def open_tap(name: str, mtu: int | None = None, queues: int = 1) -> Tap:
    """The interface `name`, which is there. `mtu` overrides the one it has. ConfigError, HostExhausted.

    Up to `queues` of its queues, if it was made for several: as many as are free.
    """
    what = f"--net tap={name}"
    check_name(what, name)
    try:
        _socket.if_nametoindex(name)
    except OSError as error:
        raise refusal(
            what,
            error,
            f"no such interface; an administrator makes it by: ip tuntap add dev {name} mode tap"
            f" user {_user()} && ip link set {name} up",
        ) from None
    fd = open_tun(what)
    try:
        flags = if_tun.IFF_TAP | if_tun.IFF_NO_PI | if_tun.IFF_VNET_HDR
        try:
            set_interface(fd, name, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # One made for several queues takes no less.
            flags |= if_tun.IFF_MULTI_QUEUE
            set_interface(fd, name, flags)
        tap = prepared(fd, name, mtu or _mtu_of(name), vnet_header=True)
        return tap._replace(more=more_queues(name, flags, queues - 1))
    except OSError as error:
        os.close(fd)
        raise refusal(what, error, reason_of(error, name)) from None
    except BaseException:
        os.close(fd)
        raise


def take_fd(fd: int, mtu: int | None = None) -> Tap:
    """The tap interface open as `fd`, inherited say, by a duplicate. ConfigError, HostExhausted.

    `fd` stays the caller's, who may build another machine on it. It does not block any more, since the
    two share that, and programs that are run from here do not inherit it: one would keep the interface.
    """
    what = f"--net fd={fd}"
    try:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            raise ConfigError(f"{what}: is no tap interface; open one before hvkvm starts")
        request = bytearray(if_tun.ifreq_flags.size)
        ioctl(fd, if_tun.TUNGETIFF, request)
    except OSError as error:
        reason = "is not open" if error.errno == errno.EBADF else "is no tap interface"
        raise ConfigError(
            f"{what}: {reason}; open a tap before hvkvm starts, and let it inherit the fd"
        ) from None
    raw, flags = if_tun.ifreq_flags.unpack(request)
    name = raw.rstrip(b"\0").decode(errors="replace")
    if not flags & if_tun.IFF_TAP or not flags & if_tun.IFF_NO_PI:
        raise ConfigError(
            f"{what}: {name} is no tap without packet information; open it with IFF_TAP | IFF_NO_PI"
        )
    os.set_inheritable(fd, False)
    try:
        own = fcntl(fd, F_DUPFD_CLOEXEC, 3)
    except OSError as error:
        raise refusal(what, error, f"{error.strerror}; open a tap before hvkvm starts") from None
    try:
        return prepared(own, name, mtu or _mtu_of(name), vnet_header=bool(flags & if_tun.IFF_VNET_HDR))
    except BaseException:
        os.close(own)
        raise


def set_interface(fd: int, name: str, flags: int) -> str:
    """TUNSETIFF: make `fd` that of interface `name`, which may hold %d; the name it has got. OSError."""
    request = bytearray(if_tun.ifreq_flags.pack(name.encode(), flags - 0x10000 if flags & 0x8000 else flags))
    ioctl(fd, if_tun.TUNSETIFF, request)
    raw, _flags = if_tun.ifreq_flags.unpack(request)
    return str(raw.rstrip(b"\0").decode())


def more_queues(name: str, flags: int, count: int) -> tuple[int, ...]:
    """The fds of up to `count` further queues of `name`, if `flags` say that it has several.

    Fewer if the interface has no more. In its network namespace. ConfigError, HostExhausted, and then none
    is open: each would keep the interface alive.
    """
    fds: list[int] = []
    try:
        while flags & if_tun.IFF_MULTI_QUEUE and len(fds) < count:
            fds.append(open_tun(f"--net tap={name}"))
            try:
                set_interface(fds[-1], name, flags & ~if_tun.IFF_TUN_EXCL)
            except OSError:
                os.close(fds.pop())
                break
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return tuple(fds)


def open_tun(what: str) -> int:
    """An fd that is to be an interface's. ConfigError, HostExhausted."""
    try:
        return os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        remedy = {
            errno.ENOENT: f"load the module by: modprobe tun; in a container also pass {TUN_PATH} in",
            errno.ENODEV: "load the module by: modprobe tun",
        }.get(error.errno or 0, f"an administrator permits it by: chmod 0666 {TUN_PATH}")
        why = f"{TUN_PATH}: {error.strerror}; {remedy}, or use --net user"
        raise refusal(what, error, why) from None


def prepared(fd: int, name: str, mtu: int, *, vnet_header: bool) -> Tap:
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | os.O_NONBLOCK)
    if vnet_header:
        ioctl(fd, if_tun.TUNSETVNETHDRSZ, VIRTIO_NET_HDR_BYTES.to_bytes(4, "little"))
        ioctl(fd, if_tun.TUNSETVNETLE, (1).to_bytes(4, "little"))
        # A former user's choice stays with a persistent interface.
        ioctl(fd, if_tun.TUNSETOFFLOAD, 0)
    return Tap(fd, name, min(mtu, MAX_MTU), vnet_header)


def _mtu_of(name: str) -> int:
    """The MTU of an interface of this network namespace; 1500 for one elsewhere."""
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    request = bytearray(if_tun.ifreq_int.pack(name.encode(), 0))
    try:
        ioctl(probe.fileno(), if_tun.SIOCGIFMTU, request)
    except OSError:
        return DEFAULT_MTU
    finally:
        probe.close()
    return int(if_tun.ifreq_int.unpack(request)[1])


def check_name(what: str, name: str) -> None:
    """ConfigError unless `name` can be an interface's."""
    bad = not 0 < len(os.fsencode(name)) < if_tun.IFNAMSIZ or name in (".", "..")
    if bad or "%" in name or any(c in "/:" or c.isspace() or not c.isprintable() for c in name):
        raise ConfigError(f"{what}: not an interface's name; it has 1 to 15 characters, no / : % or blank")


def refusal(what: str, error: OSError, why: str) -> HvkvmError:
    """What to raise of `what`: `why` says what is behind an error, if not a host without files or memory."""
    if error.errno in NO_FILE:
        return HostExhausted(f"{what}: {exhausted(error)}")
    return ConfigError(f"{what}: {why}")


def reason_of(error: OSError, name: str) -> str:
    """Why an interface could not be had, and the remedy."""
    if error.errno == errno.EBUSY:
        return "another program has it; end that, or name another interface"
    if error.errno in (errno.EPERM, errno.EACCES):
        return (
            f"{error.strerror}; an administrator makes one for you by: ip tuntap add dev {name} mode tap"
            f" user {_user()} && ip link set {name} up; or use --net user, which needs no permission"
        )
    if error.errno == errno.EINVAL:
        return "is no tap interface; name another"
    return f"{error.strerror}; name another interface"


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
