"""Hooks of mkdocs (see mkdocs.yml): writes the library's reference out of its docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from typing import Any

PUBLIC = (
    ("Machines", "hvkvm.machine.machine", ("Machine",)),
    ("Configuration", "hvkvm.machine.config", ("MachineConfig",)),
    ("Disks", "hvkvm.machine.disk_spec", ("DiskSpec", "CdromSpec")),
    ("NICs", "hvkvm.machine.nic_spec", ("NicSpec",)),
    ("Recordings", "hvkvm.machine.record_spec", ("RecordSpec",)),
    ("How a run ended", "hvkvm.machine.outcome", ("Outcome", "Ending")),
    ("Warm guests", "hvkvm.machine.warm", ("warm", "NotWarm")),
    ("Warm guests that are kept", "hvkvm.machine.warm_kept", ("kept",)),
    ("Saved machines", "hvkvm.state.file", ("Saved",)),
    ("The SynIC", "hvkvm.hyperv.partition", ("Partition",)),
    ("SINT routes", "hvkvm.hyperv.sint_route", ("SintRoute",)),
    ("Connections", "hvkvm.hyperv.connections", ("Connections",)),
    ("A machine's VMBus", "hvkvm.machine.bus", ("Bus",)),
    ("VMBus devices", "hvkvm.vmbus.device", ("AnyDevice", "Device", "StreamDevice", "SavedDevice")),
    ("VMBus offers", "hvkvm.vmbus.offer", ("Offer",)),
    ("An open channel", "hvkvm.vmbus.channel_io", ("ChannelIo",)),
    ("A NIC's wire", "hvkvm.net.port", ("Port", "Receiver")),
    ("Faulty wires", "hvkvm.net.faults", ("FaultyWire", "Faults")),
    ("Disks that fail", "hvkvm.devices.scsi.fault_rules", ("Plan", "Rule", "Action")),
    ("Guests in tests", "hvkvm.testing.guest", ("Guest", "GuestFailure")),
    ("Micro guests", "hvkvm.testing.micro", ("MicroGuest", "MicroResult", "Fault")),
    ("Assembly", "hvkvm.testing.micro_image", ("AssemblyError",)),
    ("Linux guests", "hvkvm.testing.linux", ("LinuxGuest", "LinuxResult")),
    ("Devices of a test", "hvkvm.testing.device", ("ScriptedDevice",)),
    ("A bus without a guest", "hvkvm.testing.vmbus_loopback", ("Loopback",)),
    (
        "Errors",
        "hvkvm.errors",
        (
            *(
                "HvkvmError",
                "ConfigError",
                "KvmUnavailable",
                "CapabilityMissing",
                "HostExhausted",
                "BootError",
            ),
            *("ImageError", "StateError", "RouteError", "KvmIoctlError", "Stopped"),
        ),
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
    if bases := [f"`{base.__name__}`" for base in thing.__bases__ if _is_public(base)]:
        yield from (f"It has all that {' and '.join(bases)} has.", "")
    if issubclass(thing, Enum):
        for one in thing:
            yield f"- `{thing.__name__}.{one.name}`: {one.value}"
        yield ""
    if lines := _fields(thing):
        yield from (*lines, "")
    for member, value in vars(thing).items():
        if member.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        body = value.fget if isinstance(value, property) else value
        shown = "" if isinstance(value, property) else _signature(value)
        yield from (f"**`{member}{shown}`**", "", _text(body), "")


def _fields(thing: type) -> list[str]:
    """A line for each key of a table of `machine.config_fields` that has words for users."""
    from hvkvm.machine.config_fields import Field, fields_of

    notes = vars(thing).get("__annotations__", {}).values()
    if not notes or not all(isinstance(getattr(note, "__metadata__", (None,))[0], Field) for note in notes):
        return []
    lines = []
    for key, field in fields_of(thing).items():
        flag = f" (`{field.flag}`)" if field.flag.startswith("--") else ""  # others are of an option's key
        lines += [f"- `{key}`{flag}: {field.help}"] if field.help else []
    return lines


def _is_public(thing: type) -> bool:
    return any(thing.__module__ == module and thing.__name__ in names for _title, module, names in PUBLIC)


def _signature(thing: Any) -> str:
    if inspect.isclass(thing) and (issubclass(thing, Enum) or getattr(thing, "_is_protocol", False)):
        return ""  # nobody makes one by calling it
    try:
        signature = inspect.signature(thing)
        if inspect.isclass(thing) and _fields(thing):
            bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
            signature = inspect.Signature(bare)
        text = str(signature)
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"ForwardRef\(('[^']*')\)", r"\1", text)
    # Addresses are others each time.
    text = re.sub(r"<[\w.]*\b(\w+) object at 0x[0-9a-f]+>", r"\1()", text)
    text = re.sub(r"<function [\w.]*<lambda> at 0x[0-9a-f]+>", "...", text)
    text = re.sub(r"<function [\w.]*\b(\w+) at 0x[0-9a-f]+>", r"\1", text)
    text = re.sub(r"frozenset\(\{[^}]{80,}\}\)", "...", text)
    text = re.sub(r"<([\w.]+): [^>]*>", r"\1", text)  # a member of an Enum
    return text.replace("(self, ", "(").replace("(self)", "()").replace("`", "'")


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").replace("<", "&lt;")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: one page more."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "reference.md", content=reference()))
    return files
