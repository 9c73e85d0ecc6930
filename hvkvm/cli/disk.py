"""`hvkvm disk`: look at disk images, make, copy, check and compact them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvkvm.cli.arguments import Parser, named, split_words
from hvkvm.cli.disk_target import made_beside
from hvkvm.cli.output import complain, show
from hvkvm.cli.progress import Progress
from hvkvm.cli.signals import ending_by_exit
from hvkvm.errors import ConfigError, ImageDamaged, ImageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from hvkvm.block.image import Image

FORMATS = ("raw", "vhdx")
TYPES = ("dynamic", "fixed")
SECTOR_SIZES = ("512", "4096")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MAX_SIZE = (1 << 63) - 1
MAX_DIGITS = 20

DESCRIPTION = "Look at disk images, make, copy, check and compact them: raw files, block devices, VHDX."
EPILOG = """\
verbs:
  info FILE              what it is
  create FILE SIZE       a new one; a VHDX by its name, or --format; a child with --parent
  convert SOURCE TARGET  a copy in another format; SOURCE may be nbd:unix:PATH or nbd:HOST:PORT
  check FILE             every structure of it; exit status 1 for damage, which is named
  compact FILE           give back what is zeros or belongs to nothing

`hvkvm disk VERB --help` has the options."""


def size_of(text: str, what: str) -> int:
    """A number of bytes, with K, M, G or T behind it (1024 each) or not. ConfigError."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    if not number.isascii() or not number.isdecimal() or unit not in _UNITS:
        raise ConfigError(f"{what} {shown}: say a number of bytes, or one with K, M, G or T behind it")
    size = int(number) * _UNITS[unit] if len(number) <= MAX_DIGITS else MAX_SIZE + 1
    if size > MAX_SIZE:
        raise ConfigError(f"{what} {shown}: larger than any file can be; say less than {1 << 23}T")
    return size


def human(n: int) -> str:
    """A size for people, exact where that is short."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= factor:
            return f"{n / factor:.4g} {unit}"
    return f"{n} bytes"


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    verbs = {"info": _info, "create": _create, "convert": _convert, "check": _check, "compact": _compact}
    if not arguments or arguments[0] in ("-h", "--help"):
        help_text = Parser("hvkvm disk VERB", DESCRIPTION, EPILOG)
        if arguments:
            help_text.print_help()
            return 0
        complain(help_text.format_help().rstrip("\n"))
        return 2
    options = parse(arguments)
    with ending_by_exit():  # what a verb has begun beside a file is taken away
        return verbs[options.verb](options)


SUMMARY = {
    "info": "Say what an image is.",
    "create": "Make a new image of SIZE bytes (K, M, G and T are understood).",
    "convert": "Copy an image; --format is TARGET's. What is zeros takes no space.",
    "check": "Look at every structure of an image; exit status 1 for damage.",
    "compact": "Give back space that holds zeros or belongs to nothing.",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with `verb`: they may stand before it too. ConfigError for what makes no sense."""
    with_value = set().union(*(verb_parser(verb).value_options() for verb in SUMMARY))
    given, words = split_words(arguments, with_value)
    if not words:
        raise ConfigError(f"disk: no verb; choose {', '.join(SUMMARY)}")
    verb = words.pop(0)
    if verb not in SUMMARY:
        raise ConfigError(f"disk {verb}: no such verb; choose {', '.join(SUMMARY)}")
    options: argparse.Namespace = verb_parser(verb).parse_args([*given, "--", *words])
    options.verb = verb
    options.sector_size = int(getattr(options, "sector_size", None) or 0)
    return options


def verb_parser(verb: str) -> Parser:
    """The options of one of the verbs in SUMMARY."""
    parser = Parser(f"hvkvm disk {verb}", SUMMARY[verb])
    makes = verb in ("create", "convert")
    what = "what it is to be (vhdx by the name .vhdx, else raw)" if makes else "what it is (its first bytes)"
    parser.add_argument("--format", choices=FORMATS, default="", help=what)
    if verb == "convert":
        parser.add_argument("source", type=named, metavar="SOURCE")
        parser.add_argument("target", type=named, metavar="TARGET", help="must not be there")
        parser.add_argument(
            "--source-format", choices=FORMATS, default="", help="what SOURCE is (its first bytes)"
        )
        parser.add_argument("--size", metavar="SIZE", help="of TARGET, if it is to be larger")
    else:
        parser.add_argument("file", type=named, metavar="FILE")
    if verb == "info":
        parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "create":
        parser.add_argument("size", metavar="SIZE", nargs="?", help="not needed with --parent: its size")
        parser.add_argument(
            "--parent", type=named, metavar="FILE", help="a VHDX that keeps what this one does not change"
        )
    if makes:
        parser.add_argument("--type", choices=TYPES, default="dynamic", help="of a VHDX (dynamic)")
        parser.add_argument("--block-size", metavar="SIZE", help="of a VHDX: 1M to 256M (32M, a child 2M)")
        usual = "SOURCE's" if verb == "convert" else "512, a child its parent's"
        parser.add_argument("--sector-size", choices=SECTOR_SIZES, metavar="N", help=f"512 or 4096 ({usual})")
    return parser


def _open(name: str, options: argparse.Namespace, *, write: bool = False) -> Image:
    from hvkvm.block.image import ImageOptions
    from hvkvm.block.open_image import open_image

    return open_image(name, ImageOptions(format=options.format, read_only=not write))


def _info(options: argparse.Namespace) -> int:
    image = _open(options.file, options)
    try:
        facts: dict[str, Any] = {**image.inspect(), "sector_size": image.sector_size}
        if os.path.isfile(options.file):
            facts["space_taken"] = os.stat(options.file).st_blocks * 512
    finally:
        image.close()
    if options.json:
        import json

        show(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if value is None:
            continue
        exact = f" ({value} bytes)" if key == "size" else ""
        text = human(value) + exact if key in _SIZES and isinstance(value, int) else value
        show(f"{key.replace('_', ' ')}: {text}")
    return 0


_SIZES = ("size", "block_size", "file_size", "space_taken")


def _create(options: argparse.Namespace) -> int:
    if options.size is None and options.parent is None:
        raise ConfigError("SIZE is missing; say how large the disk is to be, as 20G")
    size = size_of(options.size, "SIZE") if options.size is not None else 0
    path = Path(options.file)
    with made_beside(path) as partial:
        _make(
            partial,
            size,
            _format_of(path, options),
            options,
            Path(options.parent) if options.parent else None,
        )
    return 0


def _format_of(path: Path, options: argparse.Namespace) -> str:
    """What the new image `path` is to be."""
    named: str = options.format
    return named or ("vhdx" if path.suffix.lower() in (".vhdx", ".avhdx") else "raw")


def _make(path: Path, size: int, kind: str, options: argparse.Namespace, parent: Path | None = None) -> None:
    """A new image, all zeros. ImageError."""
    if kind == "vhdx":
        from hvkvm.block.vhdx.create import VhdxOptions, create_vhdx

        block = size_of(options.block_size, "--block-size") if options.block_size is not None else 0
        fixed = options.type == "fixed"
        create_vhdx(path, VhdxOptions(size, block, options.sector_size, fixed=fixed, parent=parent))
        return
    vhdx_only = {
        "--parent": parent,
        "--block-size": options.block_size,
        "--type fixed": options.type == "fixed",
    }
    for flag, given in vhdx_only.items():
        if given:
            raise ConfigError(f"{flag}: only a VHDX has one; name the file .vhdx, or say --format vhdx")
    sector = options.sector_size or 512
    if not size or size % sector:
        flag = "--size" if options.verb == "convert" else "SIZE"
        raise ConfigError(f"{flag} {size}: say a multiple of {sector} bytes")
    try:
        with path.open("xb") as file:
            file.truncate(size)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None


def _convert(options: argparse.Namespace) -> int:
    from hvkvm.block.copy import copy
    from hvkvm.block.image import ImageOptions
    from hvkvm.block.open_image import open_image

    source = open_image(options.source, ImageOptions(format=options.source_format, read_only=True))
    try:
        size = size_of(options.size, "--size") if options.size is not None else source.size
        if size < source.size:
            raise ConfigError(f"--size {options.size}: the source has {source.size} bytes; say no less")
        options.sector_size = options.sector_size or source.sector_size
        path = Path(options.target)
        kind = _format_of(path, options)
        with made_beside(path) as partial:
            _make(partial, size, kind, options)
            sector = options.sector_size if options.sector_size in (512, 4096) else 0
            target = open_image(str(partial), ImageOptions(format=kind, sector_size=sector))
            try:
                with Progress(f"copying to {path}") as progress:
                    copy(source, target, progress)
            finally:
                target.close()
    finally:
        source.close()
    return 0


def _check(options: argparse.Namespace) -> int:
    try:
        image = _open(options.file, options)
        try:
            notes = []
            if image.format == "vhdx":
                from hvkvm.block.vhdx.check import check_vhdx
                from hvkvm.block.vhdx.image import VhdxImage

                notes = check_vhdx(image) if isinstance(image, VhdxImage) else []
        finally:
            image.close()
    except ImageDamaged as error:
        complain(f"hvkvm: {error}")
        return 1
    for note in notes:
        show(f"note: {note}")
    show(f"{options.file}: sound")
    return 0


def _compact(options: argparse.Namespace) -> int:
    path = Path(options.file)
    image = _open(options.file, options, write=True)
    try:
        before = os.stat(path).st_blocks * 512
        with Progress(f"compacting {path}") as progress:
            if image.format == "vhdx":
                from hvkvm.block.vhdx.compact import compact_vhdx
                from hvkvm.block.vhdx.image import VhdxImage

                if isinstance(image, VhdxImage):
                    compact_vhdx(image, progress)
            else:
                from hvkvm.block.copy import compact_raw
                from hvkvm.block.raw import RawImage

                if not isinstance(image, RawImage):
                    raise ConfigError(f"{path}: only a raw file or a VHDX can be compacted")
                compact_raw(image, progress)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    finally:
        image.close()
    show(f"{path}: {human(before)} before, {human(os.stat(path).st_blocks * 512)} now")
    return 0
