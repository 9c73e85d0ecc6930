"""Kernel modules of an unpacked kernel package, in an order in which they load.

Why: a distribution's package has no modules.dep (its installation makes that),
so the dependencies are read from the modules themselves. Called by
`boot.initramfs` and the nested lab. No shared state: one tree, one thread.
Source: the `.modinfo` ELF section (`depends=`, `softdep=`) as kmod reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvkvm import given_file
from hvkvm.abi.elf import ELF64_EHDR, ELF64_IDENT, ELF64_SHDR, Ehdr, Shdr
from hvkvm.boot import unpack
from hvkvm.errors import BootError
from hvkvm.tuples import NamedTuple

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
# A module is a few MB at most; more than this in one file is not a module.
_MODULE_MAX = 256 << 20
_REMEDY = "name a lib/modules/VERSION folder that this user can read"


class Module(NamedTuple):
    """A module ready to load: its name as `lsmod` shows it, its ELF bytes, the file they came from."""

    name: str
    data: bytes
    path: Path


def canonical(name: str) -> str:
    """A module's name as the kernel has it: `kvm-amd` and `kvm_amd` are one module."""
    return name.replace("-", "_")


def _stem(file_name: str) -> str | None:
    for suffix in _SUFFIXES:
        if file_name.endswith(suffix):
            return canonical(file_name[: -len(suffix)])
    return None


def modinfo(elf: bytes) -> dict[str, list[str]]:
    """The `key=value` strings of a module's `.modinfo` section, values in order.

    Raises BootError when `elf` is not a 64-bit little-endian ELF with such a section.
    """
    section = _section(elf, b".modinfo")
    found: dict[str, list[str]] = {}
    for item in section.split(b"\0"):
        key, equals, value = item.partition(b"=")
        if equals:
            found.setdefault(key.decode("latin-1"), []).append(value.decode("utf-8", "replace"))
    return found


def _section(elf: bytes, wanted: bytes) -> bytes:
    if not elf.startswith(ELF64_IDENT) or len(elf) < ELF64_EHDR.size:
        raise BootError("not a 64-bit ELF kernel module")
    file = Ehdr(*ELF64_EHDR.unpack_from(elf))
    size, count = file.e_shentsize, file.e_shnum
    if size != ELF64_SHDR.size or file.e_shstrndx >= count or file.e_shoff + count * size > len(elf):
        raise BootError("a kernel module with a broken section table")
    sections = [Shdr(*ELF64_SHDR.unpack_from(elf, file.e_shoff + index * size)) for index in range(count)]
    names = _bytes_of(elf, sections[file.e_shstrndx])
    for header in sections:
        start = header.sh_name
        if start < len(names) and names[start : names.find(b"\0", start)] == wanted:
            return _bytes_of(elf, header)
    raise BootError(f"a kernel module without a {wanted.decode()} section")


def _bytes_of(elf: bytes, header: Shdr) -> bytes:
    end = header.sh_offset + header.sh_size
    if end > len(elf):
        raise BootError("a kernel module with a section outside the file")
    return elf[header.sh_offset : end]


def dependencies(elf: bytes) -> tuple[list[str], list[str]]:
    """(required, wished for) module names of a module: `depends=` and the `pre:` part of `softdep=`."""
    info = modinfo(elf)
    required = [canonical(name) for line in info.get("depends", []) for name in line.split(",") if name]
    wished: list[str] = []
    for line in info.get("softdep", []):
        before = False
        for word in line.split():
            if word.endswith(":"):
                before = word == "pre:"
            elif before:
                wished.append(canonical(word))
    return required, wished


def read_module(path: Path) -> bytes:
    """A module file's ELF bytes, decompressed. Raises BootError when that cannot be done."""
    try:
        raw = given_file.read(path)
    except OSError as error:
        raise BootError(f"{path}: {error.strerror}; check the folder of modules") from None
    try:
        if path.name.endswith(".xz"):
            import lzma

            return _taken(unpack.by_python(lzma.LZMADecompressor(), raw, _MODULE_MAX))
        if path.name.endswith(".gz"):
            import zlib

            return _taken(unpack.by_python(zlib.decompressobj(wbits=31), raw, _MODULE_MAX))
        if path.name.endswith(".zst"):
            return _taken(unpack.by_tool("zstd", raw, _MODULE_MAX))
    except FileNotFoundError:
        raise BootError(f"{path}: the zstd command is needed to read it (package zstd)") from None
    except Exception as error:  # each decompressor has an exception type of its own
        raise BootError(f"{path}: cannot be decompressed: {error}") from error
    return raw


def _taken(unpacked: bytes | None) -> bytes:
    if unpacked is None:
        raise ValueError("it is cut short or damaged, or too large for a module")
    return unpacked


class ModuleTree:
    """The modules under one `lib/modules/<version>` folder.

    `root` may also be the folder of an unpacked package, when it holds exactly
    one kernel version. Raises BootError when no modules are found there.
    """

    def __init__(self, root: Path) -> None:
        self.root = _version_folder(Path(root))
        self.version = self.root.name
        self._paths = {name: path for path in self._listed() if (name := _stem(os.path.basename(path)))}
        self._builtin = frozenset(
            name for line in self._lines("modules.builtin") if (name := _stem(os.path.basename(line)))
        )

    def __contains__(self, name: str) -> bool:
        return canonical(name) in self._paths or canonical(name) in self._builtin

    def path(self, name: str) -> Path:
        """The module's file. Raises BootError when the tree has none."""
        relative = self._paths.get(canonical(name))
        if relative is not None:
            # modules.order names x.ko even where the package ships x.ko.xz.
            plain = relative[: relative.rindex(".ko")]
            for suffix in _SUFFIXES:
                candidate = self.root / (plain + suffix)
                if os.path.exists(candidate):
                    return candidate
        raise BootError(f"kernel {self.version} has no module {name} (looked in {self.root})")

    def closure(self, names: Iterable[str], *, optional: Iterable[str] = ()) -> list[Module]:
        """The named modules and all they need, each after its dependencies, none twice.

        Built-in ones are left out. Missing `optional` ones are passed over;
        any other missing one raises BootError. A dependency cycle, which no real
        module has, is cut where it closes.
        """
        passed_over = {canonical(name) for name in optional}
        order: list[Module] = []
        seen: set[str] = set()
        for name in (*names, *passed_over):
            self._visit(canonical(name), name not in passed_over, seen, order)
        return order

    def _visit(self, name: str, required: bool, seen: set[str], order: list[Module]) -> None:
        # An explicit stack: a hostile tree must not exhaust Python's own.
        stack: list[tuple[Module | None, Iterator[tuple[str, bool]]]] = [(None, iter([(name, required)]))]
        while stack:
            module, remaining = stack[-1]
            step = next(remaining, None)
            if step is None:
                stack.pop()
                if module is not None:
                    order.append(module)
                continue
            child, needed = step
            if child in seen or child in self._builtin or (not needed and child not in self._paths):
                continue
            seen.add(child)
            try:
                path = self.path(child)
                data = read_module(path)
            except BootError as error:
                raise BootError(f"--module {child}: {error}") from None
            try:
                hard, soft = dependencies(data)
            except BootError as error:
                text = f"--module {child}: {path}: {error}; check the folder of modules"
                raise BootError(text) from None
            needs = [(name, False) for name in soft] + [(name, True) for name in hard]
            stack.append((Module(child, data, path), iter(needs)))

    def _lines(self, name: str) -> list[str]:
        path = self.root / name
        try:
            return given_file.read(path).decode().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BootError(f"--modules-dir: {path}: {error.strerror}; {_REMEDY}") from None
        except UnicodeDecodeError:
            raise BootError(f"--modules-dir: {path}: is no UTF-8 text; {_REMEDY}") from None

    def _listed(self) -> Iterable[str]:
        # One read instead of a walk over thousands of files, which a network file system feels.
        listed = self._lines("modules.order")
        if listed:
            return listed
        return [
            os.path.relpath(os.path.join(folder, file), self.root)
            for folder, _, files in os.walk(self.root)
            for file in files
            if _stem(file)
        ]


def _version_folder(root: Path) -> Path:
    try:
        os.stat(root / "kernel")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise BootError(f"--modules-dir {root}: {error.strerror}; {_REMEDY}") from None
    for parent in (root, root / "lib/modules", root / "usr/lib/modules"):
        if os.path.isdir(parent / "kernel") or os.path.exists(parent / "modules.order"):
            return parent
        versions = sorted(parent.glob("*/kernel")) if parent != root else []
        if len(versions) == 1:
            return versions[0].parent
        if len(versions) > 1:
            raise BootError(f"{parent} has several kernel versions; name one of its folders")
    raise BootError(f"{root} holds no kernel modules (expected lib/modules/<version>)")
