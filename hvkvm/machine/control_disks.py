"""The control socket's requests about disks: what there is, what it does, and disks that come, go and change.

    {"do": "disk", "what": "add", "kind": "disk", "spec": {"file": "/x.raw"}}

`spec` has the keys of `--disk` or `--cdrom`; paths are absolute. Images are opened on a thread of their own,
since a host's file may hang.

Owner: the I/O loop. ValueError is a mistake of the client and becomes its reply.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hvkvm.errors import ConfigError, HostExhausted, HvkvmError, Stopped
from hvkvm.machine.control_guest import Request, text
from hvkvm.machine.disk_shelf import DiskShelf
from hvkvm.observe.control_socket import Answer
from hvkvm.runtime.thread_start import start_thread

if TYPE_CHECKING:
    from hvkvm.block.image import Image
    from hvkvm.block.request import Result
    from hvkvm.machine.attached import Attached, Spec
    from hvkvm.machine.disks import Disks
    from hvkvm.machine.parts import Parts

MOST_OPENING = 4
"""Images that may be opened at once."""


class DiskRequests:
    """The request "disk"; "what" chooses."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._opening = 0
        self._requests: dict[str, Callable[[DiskShelf, Request, Answer], object]] = {
            "list": self._list,
            "stats": self._stats,
            "add": self._add,
            "remove": self._remove,
            "resize": self._resize,
            "eject": self._eject,
            "insert": self._insert,
        }

    def __call__(self, request: Request, answer: Answer) -> None:
        """Answer it, now or later."""
        what = text(request, "what", tuple(self._requests))
        shelf = self._parts.disk_shelf
        if shelf is None:
            answer.fail("absent", "this VM has no bus for disks; it was started with --vmbus off")
            return
        try:
            self._requests[what](shelf, request, answer)
        except (ConfigError, PermissionError) as error:
            answer.fail("guest", str(error))

    def _list(self, shelf: DiskShelf, _request: Request, answer: Answer) -> None:
        answer.ok([_row(one) for one in shelf.attached.values()])

    def _stats(self, shelf: DiskShelf, request: Request, answer: Answer) -> None:
        found = shelf.inspect()
        if "name" in request:
            name = _name(shelf, request)
            found = {name: found[name]}
        answer.ok(found)

    def _add(self, shelf: DiskShelf, request: Request, answer: Answer) -> None:
        spec = _spec(request)
        if spec.bus not in ("", "vmbus"):
            raise ConfigError(
                f"{spec.file}: a disk on PCI cannot come while the VM runs; leave out bus={spec.bus}"
            )
        disks = shelf.make()

        def opened(image: Image | None, plan: Any) -> None:
            answer.ok(_row(disks.attach(spec, image, plan)))

        self._open(answer, disks, spec, opened)

    def _remove(self, shelf: DiskShelf, request: Request, answer: Answer) -> None:
        disks, name = _named(shelf, request)
        disks.remove(name, lambda result: _tell(answer, name, result))

    def _resize(self, shelf: DiskShelf, request: Request, answer: Answer) -> None:
        disks, name = _named(shelf, request)
        size = request.get("size")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 63:
            raise ValueError('"size" is a number of bytes above 0')
        if self._parts.saver.busy:  # the file may say by now how large it is
            answer.fail("busy", f"{name} keeps its size while the VM is being saved; try again")
            return

        def resized(result: Result) -> None:
            _tell(answer, name, result, size=size)

        disks.resize(name, size, resized)

    def _eject(self, shelf: DiskShelf, request: Request, answer: Answer) -> None:
        disks, name = _named(shelf, request)
        force = request.get("force", False)
        if not isinstance(force, bool):
            raise ValueError('"force" is true or false')
        disks.eject(name, lambda result: _tell(answer, name, result), force=force)

    def _insert(self, shelf: DiskShelf, request: Request, answer: Answer) -> None:
        disks, name = _named(shelf, request)
        file = text(request, "file")
        spec = _checked("cdrom", {"file": file})

        def opened(image: Image | None, _plan: Any) -> None:
            if image is None:
                raise ValueError('"file" names no image')
            try:
                disks.insert(name, file, image)
            except (KeyError, ValueError):
                image.close()
                raise
            answer.ok({"name": name, "file": file})

        self._open(answer, disks, spec, opened)

    def _open(
        self, answer: Answer, disks: Disks, spec: Spec, then: Callable[[Image | None, Any], object]
    ) -> None:
        """Open the image on a thread, and call `then` with it on the loop."""
        if self._opening >= MOST_OPENING:
            answer.fail("busy", "other images are being opened; try again")
            return
        io = self._parts.platform.io
        shelf = self._parts.disk_shelf
        there = list(shelf.attached.values()) if shelf is not None else []

        def work() -> None:
            image, plan, why = None, None, ""
            try:
                _refuse_twice(spec, there)
                plan = disks.plan(spec)
                image = disks.open(spec)
            except HvkvmError as error:
                why = str(error)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            try:
                io.call_soon(opened, image, plan, why, cancelled=lambda: _let_go(image))
            except Stopped:  # the machine ends
                _let_go(image)

        def opened(image: Image | None, plan: Any, why: str) -> None:
            self._opening -= 1
            if why:
                answer.fail("guest", why)
                return
            if not answer.wanted:  # who asked was told that it takes too long, and expects none any more
                _let_go(image)
                return
            try:
                then(image, plan)
            except KeyError:
                answer.fail("guest", "it is not there any more")
            except (HvkvmError, ValueError) as error:
                answer.fail("guest", str(error))

        try:
            start_thread(threading.Thread(target=work, name="open image", daemon=True))
        except HostExhausted as error:
            answer.fail("busy", str(error))
            return
        self._opening += 1


def _let_go(image: Image | None) -> None:
    if image is not None:
        image.close()


def _name(shelf: DiskShelf, request: Request) -> str:
    """Which disk is meant. ValueError for one that is not there."""
    name = text(request, "name")
    if name not in shelf.attached:
        raise ValueError(f"{name[:40]}: no such disk; there are {', '.join(shelf.attached) or 'none'}")
    return name


def _named(shelf: DiskShelf, request: Request) -> tuple[Disks, str]:
    """A disk that can change while the VM runs. ValueError: there is none; ConfigError: it cannot."""
    name = _name(shelf, request)
    if shelf.disks is None or name not in shelf.disks.attached:
        raise ConfigError(
            f"{name}: a disk on PCI stays as it is while the VM runs; one on the VMBus may change"
        )
    return shelf.disks, name


def _spec(request: Request) -> Spec:
    """What is to be added. ValueError."""
    kind = text(request, "kind", ("disk", "cdrom"))
    values = request.get("spec")
    if not isinstance(values, dict):
        raise ValueError('"spec" is a table with the keys of --disk')
    return _checked(kind, values)


def _checked(kind: str, values: dict[str, Any]) -> Spec:
    from hvkvm.machine.config_fields import check_values, read_table
    from hvkvm.machine.disk_spec import CdromSpec, DiskSpec

    table: Any = DiskSpec if kind == "disk" else CdromSpec
    if "file" not in values:
        raise ValueError('"file" is missing')
    try:
        spec: Spec = table(**read_table(table, values, None, f"--{kind}"))
        check_values(spec, f"--{kind}")
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return spec


def _refuse_twice(spec: Spec, there: list[Attached]) -> None:
    """ConfigError for an image that a disk of this VM has: its lock would name another program."""
    from hvkvm.machine.disk_spec import shut_out

    for one in there:
        if one.disk is not None and shut_out(spec, one.spec):
            remedy = "remove that first, or give each readonly=on or snapshot=on"
            raise ConfigError(f"{spec.file}: {one.name} has it; {remedy}")


def _row(one: Attached) -> dict[str, Any]:
    disk = one.disk
    return {
        "name": one.name,
        "kind": "disk" if one.option == "--disk" else "cdrom",
        "bus": one.bus,
        "controller": one.controller,
        "lun": one.lun,
        "file": one.file,
        "format": None if disk is None else disk.image.format,
        "size": None if disk is None else disk.size,
        "sector": None if disk is None else disk.image.sector_size,
        "read_only": None if disk is None else disk.image.read_only,
    }


def _tell(answer: Answer, name: str, result: Result, **more: object) -> None:
    from hvkvm.block.request import Status

    if result.status is Status.OK:
        answer.ok({"name": name, **more})
    else:
        answer.fail("guest", f"{name}: {result}")
