"""Our NamedTuple does what typing's does, for all that a module may do with one."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hvkvm import tuples


class Ours(tuples.NamedTuple):
    """A doc."""

    first: int
    second: str = "two"
    """Of the field."""
    third: tuple[int, ...] = ()

    @property
    def both(self) -> str:
        return f"{self.first}{self.second}"


class Theirs(typing.NamedTuple):
    """A doc."""

    first: int
    second: str = "two"
    """Of the field."""
    third: tuple[int, ...] = ()

    @property
    def both(self) -> str:
        return f"{self.first}{self.second}"


class Empty(tuples.NamedTuple):
    pass


BOTH = pytest.mark.parametrize("kind", [Ours, Theirs])


@BOTH
def test_values_and_fields(kind: Any) -> None:
    made = kind(1, third=(3,))
    assert made == (1, "two", (3,))
    assert (made.first, made.second, made.third, made.both) == (1, "two", (3,), "1two")
    assert made._asdict() == {"first": 1, "second": "two", "third": (3,)}
    assert repr(made) == f"{kind.__name__}(first=1, second='two', third=(3,))"
    assert kind._fields == kind.__match_args__ == ("first", "second", "third")
    assert kind._field_defaults == {"second": "two", "third": ()}
    assert kind._make([4, "x", ()]) == kind(4, "x")
    assert type(kind._make(iter((4, "x", ())))) is kind
    with pytest.raises(TypeError):
        kind._make([4])
    assert hash(made) == hash((1, "two", (3,)))
    assert isinstance(made, tuple)
    match made:
        case kind(first, _, (third,)):
            assert (first, third) == (1, 3)


@BOTH
def test_replace_makes_another_of_its_kind(kind: Any) -> None:
    made = kind(1)
    other = made._replace(second="x")
    assert type(other) is kind
    assert other == (1, "x", ())
    assert made.second == "two"
    with pytest.raises((TypeError, ValueError)):
        made._replace(fourth=4)


@BOTH
def test_it_is_copied_and_pickled_and_has_no_room_for_more(kind: Any) -> None:
    made = kind(1)
    for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(again) is kind
        assert again == made
    for name in ("fourth", "first"):
        with pytest.raises(AttributeError):
            setattr(made, name, 4)
    assert not hasattr(made, "__dict__")


@BOTH
def test_what_is_known_of_the_class(kind: Any) -> None:
    assert get_type_hints(kind) == {"first": int, "second": str, "third": tuple[int, ...]}
    assert str(inspect.signature(kind)).replace("'", "").startswith("(first")
    assert list(inspect.signature(kind).parameters) == ["first", "second", "third"]
    assert kind.__doc__ == "A doc."
    assert kind.__new__.__qualname__ in (f"{kind.__name__}.__new__", "namedtuple_Theirs.__new__", "__new__")


@BOTH
def test_wrong_calls(kind: Any) -> None:
    for given in ((), (1, "x", (), 4)):
        with pytest.raises(TypeError):
            kind(*given)
    with pytest.raises(TypeError):
        kind(1, fourth=4)


def test_a_field_without_default_behind_one_that_has_it() -> None:
    fields = {"__annotations__": {"first": "int", "second": "int"}, "first": 1}
    maker: Any = type(tuples.NamedTuple)
    with pytest.raises(TypeError, match="without a default"):
        maker("Wrong", (tuples.NamedTuple,), fields)


def test_none_and_one() -> None:
    class One(tuples.NamedTuple):
        only: int

    assert Empty() == ()
    assert One(1) == (1,)


def test_a_derived_class_has_the_fields_and_methods_of_its_own() -> None:
    class More(Ours):
        def doubled(self) -> int:
            return self.first * 2

    assert More(2).doubled() == 4
    assert type(More(2)._replace(first=3)) is More


def test_what_a_machine_is_made_of_makes_its_tuples_here() -> None:
    """typing's cost a tenth of a run's start, and a sixth where it had VMBus, a disk and a network.

    Many modules are imported only by a machine that has such a device, so this looks into the files. Commands
    that start no machine, and what only tests import, may do as they like.
    """
    package = Path(tuples.__file__).parent
    apart = {package / room for room in ("cli", "testing")}
    found = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if not apart & set(path.parents) and path.stem != "tuples" and _from_typing(path)
    ]
    assert found == []


def _from_typing(path: Path) -> bool:
    imports = re.findall(r"^from typing import (\([^)]*\)|.*)", path.read_text(), re.MULTILINE)
    return any("NamedTuple" in names for names in imports)


def test_what_devices_are_made_of_imports_nothing_dear() -> None:
    """dataclasses took a fifteenth of what a run with a NIC takes to start, hashlib a fiftieth of any."""
    program = """
import sys
import hvkvm.machine.bus, hvkvm.machine.disks, hvkvm.machine.nics, hvkvm.machine.guest_image, hvkvm.net.port
import hvkvm.devices.scsi.inquiry, hvkvm.devices.synth.netvsp, hvkvm.devices.synth.storvsp
import hvkvm.block.vhdx.image, hvkvm.boot.smbios, hvkvm.boot.initramfs, hvkvm.boot.vmlinux
from hvkvm.digest import sha1, sha256
dear = {"dataclasses", "inspect", "_hashlib", "secrets", "random", "shutil", "tempfile", "subprocess"}
if sha256.__module__ == "_hashlib":  # a Python that was built without its own
    dear.remove("_hashlib")
print(*sorted(dear & set(sys.modules)))
import hashlib
for ours, theirs in (sha1, hashlib.sha1), (sha256, hashlib.sha256):
    assert ours(b"x").digest() == theirs(b"x").digest()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_run_of_the_command_makes_none_of_typings() -> None:
    program = """
import sys, typing
import hvkvm.cli.run, hvkvm.cli.front, hvkvm.machine.machine
own = [module for name, module in sys.modules.items() if name.startswith("hvkvm") and name != "hvkvm.tuples"]
print(*sorted(one.__name__ for one in own if getattr(one, "NamedTuple", None) is typing.NamedTuple))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")
