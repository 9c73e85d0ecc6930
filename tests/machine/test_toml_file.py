"""Values that TOML and the command line can spell and no machine can have: one line says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import fields_of
from hvkvm.machine.config_kinds import Number, Seconds, Size
from hvkvm.machine.fault_file import FaultSpec, read_plan
from hvkvm.machine.toml_file import parse_toml
from hvkvm.testing.matrix import file as matrix_file

Reader = Callable[[Path], object]
READERS: list[Reader] = [MachineConfig.from_toml, read_plan, matrix_file.read]


def said_of(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 1000
    return said


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a = " + "9" * 5000, "too many digits"),
        ("a = " + "9" * 400, "a: a number that is too large"),
        ("[a]\nb = [{c = 0x" + "f" * 5000 + "}]", "a.b.c: a number that is too large"),
        ("a = -9223372036854775809", "a: a number that is too large"),
        ("a = " + "[" * 5000, "nested too deep"),
        ("a = '\udcff'", "codec can't decode"),
        ("a =", "Invalid value"),
    ],
    ids=["digits", "float", "hexadecimal", "negative", "nested", "bytes", "syntax"],
)
def test_no_file_is_more_than_a_line(reader: Reader, text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    said = said_of(lambda: reader(path))
    assert str(path) in said
    assert why in said


def test_what_64_bits_hold_is_read() -> None:
    assert parse_toml("a = 9223372036854775807\nb = 1e400", "x") == {"a": (1 << 63) - 1, "b": float("inf")}


VALUES: list[dict[str, object]] = [
    {key: "a\0b"} for key in fields_of(MachineConfig) if key not in ("acpi", "reboot", "pci", "awaits")
]
VALUES += [
    {"disks": ["a\0b"]}, {"disks": [{"file": "a\0b"}]}, {"cdroms": [{"file": "a\0b"}]},
    {"record": [{"file": "a\0b"}]}, {"command": ["a\0b"]}, {"modules": ["a\0b"]},
    {"files": {"/a": "a\0b"}}, {"files": {"/a\0b": "/dev/null"}}, {"nets": ["a\0b"]},
]  # fmt: skip


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_no_key_takes_nul(values: dict[str, object], tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.touch()
    said = said_of(lambda: MachineConfig.from_mapping({"kernel": str(kernel), "vmbus": "on", **values}))
    assert next(iter(values)).removesuffix("s").split("_")[0] in said


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["", "negative", "long"])
def test_no_kind_takes_a_number_beyond_64_bits(value: int) -> None:
    faults = [fields_of(FaultSpec)[key].kind for key in ("lba", "op", "after", "probability")]
    for kind in (Number(2), Seconds(2), Size(), *faults):
        said = said_of(partial(kind.from_plain, "config key x", value, None))
        assert said.startswith("config key x: ")
    said_of(lambda: MachineConfig.from_mapping({"kernel": [value]}))


@pytest.mark.parametrize("text", ["0x" + "f" * 5000, "9" * 5000, "-0x" + "f" * 5000, str(1 << 64)], ids=len)
def test_no_text_is_a_number_beyond_64_bits(text: str) -> None:
    assert said_of(lambda: Number(2).from_text("--cpus", text)).startswith("--cpus ")
    assert said_of(lambda: Size().from_text("--memory", text)).startswith("--memory ")
