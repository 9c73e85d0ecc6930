"""Hooks of mkdocs (see mkdocs.yml): writes the library's reference out of its docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

PUBLIC = (
    ("Machines", "hvkvm.machine.machine", ("Machine",)),
    ("Configuration", "hvkvm.machine.config", ("MachineConfig",)),
    ("How a run ended", "hvkvm.machine.outcome", ("Outcome", "Ending")),
    ("Warm guests", "hvkvm.machine.warm", ("warm", "NotWarm")),
    ("The SynIC", "hvkvm.hyperv.partition", ("Partition",)),
    ("SINT routes", "hvkvm.hyperv.sint_route", ("SintRoute",)),
    ("Connections", "hvkvm.hyperv.connections", ("Connections",)),
    ("VMBus devices", "hvkvm.vmbus.device", ("Device", "StreamDevice", "SavedDevice")),
    ("VMBus offers", "hvkvm.vmbus.offer", ("Offer",)),
    ("An open channel", "hvkvm.vmbus.channel_io", ("ChannelIo",)),
    ("Guests in tests", "hvkvm.testing.guest", ("Guest", "GuestFailure")),
    ("Micro guests", "hvkvm.testing.micro", ("MicroGuest", "MicroResult", "Fault")),
    ("Linux guests", "hvkvm.testing.linux", ("LinuxGuest", "LinuxResult")),
    ("Devices of a test", "hvkvm.testing.device", ("ScriptedDevice",)),
    (
        "Errors",
        "hvkvm.errors",
        ("HvkvmError", "ConfigError", "KvmUnavailable", "CapabilityMissing", "BootError"),
    ),
)
"""Titles, modules, and the names of each that are for users."""


def reference() -> str:
    """The page, in Markdown."""
    lines = [
        "# The library",
        "",
        "Made from the docstrings. What is not here is not for users, and may change.",
        "",
    ]
    for title, module, names in PUBLIC:
        found = import_module(module)
        lines += [f"## {title}", ""]
        for name in names:
            lines += list(_entry(module, name, getattr(found, name)))
    return "\n".join(lines)


def _entry(module: str, name: str, thing: Any) -> Iterator[str]:
    yield from (f"### {name}", "", f"`{module}.{name}{_signature(thing)}`", "", _text(thing), "")
    if not inspect.isclass(thing):
        return
    for member, value in vars(thing).items():
        if member.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        body = value.fget if isinstance(value, property) else value
        shown = "" if isinstance(value, property) else _signature(value)
        yield from (f"**`{member}{shown}`**", "", _text(body), "")


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    return text.replace("(self, ", "(").replace("(self)", "()").replace("`", "'")


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").replace("<", "&lt;")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: one page more."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "reference.md", content=reference()))
    return files
