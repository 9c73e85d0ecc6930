"""The machine's NICs: a wire opened for each, a netvsp on the VMBus, and the port between them.

A `part.Part`, which stops before the bus: a stopped machine's wires give no frames. Wires are opened when
the machine is made, or, for one that is added later, on a thread of its own, since that may take a while; all
that was made on the host for one goes with it. A saved machine has for each NIC what `--net` said; who
restores it may say other wires, for the same NICs.

Owner: the I/O loop; whoever makes the machine before that. `inspect` any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hvkvm.errors import ConfigError, StateError
from hvkvm.runtime.guard import call_all
from hvkvm.tuples import NamedTuple

if TYPE_CHECKING:
    from hvkvm.devices.synth.netvsp import Netvsp
    from hvkvm.machine.bus import Bus
    from hvkvm.machine.nic_leaving import Leaving
    from hvkvm.machine.nic_spec import NicSpec
    from hvkvm.machine.platform import Platform
    from hvkvm.net.wire import Wire
    from hvkvm.state.file import Saved

MAX_NICS = 64


class SavedNic(NamedTuple):
    """A NIC of a saved machine: its name on the bus, its MAC, most queues, and the words behind --net."""

    name: str
    mac: str
    queues: int
    words: str


class NicsState(NamedTuple):
    """In the order in which they were added. What each has agreed on with its guest is in the bus's state."""

    nics: tuple[SavedNic, ...]


class Nic(NamedTuple):
    """One that is there."""

    name: str
    spec: NicSpec
    device: Netvsp
    wire: Wire


class Nics:
    """ConfigError for wires that cannot be had. `vm_name` is what MAC addresses are made from."""

    name = "network"
    State = NicsState

    def __init__(
        self, platform: Platform, bus: Bus, vm_name: str, stack: ExitStack, saved: Saved | None = None
    ) -> None:
        self._platform = platform
        self._bus = bus
        self._vm_name = vm_name
        self._running = False
        self.nics: dict[str, Nic] = {}
        """By name: net0, net1, ..."""
        self.leaving: dict[str, Leaving] = {}
        """Of those that are being taken away."""
        self._gone: set[Wire] = set()  # of NICs that the bus lets go of
        stack.callback(self.close)
        specs = platform.config.nets
        # A saved guest knows each by what comes from its name, and one that was removed left a gap.
        names = [""] * len(specs) if saved is None else [nic.name for nic in saved_nics(saved)]
        for spec, name in zip(specs, names, strict=False):
            self._make(spec, name)
        self._new = specs[len(names) :]
        """Those that a saved machine gets besides its own, once it has been loaded."""

    # Adding and removing.

    def _make(self, spec: NicSpec, name: str = "") -> None:
        addressed = self.addressed(spec)
        self.add(addressed, self.open(addressed), name)

    def addressed(self, spec: NicSpec) -> NicSpec:
        """`spec` with a MAC: its own, or one for the next NIC, the same at each run of a VM with a name."""
        from hvkvm.devices.synth.netvsp import address_of

        if spec.mac:
            return spec
        taken = {nic.spec.mac for nic in self.nics.values()}
        made = (
            address_of(self._vm_name, number).hex(":") for number in range(self._number(), 2 * MAX_NICS + 1)
        )
        return spec._replace(mac=next(mac for mac in made if mac not in taken))

    def _number(self) -> int:
        return next(n for n in range(MAX_NICS + 1) if f"net{n}" not in self.nics)

    def open(self, spec: NicSpec) -> Wire:
        """The wire that `spec` asks for. ConfigError. Any thread; may block."""
        from hvkvm.machine.nic_wires import open_wire

        return open_wire(self._platform.io, spec._replace(queues=self._queues(spec)), self._platform.observer)

    def _queues(self, spec: NicSpec) -> int:
        """Most channels of a NIC, and queues of its wire: one a vCPU, unless `spec` says how many."""
        from hvkvm.net.port import MAX_QUEUES

        return spec.queues if spec.queues > 0 else min(self._platform.config.cpus, MAX_QUEUES)

    def add(self, spec: NicSpec, wire: Wire, name: str = "") -> Nic:
        """Give the guest a NIC on `wire`, by the first free one of net0, net1, ..., or as `name` says.

        ConfigError when it cannot be, and then the wire is closed.
        """
        from hvkvm.devices.synth.netvsp import Netvsp

        number = self._number()
        if number == MAX_NICS:
            wire.close()
            raise ConfigError(f"--net: a VM has up to {MAX_NICS} NICs; remove one")
        name = name or f"net{number}"
        spec = self.addressed(spec)
        mac = bytes.fromhex(spec.mac.replace(":", ""))
        queues = self._queues(spec)
        try:
            device = Netvsp(
                self._platform.memory,
                wire,
                name=name,
                address=mac,
                queues=queues,
                later=self._platform.io.call_later,
            )
            wire.attach(device)
            self._bus.add(name, device)
        except BaseException:
            wire.close()
            raise
        nic = self.nics[name] = Nic(name, spec._replace(mac=mac.hex(":"), queues=queues), device, wire)
        if self._running:
            wire.start()
        return nic

    def remove(self, name: str, done: Callable[[], object] = lambda: None) -> None:
        """Take a NIC from the guest, and its wire from the host; `done()` when both are gone. KeyError.

        It is there until its guest has let go, or for as long as `nic_leaving` waits, and while the machine
        rests. May be asked again.
        """
        from hvkvm.machine.nic_leaving import Leaving

        nic = self.nics[name]
        if name in self.leaving:
            self.leaving[name].waiting.append(done)
            return

        def gone() -> None:
            self._gone.discard(nic.wire)
            nic.wire.close()
            nic.wire.when_closed(lambda: call_all(leaving.waiting))

        def left() -> None:
            del self.nics[name], self.leaving[name]
            self._gone.add(nic.wire)
            self._bus.remove(name, gone)

        leaving = Leaving(nic.device, self._platform.io, left, resting=not self._running)
        leaving.waiting.append(done)
        self.leaving[name] = leaving
        nic.wire.stop(leaving.begin)

    # machine.part.Part

    def start(self) -> None:
        """See `Part.start`."""
        self._running = True
        for name, nic in self.nics.items():
            if name not in self.leaving:
                nic.wire.start()
        for leaving in list(self.leaving.values()):
            leaving.go_on()

    def stop(self, done: Callable[[], object]) -> None:
        """See `Part.stop`."""
        self._running = False
        for leaving in self.leaving.values():
            leaving.rest()
        left = list(self.nics.values())

        def next_one() -> None:
            if left:
                left.pop().wire.stop(next_one)
            else:
                done()

        next_one()

    def reset(self) -> None:
        """See `Part.reset`: the NICs themselves are the bus's."""

    def save(self) -> NicsState:
        """See `Part.save`."""
        return NicsState(
            tuple(
                SavedNic(nic.name, nic.spec.mac, nic.spec.queues, _words_to_keep(nic.spec))
                for nic in self.nics.values()
            )
        )

    def load(self, state: NicsState) -> None:
        """See `Part.load`. What `specs_to_restore` gave is here, so that there is nothing more to do."""
        here, saved = [nic.name for nic in self.nics.values()], [nic.name for nic in state.nics]
        if here != saved:
            raise StateError(f"{self.name}: it has the NICs {saved!r:.80}, and this machine {here}")
        for spec in self._new:
            self._make(spec)

    def close(self) -> None:
        """Give all wires back. The loop has ended, or never ran. Idempotent."""
        while self.nics:
            self.nics.popitem()[1].wire.close()
        while self._gone:
            self._gone.pop().close()
        self.leaving.clear()

    def inspect(self) -> dict[str, Mapping[str, object]]:
        """Each NIC with its wire."""
        return {
            nic.name: {"mac": nic.spec.mac, "wire": nic.wire.inspect(), "device": nic.device.inspect()}
            for nic in list(self.nics.values())
        }


def _words_to_keep(spec: NicSpec) -> str:
    """As --net would have it from another folder. MAC and queues are kept beside it.

    Not the capture: like a recording it is of one run, and whoever goes on from the file would empty it.
    """
    paths: dict[str, Any] = {"pcap": None}
    for key in ("socket", "listen"):
        path = getattr(spec, key)
        if path is not None:
            paths[key] = path.absolute()
    return spec._replace(mac="", queues=-1, **paths).text


def saved_nics(saved: Saved) -> tuple[SavedNic, ...]:
    """Those of a saved machine. StateError."""
    if Nics.name not in saved.parts:
        return ()
    state: NicsState = saved.state(NicsState, Nics.name)
    free = {f"net{number}" for number in range(MAX_NICS)}
    for nic in state.nics:
        if nic.name not in free:
            raise StateError(f"{saved.path}: {nic.name[:20]!r}: no name of a NIC, or one of two")
        free.remove(nic.name)
    return state.nics


def specs_to_restore(saved: Saved, given: Sequence[NicSpec]) -> tuple[NicSpec, ...]:
    """The NICs of a saved machine, on the wires that it had, or on those of `given`; then what else is given.

    StateError.
    """
    from hvkvm.machine.config_words import parse_words
    from hvkvm.machine.nic_spec import NicSpec, check_mac

    nics = saved_nics(saved)
    if given and len(given) < len(nics):
        what = f"has {len(nics)} NICs, and {len(given)} --net"
        raise StateError(f"{saved.path}: {what}; give one for each, or none")
    specs = []
    for index, nic in enumerate(nics):
        try:
            check_mac("MAC", nic.mac)
            spec = given[index] if given else parse_words(NicSpec, "--net", nic.words)._replace(pcap=None)
        except ConfigError as error:
            raise StateError(f"{saved.path}: {nic.name[:20]!r}: {error}") from None
        if spec.fd >= 0 and not given:
            raise StateError(
                f"{saved.path}: {nic.name[:20]!r} had an fd of its run; give a wire for each NIC by --net"
            )
        if spec.mac and spec.mac != nic.mac:
            what = f"{nic.name[:20]!r} has the MAC {nic.mac[:20]!r}, which its guest knows"
            raise StateError(f"{saved.path}: {what}; leave mac= out")
        specs.append(spec._replace(mac=nic.mac, queues=nic.queues))
    return (*specs, *given[len(nics) :])
