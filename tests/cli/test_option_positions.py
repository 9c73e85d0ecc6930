"""Every option of every verb at every position among the other words: the same is understood each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hvkvm.cli import ctl, disk
from hvkvm.cli.arguments import split_words
from hvkvm.cli.parsers import all_parsers
from hvkvm.errors import ConfigError

Parse = Callable[[list[str]], Any]

VALUES = {
    "--cpu": "1",
    "--timeout": "7",
    "--pool": "guest",
    "--synic": "user",
    "--format": "vhdx",
    "--source-format": "raw",
    "--type": "fixed",
    "--sector-size": "4096",
}
WORDS: dict[str, list[list[str]]] = {
    "ctl break": [[], ["h"], ["-"]],
    "ctl save": [["FILE"], ["-"]],
    "ctl screenshot": [["FILE.png"]],
    "disk info": [["FILE"]],
    "disk create": [["FILE"], ["FILE", "1G"]],
    "disk convert": [["FROM", "TO"]],
    "disk check": [["FILE"]],
    "disk compact": [["FILE"]],
    "completion": [["bash"]],
    "explain": [["FILE"], ["0e00"]],
    "replay": [["FILE"]],
    "matrix": [["FILE"]],
    "features": [[], ["host-model"]],
    "doctor": [[]],
    "run": [[]],
    "trace": [[]],
    "ctl time": [["sync"]],
    "ctl keys": [[], ["a b"], ["-"]],
    "ctl disk": [["list"], ["add", "FILE"], ["resize", "disk0", "1G"], ["eject", "-"]],
    "ctl net": [["list"], ["add", "user"], ["link", "net0", "down"]],
    "ctl kvp": [["get", "KEY"], ["set", "KEY", "VALUE"], ["list"], ["set", "KEY", "-1"]],
}
PARSERS = all_parsers()


def parse_of(name: str) -> Parse:
    if name.startswith(("ctl ", "disk ")):
        return ctl.parse if name.startswith("ctl ") else disk.parse
    return PARSERS[name].parse_args


def cases() -> list[Any]:
    return list(_cases())


def _cases() -> Iterator[Any]:
    for name, parser in PARSERS.items():
        for action in parser._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help"):
                    yield pytest.param(name, option, action.nargs is None, id=f"{name} {option}")


@pytest.mark.parametrize(("name", "option", "takes_value"), cases())
def test_an_option_may_stand_anywhere(name: str, option: str, takes_value: bool) -> None:
    parse = parse_of(name)
    verb = name.split()[1:]
    value = VALUES.get(option, "x")
    spellings = [[option, value], [f"{option}={value}"]] if takes_value else [[option]]
    for words in WORDS.get(name, [[]]):
        sentence = [*verb, *words]
        plain = vars(parse(sentence))
        expected = None
        for spelling in spellings:
            for at in range(len(sentence) + 1):
                got = vars(parse([*sentence[:at], *spelling, *sentence[at:]]))
                assert got != plain
                assert expected is None or got == expected, (spelling, at)
                expected = got


@pytest.mark.parametrize("name", PARSERS)
def test_all_options_at_once_before_and_behind(name: str) -> None:
    parse = parse_of(name)
    given = []
    for action in PARSERS[name]._actions:
        option = action.option_strings[-1] if action.option_strings else ""
        if option and option != "--help":
            given += [option, VALUES.get(option, "x")] if action.nargs is None else [option]
    for words in WORDS.get(name, [[]]):
        sentence = [*name.split()[1:], *words]
        assert vars(parse([*given, *sentence])) == vars(parse([*sentence, *given]))


@pytest.mark.parametrize("name", PARSERS)
def test_an_option_that_is_none_is_named_wherever_it_stands(name: str) -> None:
    for words in WORDS.get(name, [[]]):
        sentence = [*name.split()[1:], *words]
        for at in range(len(sentence) + 1):
            with pytest.raises(ConfigError, match="--nonsense"):
                parse_of(name)([*sentence[:at], "--nonsense", *sentence[at:]])


@pytest.mark.parametrize("name", PARSERS)
def test_a_value_that_is_missing_is_told(name: str) -> None:
    for option in sorted(PARSERS[name].value_options()):
        sentence = [*name.split()[1:], *WORDS.get(name, [[]])[0]]
        with pytest.raises(ConfigError, match=f"{option}(/--[a-z]+)?: expected one argument"):
            parse_of(name)([*sentence, option])


def test_words_behind_two_dashes_are_no_options() -> None:
    assert split_words(["a", "--x", "1", "--", "--x", "--"], {"--x"}) == (["--x", "1"], ["a", "--x", "--"])
    assert ctl.parse(["keys", "--", "-a"]).text == "-a"
    assert ctl.parse(["keys", "--json", "--", "--json"]).text == "--json"
    assert ctl.parse(["--json", "kvp", "set", "--", "--pool", "--vm"]).value == "--vm"


def test_an_option_of_another_verb_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--pool.*hvkvm ctl keys --help"):
        ctl.parse(["keys", "--pool", "guest", "a"])


def test_an_option_means_the_same_with_each_verb_of_ctl() -> None:
    """Else the verb behind it could not be told from its value."""
    with_value = set().union(*(ctl.verb_parser(verb).value_options() for verb in ctl.VERBS))
    for verb in ctl.VERBS:
        options = {name for action in ctl.verb_parser(verb)._actions for name in action.option_strings}
        assert options & with_value == ctl.verb_parser(verb).value_options()
    assert with_value == set().union(*(ctl.verb_parser(v).value_options() for v in ctl._WITH_OPTIONS))
