"""Structured options, `--flag WORD,key=value,...`: what they take, and the one line for what they do not."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.errors import ConfigError
from hvkvm.machine.config_fields import Field
from hvkvm.machine.config_kinds import Choice, Kind, Number, OnOff, PathName, Size, Words
from hvkvm.machine.config_words import Structured, parse_words


class Spec(NamedTuple):
    """A type of every kind."""

    file: Annotated[str, Field(Kind(), "FILE", "the image")]
    cache: Annotated[Literal["none", "write"], Field(Choice(("none", "write")), "none|write", "caching")] = (
        "none"
    )
    read_only: Annotated[bool, Field(OnOff(), "on|off", "refuse writes")] = False
    size: Annotated[int, Field(Size(), "SIZE", "bytes")] = 0
    queues: Annotated[int, Field(Number(4), "N", "queues")] = 1
    log: Annotated[Path | None, Field(PathName(), "PATH", "log")] = None
    forward: Annotated[tuple[str, ...], Field(Words(), "A-B", "ports")] = ()

    def check(self, name: str) -> None:
        if self.read_only and self.queues > 1:
            raise ConfigError(f"{name} queues={self.queues}: of no use with read-only; leave one out")


KIND = Structured(__name__, "Spec")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' modules cannot be imported by name."""
    monkeypatch.setattr(Structured, "type", lambda _self: Spec)


def read(text: str) -> Spec:
    spec = KIND.from_text("--disk", text)
    assert isinstance(spec, Spec)
    KIND.check("--disk", (spec,))
    return spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.img", Spec("a.img")),
        ("file=a.img,cache=write", Spec("a.img", "write")),
        ("a.img,read-only", Spec("a.img", read_only=True)),
        ("a.img,read_only=off,size=1G", Spec("a.img", size=1 << 30)),
        ("a,,b.img,queues=0x10", Spec("a,b.img", queues=16)),
        ("a,,,cache=write", Spec("a,", "write")),
        ("cache=write,file=a=b", Spec("a=b", "write")),
        ("nbd+unix:///disk?socket=/run/x,cache=write", Spec("nbd+unix:///disk?socket=/run/x", "write")),
        ("a,forward=1-2,forward=3,,4-5", Spec("a", forward=("1-2", "3,4-5"))),
        ("a,log=x", Spec("a", log=Path("x"))),
    ],
)
def test_what_is_read(text: str, spec: Spec) -> None:
    assert read(text) == spec


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,cach=none", "--disk cach=none: no key cach; the keys are file, cache, read-only, "),
        ("a=b.img", "--disk a=b.img: no key a; the keys are .* and a file with = in it is written file="),
        ("a,fast", "--disk fast: no key fast; the keys are "),
        ("a,cache=slow", "--disk cache=slow: unknown; choose none, write$"),
        ("a,cache", "--disk cache=: has no value; write one behind it$"),
        ("a,read-only=maybe", "--disk read-only=maybe: neither on nor off; choose one$"),
        ("a,size=5x", "--disk size=5x: not a size; write a number"),
        ("a,queues=x", "--disk queues=x: not a number; write one, such as --disk queues=4$"),
        ("a,size=1G,size=2G", "--disk size=2G: given twice; leave one out$"),
        ("a,file=b", "--disk file=b: given twice; leave one out$"),
        ("cache=none", "--disk: no file; add file=...$"),
        ("a,", "--disk a,: an empty item; remove it, or write a comma in a value twice$"),
        ("", "--disk : an empty item"),
        ("a\0", "--disk: cannot hold NUL; remove it$"),
        ("a,read-only,queues=2", "--disk queues=2: of no use with read-only; leave one out$"),
    ],
)
def test_what_is_not_is_one_line_with_flag_key_reason_and_remedy(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        read(text)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        spec = parse_words(Spec, "--disk", text)
    except ConfigError as error:
        assert str(error).startswith("--disk")
    else:
        assert isinstance(spec, Spec)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_every_value_can_be_written(value: str) -> None:
    assert parse_words(Spec, "--disk", "file=" + value.replace(",", ",,")) == Spec(value)


def test_toml_takes_tables_and_text_and_paths_start_at_the_file(tmp_path: Path) -> None:
    plain = [{"file": "a", "log": "x", "forward": ["1", "2"]}, "b,log=y,read-only"]
    assert KIND.from_plain("config key disks", plain, tmp_path) == (
        Spec("a", log=tmp_path / "x", forward=("1", "2")),
        Spec("b", read_only=True, log=tmp_path / "y"),
    )


@pytest.mark.parametrize(
    ("plain", "line"),
    [
        ("a", r"config key disks: 'a' has the wrong type"),
        ([3], r"config key disks\[0\]: 3 has the wrong type"),
        (["a", {"size": 3}], r"config key disks\[1\]: no file; add file=..."),
        ([{"file": "a", "x": 3}], r"config key disks\[0\] x: unknown; the keys are"),
        ([{"file": "a", "read_only": "on"}], r"config key disks\[0\] read_only: 'on' has the wrong type"),
    ],
)
def test_bad_toml_names_the_key(plain: object, line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        KIND.from_plain("config key disks", plain, tmp_path)


def test_the_help_lists_the_keys() -> None:
    assert "; cache=none|write: caching; read-only=on|off: refuse writes" in KIND.more_help()
