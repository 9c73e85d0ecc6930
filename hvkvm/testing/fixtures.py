"""The plugin's fixtures, options and marker: guests for tests.

`@pytest.mark.hvkvm(synic=[...], cpus=[...], kernels="all", seconds=...)` has a test
run once for each of the values, and bounds its waits. See docs/testing.md.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pytest

from hvkvm.errors import ConfigError
from hvkvm.testing.ended_tests import GUESTS, close_all

if TYPE_CHECKING:
    import subprocess

    from hvkvm.machine.disk_spec import DiskSpec
    from hvkvm.machine.nic_spec import NicSpec
    from hvkvm.testing.device import ScriptedDevice
    from hvkvm.testing.guest import Guest
    from hvkvm.testing.kernels import GuestKernel
    from hvkvm.testing.linux import LinuxGuest
    from hvkvm.testing.micro import MicroGuest

MARKER = "hvkvm"
SYNICS = ("auto", "kernel", "user")


class _Keyword(NamedTuple):
    takes: str
    fits: Callable[[Any], bool]
    """Whether a value, or each of a list, is one of those."""


_KNOWN = {
    "synic": _Keyword('"kernel" and "user"', lambda value: value in SYNICS),
    "cpus": _Keyword("numbers, in a list or one", lambda value: type(value) is int and value > 0),
    "kernels": _Keyword('"all"', lambda value: value == "all"),
    "seconds": _Keyword("a number above 0", lambda value: type(value) in (int, float) and value > 0),
}
G = TypeVar("G", bound="Guest")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of guests in tests."""
    group = parser.getgroup("hvkvm", "guests on KVM")
    group.addoption(
        "--hvkvm-kernels",
        metavar="FILE,...",
        default="",
        help="the Linux kernels of linux_guest: files, or folders with one; a test marked"
        " hvkvm(kernels='all') runs on each, the others on the first",
    )
    group.addoption(
        "--hvkvm-synic",
        choices=SYNICS,
        default=os.environ.get("HVKVM_SYNIC") or "auto",
        help="who emulates Hyper-V for guests of tests that do not say (auto)",
    )
    group.addoption(
        "--hvkvm-seconds",
        type=float,
        metavar="SECONDS",
        default=None,
        help="how long a test waits for its guest, where it does not say; for slow hosts",
    )
    group.addoption(
        "--hvkvm-keep",
        action="store_true",
        help="leave the guest of a failed test running, for `hvkvm ctl`, until it is ended",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker, and refuse what cannot be."""
    config.addinivalue_line(
        "markers",
        "hvkvm(synic=, cpus=, kernels=, seconds=): once for each SynIC ('kernel', 'user') and number of vCPUs"
        " that is listed, on all of --hvkvm-kernels with kernels='all'; seconds bounds waits for guests",
    )
    workers = getattr(config.option, "numprocesses", None)
    _named_kernels(config)
    if (synic := config.getoption("--hvkvm-synic")) not in SYNICS:  # of the environment: no parser saw it
        raise pytest.UsageError(f"HVKVM_SYNIC={synic}: no such SynIC; choose {', '.join(SYNICS)}")
    if config.getoption("--hvkvm-keep") and (workers or hasattr(config, "workerinput")):
        raise pytest.UsageError("--hvkvm-keep: one failed test holds the session up; leave -n out")


def _marked(node: pytest.Item) -> dict[str, Any]:
    """The keywords of the test's markers; those that are nearest to it win."""
    found: dict[str, Any] = {}
    for mark in node.iter_markers(MARKER):
        if mark.args or set(mark.kwargs) - set(_KNOWN):
            raise pytest.Collector.CollectError(
                f"{node.nodeid}: mark.hvkvm takes {', '.join(sorted(_KNOWN))} only"
            )
        for key, value in mark.kwargs.items():
            if not all(map(_KNOWN[key].fits, _listed(value) if key in ("synic", "cpus") else [value])):
                raise pytest.Collector.CollectError(
                    f"{node.nodeid}: mark.hvkvm({key}={value!r}): it takes {_KNOWN[key].takes}"
                )
        found = {**mark.kwargs, **found}
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each value that its marker lists."""
    marked = _marked(metafunc.definition)
    for key, fixture in (("synic", "hvkvm_synic"), ("cpus", "hvkvm_cpus")):
        if key in marked and fixture in metafunc.fixturenames:
            values = _listed(marked[key])
            metafunc.parametrize(fixture, values, indirect=True, ids=[f"{key}={value}" for value in values])
    if marked.get("kernels") == "all" and "hvkvm_kernel" in metafunc.fixturenames:
        try:
            kernels = _kernels(metafunc.config)
        except ConfigError:
            kernels = []  # the fixture says why, of this test alone
        if kernels:
            metafunc.parametrize(
                "hvkvm_kernel", kernels, indirect=True, ids=[kernel.name for kernel in kernels]
            )


def _named_kernels(config: pytest.Config) -> list[GuestKernel]:
    """What --hvkvm-kernels names. pytest.UsageError."""
    from hvkvm.testing import kernels

    try:
        return kernels.from_option(config.getoption("--hvkvm-kernels"))
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from None


def _kernels(config: pytest.Config) -> list[GuestKernel]:
    """Those that are named, or the one that is found. ConfigError."""
    from hvkvm.testing import kernels

    named = _named_kernels(config)
    if named:
        return named
    found = kernels.find()
    return [] if found is None else [found]


def synic_of(item: pytest.Item) -> str:
    """Who emulates Hyper-V for the guests of a collected test."""
    callspec = getattr(item, "callspec", None)
    given = None if callspec is None else callspec.params.get("hvkvm_synic")
    return str(given or item.config.getoption("--hvkvm-synic"))


@pytest.fixture
def hvkvm_synic(request: pytest.FixtureRequest) -> str:
    """Who emulates Hyper-V for the test's guests: "auto", "kernel" or "user"."""
    from hvkvm.testing.tiers import need

    synic = synic_of(request.node)
    need("hyperv" if synic == "kernel" else "kvm")
    return synic


@pytest.fixture
def hvkvm_cpus(request: pytest.FixtureRequest) -> int:
    """How many vCPUs the test's guests have."""
    return int(getattr(request, "param", 1))


@pytest.fixture
def hvkvm_kernel(request: pytest.FixtureRequest) -> GuestKernel:
    """The Linux kernel that the test's guests boot; skips where none is found."""
    from hvkvm.testing.kernels import REMEDY

    try:
        found = [request.param] if hasattr(request, "param") else _kernels(request.config)
    except ConfigError as error:
        pytest.fail(str(error), pytrace=False)
    if not found:
        pytest.skip(f"no guest kernel: {REMEDY}")
    kernel: GuestKernel = found[0]
    return kernel


class _Maker:
    """Makes guests for one test, and closes them behind it."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self._marked = _marked(request.node)
        self.guests: list[Guest] = request.node.stash.setdefault(GUESTS, [])

    def settings(self, given: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """What the marker and the options say, where the test itself does not."""
        config = self._request.config
        limit = self._marked.get("seconds") or config.getoption("--hvkvm-seconds") or seconds
        found: dict[str, Any] = {"seconds": float(limit)}
        if config.getoption("--hvkvm-keep"):
            found["control"] = "auto"
            found["name"] = f"test-{os.getpid()}-{len(self.guests)}"
        return {**found, **given}

    def keep(self, guest: G) -> G:
        """Have the guest shown if the test fails, and closed."""
        from hvkvm.testing.report import properties

        self.guests.append(guest)
        self._request.node.user_properties.extend(
            entry for entry in properties(guest).items() if entry not in self._request.node.user_properties
        )
        return guest


@pytest.fixture
def hvkvm_guests(request: pytest.FixtureRequest) -> Iterator[_Maker]:
    """For the fixtures that make guests; closes them behind the test."""
    maker = _Maker(request)
    yield maker
    close_all(maker.guests)


@pytest.fixture
def micro_guest(hvkvm_guests: _Maker, hvkvm_synic: str, hvkvm_cpus: int) -> Callable[..., MicroGuest]:
    """`micro_guest(text, **config)`: a guest of some lines of assembly, on any KVM.

    `config` are MicroGuest's: `seconds`, and fields of MachineConfig such as `hv`.
    """

    def make(source: str | Path, **config: Any) -> MicroGuest:
        from hvkvm.testing.micro import MicroGuest

        settings = {"synic": hvkvm_synic, "cpus": hvkvm_cpus, **hvkvm_guests.settings(config, 30.0)}
        return hvkvm_guests.keep(MicroGuest(source, **settings))

    return make


@pytest.fixture
def linux_guest(
    hvkvm_guests: _Maker, hvkvm_synic: str, hvkvm_cpus: int, hvkvm_kernel: GuestKernel
) -> Callable[..., LinuxGuest]:
    """`linux_guest("uname", "-r", modules=[...], **config)`: a Linux guest that runs one command.

    One word with spaces is a shell's. The keywords are LinuxGuest's.
    """

    def make(*command: str, modules: Sequence[str] = (), **config: Any) -> LinuxGuest:
        from hvkvm.testing.linux import LinuxGuest

        words = ("sh", "-c", command[0]) if len(command) == 1 and " " in command[0] else command
        settings = {
            "synic": hvkvm_synic,
            "cpus": hvkvm_cpus,
            "kernel": hvkvm_kernel,
            **hvkvm_guests.settings(config, 300.0),
        }
        return hvkvm_guests.keep(LinuxGuest(words, modules=modules, **settings))

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., DiskSpec]:
    """`disk("64M", content=b"", faults="TOML", **keys)`: a raw image, for `linux_guest(disks=[...])`.

    `keys` are those of `--disk`, such as `readonly=True`; `file` names an image that is there.
    """
    # What the test itself has put there is left alone.
    pairs = ((tmp_path / f"disk{n}.raw", tmp_path / f"faults{n}.toml") for n in itertools.count())

    def make(size: str = "64M", *, content: bytes = b"", faults: str = "", **keys: Any) -> DiskSpec:
        from hvkvm.machine.config_kinds import parse_size
        from hvkvm.machine.disk_spec import DiskSpec

        image, plan = next(pair for pair in pairs if not any(map(os.path.lexists, pair)))
        if "file" not in keys:
            image.write_bytes(content)
            os.truncate(image, max(parse_size(size, "disk size"), len(content)))
            keys["file"] = image
        keys["file"] = str(keys["file"])
        if faults:
            plan.write_text(faults)
            keys["faults"] = plan
        return DiskSpec(**keys)

    return make


@pytest.fixture
def net() -> Callable[[str], NicSpec]:
    """`net("user,loss=5%")`: a NIC and its wire, as behind `--net`, for `linux_guest(nets=[...])`."""

    def make(words: str) -> NicSpec:
        from hvkvm.machine.config_words import parse_words
        from hvkvm.machine.nic_spec import NicSpec

        spec: NicSpec = parse_words(NicSpec, "net", words)
        return spec

    return make


@pytest.fixture
def vm_pair(
    linux_guest: Callable[..., LinuxGuest], net: Callable[[str], NicSpec]
) -> Iterator[Callable[..., tuple[LinuxGuest, LinuxGuest]]]:
    """`vm_pair("script", "script", wire="loss=5%")`: two Linux guests with a wire between them.

    They are 192.0.2.1 and 192.0.2.2 on eth0, whose link is up when their scripts begin.
    The other keywords are linux_guest's.
    """

    # Not tmp_path: a socket's path has 107 bytes at most.
    folder = tempfile.TemporaryDirectory(prefix="hvkvm-wire-")
    numbers = itertools.count()

    def make(first: str, second: str, *, wire: str = "", **config: Any) -> tuple[LinuxGuest, LinuxGuest]:
        path = Path(folder.name) / str(next(numbers))
        guests = []
        for number, (script, end) in enumerate(((first, "listen"), (second, "socket")), 1):
            words = f"{end}={str(path).replace(',', ',,')}" + (f",{wire}" if wire and number == 1 else "")
            there = "until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done\n"
            up = f"ip addr add 192.0.2.{number}/24 dev eth0; ip link set eth0 up\n"
            wait = "until grep -q 1 /sys/class/net/eth0/carrier; do sleep 0.1; done\n"
            nets = [net(words)]
            guests.append(linux_guest("sh", "-c", f"{there}{up}{wait}{script}", nets=nets, **config))
        return guests[0], guests[1]

    yield make
    folder.cleanup()


@pytest.fixture
def vmbus_device() -> Callable[..., ScriptedDevice]:
    """`vmbus_device(interface, **options)`: a VMBus device whose host side the test plays itself.

    `interface` is a GUID; the options are ScriptedDevice's. `offer(guest)` shows it to a guest.
    """

    def make(interface: str | bytes, **options: Any) -> ScriptedDevice:
        from hvkvm.testing.device import ScriptedDevice

        return ScriptedDevice(interface, **options)

    return make


@pytest.fixture
def lab() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`lab("hvkvm", "doctor", seconds=600)`: a command where KVM has Hyper-V, here or in a nested lab.

    Gives its status and streams, as subprocess.run does; see `lab.run`.
    """
    from hvkvm.testing import lab as module

    return module.run
