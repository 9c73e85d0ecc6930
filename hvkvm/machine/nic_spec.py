"""What `--net` says, and the same in TOML: a NIC, and what its wire leads to."""

# No `from __future__ import annotations`: the annotations are the table, and read at run time.

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from hvkvm.errors import ConfigError
from hvkvm.machine.config_fields import Field
from hvkvm.machine.config_kinds import Choice, Kind, Number, PathName, Words, check_range, said
from hvkvm.net.port import MAX_MTU, MAX_QUEUES, MIN_MTU
from hvkvm.tuples import NamedTuple

BACKENDS = ("user", "create")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)
_FORWARD = re.compile(
    r"(?:(?P<protocol>tcp|udp):)?(?:(?P<host>[^\[\]:]*|\[[^\[\]]*\]):)?(?P<port>\d{1,5})"
    r"-(?:[^\[\]:]*:|\[[^\[\]]*\]:)?(?P<guest>\d{1,5})"
)
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Share(Kind):
    """A float from 0 to 1, which text may give in percent."""

    takes = 'a number such as 0.01, or "1%"'
    types = (int, float)

    def from_text(self, name: str, text: str, folder: Path | None = None) -> float:
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            raise ConfigError(f"{said(name, text)}: no share; write 0.01 or 1%") from None

    def from_plain(self, name: str, value: object, folder: Path | None) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_range(name, value)
            return float(value)
        return float(super().from_plain(name, value, folder))

    def check(self, name: str, value: float) -> None:
        if not 0 <= value <= 1:
            raise ConfigError(f"{said(name, value)}: not between 0 and 1; write 0.01 or 1%")


class Time(Kind):
    """A float, of seconds; text has the unit: us, ms or s."""

    takes = 'text with its unit, such as "20ms"'
    types = (int, float)

    def from_text(self, name: str, text: str, folder: Path | None = None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text, re.ASCII)
        if found is None:
            raise ConfigError(f"{said(name, text)}: no time; write one with its unit, such as 20ms")
        return float(found[1]) * _TIMES[found[2]]

    def check(self, name: str, value: float) -> None:
        if not 0 <= value <= 3600:
            raise ConfigError(f"{said(name, value)}: not between 0 and 3600 s; write one such as 20ms")


def check_mac(name: str, value: str) -> None:
    """ConfigError for what no NIC can have; "" stands for one by the VM's name."""
    if value and not _MAC.fullmatch(value):
        raise ConfigError(f"{said(name, value)}: no MAC address; write one such as 02:00:00:00:00:01")
    if value and int(value[:2], 16) & 1:
        raise ConfigError(f"{said(name, value)}: a multicast address; make its first number even")


def _between(least: int, most: int) -> Callable[[str, int], None]:
    def check(name: str, value: int) -> None:
        if value != -1 and not least <= value <= most:
            raise ConfigError(f"{said(name, value)}: not between {least} and {most}; choose one of them")

    return check


def check_forwards(name: str, value: tuple[str, ...]) -> None:
    """ConfigError for what `forwards_of` could not read."""
    for text in value:
        found = _FORWARD.fullmatch(text)
        if found is None or not all(0 < int(found[key]) < 65536 for key in ("port", "guest")):
            raise ConfigError(
                f"{said(name, text)}: no forward; write [HOST:]PORT-[GUEST:]PORT, such as 2222-22"
            )
        if found["host"]:
            _check_address(name, text, found["host"].strip("[]"))


def check_addresses(name: str, value: tuple[str, ...]) -> None:
    """ConfigError for what is no address with the length of its prefix."""
    for text in value:
        if "/" not in text:
            raise ConfigError(f"{said(name, text)}: has no length; write one such as 192.0.2.1/24")
        try:
            ipaddress.ip_interface(text)
        except ValueError:
            raise ConfigError(f"{said(name, text)}: no address; write one such as 192.0.2.1/24") from None


def _check_address(name: str, text: str, address: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(
            f"{said(name, text)}: {address} is no address; write one such as 127.0.0.1"
        ) from None


class NicSpec(NamedTuple):
    """A NIC, and its wire: `backend` or one of `tap`, `fd`, `socket` and `listen`."""

    backend: Annotated[
        str,
        Field(Choice(("", *BACKENDS)), "user|create", "passt's user-mode network, or a tap made for the run"),
    ] = ""
    tap: Annotated[str, Field(Kind(), "NAME", "a tap interface that is there")] = ""
    fd: Annotated[int, Field(Number(3), "N", "a tap interface open as this fd", _between(0, 1 << 20))] = -1
    socket: Annotated[
        Path | None, Field(PathName(), "PATH", "frames over a Unix socket at which another VMM listens")
    ] = None
    listen: Annotated[Path | None, Field(PathName(), "PATH", "the same, and we listen")] = None
    name: Annotated[str, Field(Kind(), "NAME", "create: the interface (hvkvm0 or the next free one)")] = ""
    bridge: Annotated[str, Field(Kind(), "NAME", "create: put it into this bridge")] = ""
    ip: Annotated[
        tuple[str, ...],
        Field(Words(), "ADDRESS/LENGTH", "create: the host's end has this address", check_addresses),
    ] = ()
    netns: Annotated[str, Field(Kind(), "NAME", "create: in this network namespace")] = ""
    forward: Annotated[
        tuple[str, ...],
        Field(
            Words(),
            "[tcp:|udp:][HOST:]PORT-[GUEST:]PORT",
            "user: lead a port of the host (127.0.0.1) to one of the guest",
            check_forwards,
        ),
    ] = ()
    mac: Annotated[str, Field(Kind(), "MAC", "the NIC's address (made from the VM's name)", check_mac)] = ""
    mtu: Annotated[
        int, Field(Number(9000), "N", "longest IP packet that the wire carries", _between(MIN_MTU, MAX_MTU))
    ] = -1
    queues: Annotated[
        int, Field(Number(4), "N", "most channels (as many as vCPUs, up to 8)", _between(1, MAX_QUEUES))
    ] = -1
    pcap: Annotated[Path | None, Field(PathName(), "FILE", "write all frames to a pcapng file")] = None
    loss: Annotated[float, Field(Share(), "SHARE", "lose this share of the frames, each way")] = 0.0
    corrupt: Annotated[float, Field(Share(), "SHARE", "flip a bit")] = 0.0
    duplicate: Annotated[float, Field(Share(), "SHARE", "deliver twice")] = 0.0
    reorder: Annotated[float, Field(Share(), "SHARE", "deliver behind those that follow")] = 0.0
    delay: Annotated[float, Field(Time(), "TIME", "deliver so much later")] = 0.0
    jitter: Annotated[float, Field(Time(), "TIME", "and up to so much more")] = 0.0
    flap: Annotated[float, Field(Time(), "TIME", "have the link go down and up about so often")] = 0.0
    seed: Annotated[int, Field(Number(1), "N", "of the faults' random numbers (0)", _between(0, 1 << 32))] = 0

    def check(self, name: str) -> None:
        """Raise ConfigError for values that do not go together."""
        wires = [
            key for key in ("backend", "tap", "fd", "socket", "listen") if getattr(self, key) != _default(key)
        ]
        if len(wires) != 1:
            what = " and ".join(wires) or "nothing"
            raise ConfigError(
                f"{name}: has to lead to one thing, and {what} is given; choose"
                " user, create, tap=NAME, fd=N, socket=PATH or listen=PATH"
            )
        for backend, keys in (("create", ("name", "bridge", "ip", "netns")), ("user", ("forward",))):
            for key in keys:
                if self.backend != backend and getattr(self, key) != _default(key):
                    raise ConfigError(f"{name} {key}=: goes with {backend} alone; leave it out")

    @property
    def text(self) -> str:
        """As it is written behind --net, without what is as by default."""
        words = []
        for key, value in self._asdict().items():
            if value == _default(key):
                continue
            for one in value if isinstance(value, tuple) else (value,):
                shown = f"{one:.9f}".rstrip("0").rstrip(".") + "s" if key in _TIME_KEYS else str(one)
                words.append(f"{key}={shown}".replace(",", ",,"))
        return ",".join(words).removeprefix("backend=")

    @property
    def has_faults(self) -> bool:
        """Whether the wire is to be a faulty one."""
        return any(getattr(self, key) for key in FAULTS)


FAULTS = ("loss", "corrupt", "duplicate", "reorder", "delay", "jitter", "flap")
_TIME_KEYS = ("delay", "jitter", "flap")


def _default(key: str) -> object:
    return NicSpec._field_defaults[key]


def forwards_of(spec: NicSpec) -> list[tuple[str, str, int, int]]:
    """Each of `spec.forward` as protocol, the host's address, its port, the guest's port."""
    read = []
    for text in spec.forward:
        found = _FORWARD.fullmatch(text)
        if found is not None:
            host = "127.0.0.1" if found["host"] is None else found["host"].strip("[]")
            read.append((found["protocol"] or "tcp", host, int(found["port"]), int(found["guest"])))
    return read
