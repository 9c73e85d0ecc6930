"""`hvkvm ctl disk`: a running VM's disks and DVD drives, looked at, added, taken away and changed.

What is typed is checked here where that needs no VM; paths are made absolute, since the VM may run elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvkvm.errors import ConfigError

WORDS = {
    "list": (),
    "add": ("FILE",),
    "remove": ("NAME",),
    "resize": ("NAME", "SIZE"),
    "eject": ("NAME",),
    "insert": ("NAME", "ISO"),
    "stats": (),
}
"""What each takes; stats may have a NAME."""

HELP = """what:
  list                      disks and DVD drives, where the guest has them, and their images
  add FILE[,key=value,...]  a disk as --disk of hvkvm run takes it; with --cdrom a DVD drive
  remove NAME               take it from the guest; its image is flushed and closed
  resize NAME SIZE          make it larger, and tell the guest; 512M, 2G, and a bare number is MiB
  eject NAME                take the medium out of a drive; --force if the guest holds it
  insert NAME ISO           put a medium into an empty drive
  stats [NAME]              requests, bytes, failures and seconds so far, and what is in flight
"""


def request(what: str, words: list[str], *, cdrom: bool, force: bool) -> dict[str, Any]:
    """The request of the control socket. ConfigError."""
    takes = WORDS[what]
    if not len(takes) <= len(words) <= len(takes) + (what == "stats"):
        shown = " ".join(takes) or ("nothing more, or a NAME" if what == "stats" else "nothing more")
        raise ConfigError(f"disk {what}: takes {shown}; see hvkvm ctl disk --help")
    if "" in words:
        raise ConfigError(f"disk {what}: an empty word; takes {' '.join(takes) or 'a NAME'}")
    if cdrom and what != "add":
        raise ConfigError(f"--cdrom: not for disk {what}; leave it out")
    if force and what != "eject":
        raise ConfigError(f"--force: not for disk {what}; leave it out")
    found: dict[str, Any] = {"what": what}
    if what == "add":
        return found | {"kind": "cdrom" if cdrom else "disk", "spec": _spec(words[0], cdrom=cdrom)}
    if words:
        found["name"] = words[0]
    if what == "resize":
        from hvkvm.machine.config_kinds import parse_size

        found["size"] = parse_size(words[1], "SIZE")
    elif what == "insert":
        found["file"] = _absolute(words[1])
    elif what == "eject":
        found["force"] = force
    return found


def _spec(text: str, *, cdrom: bool) -> dict[str, Any]:
    """What the user gave, and nothing that is only the default."""
    from hvkvm.machine.config_fields import check_values
    from hvkvm.machine.config_words import parse_words
    from hvkvm.machine.disk_spec import CdromSpec, DiskSpec

    table: Any = CdromSpec if cdrom else DiskSpec
    spec = parse_words(table, "disk add", text)
    check_values(spec, "disk add")
    values = {key: value for key, value in spec._asdict().items() if value != table._field_defaults.get(key)}
    values["file"] = _absolute(values.get("file", ""))
    return {key: _absolute(str(value)) if isinstance(value, Path) else value for key, value in values.items()}


def _absolute(file: str) -> str:
    if not file:
        return "none"
    from hvkvm.machine.own_files import absolute, from_here

    if file.startswith("nbd:"):
        from hvkvm.machine.disk_spec import server_from

        with from_here(file):
            return server_from("", file)
    return absolute(file)


def text(what: str, result: Any) -> str:
    """The answer for people."""
    return _TEXTS[what](result)


def _list(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "the VM has no disks"
    cells = [("NAME", "CONTROLLER", "LUN", "SIZE", "FORMAT", "FILE")]
    for row in rows:
        format_ = f"{row['format']}{', read-only' if row['read_only'] else ''}" if row["format"] else "-"
        size = _size(row["size"]) if row["size"] is not None else "-"
        on_pci = row["bus"] != "vmbus"
        place = (
            (f"PCI slot {row['controller']}", "-") if on_pci else (str(row["controller"]), str(row["lun"]))
        )
        cells.append((row["name"], *place, size, format_, row["file"] if row["format"] else "no medium"))
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in cells
    )


def _size(n: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024 or n % 1024:
            return f"{n} {unit}"
        n //= 1024
    return f"{n} TiB"


def _stats(found: dict[str, Any]) -> str:
    from hvkvm.observe import tree

    return "\n".join(tree.lines(found)) if found else "the VM has no disks"


_TEXTS: dict[str, Callable[[Any], str]] = {
    "list": _list,
    "stats": _stats,
    "add": lambda row: f"{row['name']}: controller {row['controller']}, LUN {row['lun']}",
    "remove": lambda row: f"{row['name']} is gone, its image closed",
    "resize": lambda row: f"{row['name']} has {_size(row['size'])} now",
    "eject": lambda row: f"{row['name']} is empty",
    "insert": lambda row: f"{row['name']} has {row['file']}",
}
