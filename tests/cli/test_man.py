"""Manual pages: every verb has one, with every option, and what reads such pages takes them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from hvkvm.cli import VERBS
from hvkvm.cli.completion import verbs
from hvkvm.cli.man import overview, page, parse
from hvkvm.errors import ConfigError


def test_every_verb_has_a_page_with_every_option() -> None:
    for verb in verbs():
        text = page(verb.name)
        for option in verb.options:
            for name in option.names:
                assert name.replace("-", "\\-") in text, (verb.name, name)
        lines = text.splitlines()
        assert lines[0].startswith(f".TH HVKVM\\-{verb.name.upper()} 1")
        requests = {line.split()[0] for line in lines if line.startswith((".", "'"))}
        assert requests <= {".TH", ".SH", ".TP", ".B", ".I", ".BR", ".nf", ".fi"}
    text = overview()
    assert all(f"hvkvm\\-{verb}" in text or f"hvkvm-{verb}" in text for verb in VERBS)
    assert "2 usage" in text


def test_an_unknown_verb_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such verb"):
        parse(["rum"])


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
@pytest.mark.parametrize("name", ["", *VERBS])
def test_groff_has_nothing_to_say_about_it(name: str) -> None:
    text = page(name) if name else overview()
    command = ["groff", "-man", "-Tutf8", "-ww"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
