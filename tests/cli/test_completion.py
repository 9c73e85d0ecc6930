"""Completion, tried in bash itself; what the other shells get, by what is in it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from hvkvm.cli import VERBS
from hvkvm.cli.completion import bash, fish, parse, verbs, zsh
from hvkvm.errors import ConfigError


@pytest.fixture(scope="module")
def script() -> str:
    return bash(verbs())


def completed(script: str, line: str) -> list[str]:
    """What bash offers for the last word of `line`."""
    words = line.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    test = f'{script}\nCOMP_WORDS=({array})\nCOMP_CWORD={len(words) - 1}\n_hvkvm\necho "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", test], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_options_and_words(script: str) -> None:
    assert set(completed(script, "hvkvm ")) == {*VERBS, "--help", "--version"}
    assert completed(script, "hvkvm ru") == ["run"]
    assert "--kernel" in completed(script, "hvkvm run --k")
    assert "--modules-dir" in completed(script, "hvkvm run --kernel x --mod")
    assert completed(script, "hvkvm run --synic ") == ["auto", "kernel", "user"]
    assert completed(script, "hvkvm run --kernel ") == []  # a file: bash's own
    assert completed(script, "hvkvm run --kernel x -- --k") == []
    assert completed(script, "hvkvm ctl shu") == ["shutdown"]
    assert "--wait" in completed(script, "hvkvm ctl shutdown --w")
    assert "convert" in completed(script, "hvkvm disk ")
    assert completed(script, "hvkvm conform --format ") == ["table", "tap", "junit", "json"]


def test_every_option_of_every_verb_is_in_it(script: str) -> None:
    found = verbs()
    assert [verb.name for verb in found] == list(VERBS)
    shells = (script, zsh(found))
    for verb in found:
        for option in verb.options:
            for name in option.names:
                assert all(name in text for text in shells)
    lines = fish(found).splitlines()
    assert len([line for line in lines if "-l kernel " in line]) == 2  # run and warm
    assert all(re.sub(r"\\.", "", line).count("'") % 2 == 0 for line in lines[1:])


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose bash, zsh, fish"):
        parse(["tcsh"])
