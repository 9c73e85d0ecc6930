"""The parent locator of a differencing VHDX: by what the parent is known, and where it may be."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

from hvkvm.block.vhdx import layout
from hvkvm.errors import ImageDamaged, ImageError, harmless
from hvkvm.tuples import NamedTuple

MAX_PAIRS = 64


class ParentLocator(NamedTuple):
    """`linkages`: the DataWriteGuids that a parent may have; `paths`: where it may be, in order."""

    linkages: tuple[bytes, ...]
    paths: tuple[str, ...]


def parse_locator(path: Path, at: int, raw: bytes) -> ParentLocator:
    """Read one that lies at byte `at` of the file. ImageDamaged."""

    def damaged(what: str) -> ImageDamaged:
        return ImageDamaged(path, "parent locator", at, what)

    if len(raw) < layout.parent_locator_header.size:
        raise damaged("is cut")
    kind, _reserved, count = layout.parent_locator_header.unpack_from(raw)
    if kind != layout.VHDX_PARENT:
        raise damaged(f"of type {UUID(bytes_le=kind)}, of which nothing is known")
    if count > MAX_PAIRS:
        raise damaged(f"{count} pairs, of {MAX_PAIRS} at most")
    pairs: dict[str, str] = {}
    for number in range(count):
        where = layout.parent_locator_header.size + number * layout.parent_locator_entry.size
        if where + layout.parent_locator_entry.size > len(raw):
            raise damaged("is cut")
        texts = []
        key_at, value_at, key_length, value_length = layout.parent_locator_entry.unpack_from(raw, where)
        for start, length in ((key_at, key_length), (value_at, value_length)):
            if not length or start + length > len(raw):
                raise damaged("a text that lies outside of it")
            texts.append(raw[start : start + length].decode("utf-16-le", "replace").rstrip("\0"))
        pairs[texts[0]] = texts[1]
    linkages = []
    for key in ("parent_linkage", "parent_linkage2"):
        if key in pairs:
            try:
                linkages.append(UUID(pairs[key]).bytes_le)
            except ValueError:
                raise damaged(f"{key} is no GUID") from None
    if not linkages:
        raise damaged("has no parent_linkage")
    keys = ("relative_path", "volume_path", "absolute_win32_path")
    paths = tuple(pairs[key] for key in keys if pairs.get(key) and "\0" not in pairs[key])
    if not paths:
        raise damaged("names no file")
    return ParentLocator(tuple(linkages), paths)


def build_locator(linkage: bytes, parent: Path, child: Path) -> bytes:
    """One for `parent`, as seen from the folder of `child`, in Windows' spelling. ImageError."""
    relative = os.path.relpath(parent.resolve(), child.parent.resolve()).replace("/", "\\")
    pairs = {
        "parent_linkage": "{" + str(UUID(bytes_le=linkage)) + "}",
        "relative_path": relative if relative.startswith("..") else ".\\" + relative,
        "absolute_win32_path": str(parent.resolve()),
    }
    try:
        encoded = [(key.encode("utf-16-le"), value.encode("utf-16-le")) for key, value in pairs.items()]
    except UnicodeEncodeError:
        shown = harmless(str(parent.resolve()))
        raise ImageError(f"{shown}: a child cannot name a parent whose name is no UTF-8; rename it") from None
    at = layout.parent_locator_header.size + len(pairs) * layout.parent_locator_entry.size
    head = layout.parent_locator_header.pack(layout.VHDX_PARENT, 0, len(pairs))
    texts = b""
    for raw in encoded:
        where = at + len(texts)
        head += layout.parent_locator_entry.pack(where, where + len(raw[0]), len(raw[0]), len(raw[1]))
        texts += raw[0] + raw[1]
    return head + texts


def find_parent(child: Path, locator: ParentLocator) -> Path | None:
    """The file that it names: the first that is there."""
    for text in locator.paths:
        path = child.resolve().parent / text.replace("\\", "/")
        if os.path.isfile(path):
            return path
    return None
