"""The control socket's request "net": the NICs of a running machine, and what is on their wires.

"what" is list, stats, add (with "spec", the words behind --net), remove or link (with "name", and "state" up
or down for link). A wire is opened on a thread of its own; who gives up waiting for one gets no NIC.

Owner: the I/O loop, but for that thread. ValueError is a mistake of the client and becomes its reply.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvkvm.errors import HostExhausted, HvkvmError, Stopped
from hvkvm.machine.control_guest import text
from hvkvm.machine.saving import FOLDER_GONE
from hvkvm.observe.control_socket import Answer
from hvkvm.runtime.thread_start import start_thread

if TYPE_CHECKING:
    from hvkvm.machine.nic_spec import NicSpec
    from hvkvm.machine.nics import Nics
    from hvkvm.machine.parts import Parts
    from hvkvm.net.wire import Wire

Request = dict[str, Any]
WHAT = ("list", "stats", "add", "remove", "link")
_ABOUT = ("kind", "up", "mtu", "interface", "peer", "guest", "gateway", "failure", "pcap")
"""What `list` tells of a wire."""


class NetControl:
    """Of one machine."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._opening = False

    def handle(self, request: Request, answer: Answer) -> None:
        """See the module."""
        what = text(request, "what", WHAT)
        nics = self._parts.nics
        if nics is None:
            answer.fail("absent", "this VM has no VMBus; start it with --vmbus on")
        elif what == "add":
            self._add(nics, request, answer)
        elif what in ("list", "stats"):
            answer.ok([_told(name, nic, all_=what == "stats") for name, nic in nics.inspect().items()])
        else:
            self._change(nics, what, request, answer)

    def _change(self, nics: Nics, what: str, request: Request, answer: Answer) -> None:
        name = text(request, "name")
        nic = nics.nics.get(name)
        if nic is None:
            answer.fail("usage", f"{name[:40]}: no such NIC; there are {', '.join(nics.nics) or 'none'}")
        elif what == "link" and name in nics.leaving:
            answer.fail("busy", f"{name} is being removed")
        elif what == "link":
            up = text(request, "state", ("up", "down")) == "up"
            nic.wire.plug(up)
            answer.ok({"name": name, "up": nic.wire.up})
        else:
            nics.remove(name, lambda: answer.ok({"name": name}))

    def _add(self, nics: Nics, request: Request, answer: Answer) -> None:
        from hvkvm.machine.config_fields import check_values
        from hvkvm.machine.config_words import parse_words
        from hvkvm.machine.nic_spec import NicSpec

        words = text(request, "spec")
        try:
            spec = parse_words(NicSpec, "--net", words)
            check_values(spec, "--net")
            spec.check("--net")
        except HvkvmError as error:
            raise ValueError(str(error)) from None
        if spec.fd >= 0:
            raise ValueError(f"--net fd={spec.fd}: an fd is of the process that has it; name a tap")
        if self._opening:
            answer.fail("busy", "another NIC is being added; try again")
            return
        self._opening = True
        shelf = self._parts.disk_shelf
        kept = () if shelf is None else tuple(shelf.specs)
        given = (nics, nics.addressed(spec), kept, [nic.spec for nic in nics.nics.values()], answer)
        thread = threading.Thread(target=self._open, args=given, name="open-net", daemon=True)
        try:
            start_thread(thread)
        except HostExhausted as error:
            self._opening = False
            answer.fail("busy", str(error))

    def _open(
        self, nics: Nics, spec: NicSpec, disks: Sequence[Any], others: Sequence[NicSpec], answer: Answer
    ) -> None:
        """On a thread of its own: also what is only looked at may be on a disk that stands still."""
        from hvkvm.machine.own_files import why_kept

        io, config = self._parts.platform.io, self._parts.platform.config
        wire: Wire | None = None
        why, kind = "", "guest"
        try:
            # A disk of this VM, say, or what another NIC records.
            if spec.pcap is not None and (kept := why_kept(spec.pcap, config, disks, others)):
                why, kind = f"--net pcap={kept}", "usage"
            else:
                wire = nics.open(spec)
        except FileNotFoundError:
            why = FOLDER_GONE
        except HvkvmError as error:
            why = str(error)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        try:
            io.call_soon(self._opened, nics, spec, wire, kind, why, answer, cancelled=lambda: _let_go(wire))
        except Stopped:
            _let_go(wire)

    def _opened(
        self, nics: Nics, spec: NicSpec, wire: Wire | None, kind: str, why: str, answer: Answer
    ) -> None:
        self._opening = False
        if wire is None:
            answer.fail(kind, why)
        elif not answer.wanted:
            wire.close()
        else:
            try:
                nic = nics.add(spec, wire)
            except HvkvmError as error:
                answer.fail("guest", str(error))
            else:
                answer.ok({"name": nic.name, "mac": nic.spec.mac})


def _let_go(wire: Wire | None) -> None:
    if wire is not None:
        wire.close()


def _told(name: str, nic: Mapping[str, Any], *, all_: bool) -> dict[str, Any]:
    wire, device = nic["wire"], nic["device"]
    if all_:
        return {
            "name": name,
            "wire": dict(wire),
            "guest": {"sent": device["sent"], "received": device["received"]},
        }
    about = {key: wire[key] for key in _ABOUT if key in wire}
    return {"name": name, "mac": nic["mac"], "driver": device["channels"] > 0, **about}
