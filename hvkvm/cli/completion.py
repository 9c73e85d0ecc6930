"""`hvkvm completion`: what a shell completes of our commands, made from the verbs' own parsers."""

from __future__ import annotations

import re
from argparse import Action
from collections.abc import Iterable
from typing import Any, NamedTuple

from hvkvm.cli.arguments import Parser
from hvkvm.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
EPILOG = """examples:
  hvkvm completion bash
  hvkvm completion fish

  eval "$(hvkvm completion bash)" in ~/.bashrc, the same with zsh in ~/.zshrc; for
  fish its output goes to ~/.config/fish/completions/hvkvm.fish
"""
_WORD = re.compile(r"[a-z][a-z0-9.-]*")


class Option(NamedTuple):
    """An option: its names, whether it takes a value, words that the value may be, and its help."""

    names: tuple[str, ...]
    takes_value: bool
    words: tuple[str, ...]
    help: str


class Verb(NamedTuple):
    """A verb, what it does, its own verbs if it has such, and its options."""

    name: str
    help: str
    verbs: tuple[str, ...]
    options: tuple[Option, ...]


def parser() -> Parser:
    """The options."""
    p = Parser("hvkvm completion", "Print what a shell needs to complete hvkvm's words.", EPILOG)
    p.add_argument("shell", metavar="|".join(SHELLS), help="which shell")
    return p


def parse(arguments: list[str]) -> Any:
    """The checked options. ConfigError."""
    options = parser().parse_args(arguments)
    if options.shell not in SHELLS:
        raise ConfigError(f"{options.shell}: no such shell here; choose {', '.join(SHELLS)}")
    return options


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parse(arguments)
    from hvkvm.cli.output import show

    show({"bash": bash, "zsh": zsh, "fish": fish}[options.shell](verbs()))
    return 0


def verbs() -> list[Verb]:
    """All of them, by their parsers."""
    from hvkvm.cli import VERBS
    from hvkvm.cli.parsers import own_verbs, parsers_of

    found = []
    for name, text in VERBS.items():
        options: dict[tuple[str, ...], Option] = {}
        for one in parsers_of(name).values():
            for action in one._actions:
                if action.option_strings:
                    option = _option(action)
                    options.setdefault(option.names, option)
        found.append(Verb(name, text, tuple(own_verbs(name)), tuple(options.values())))
    return found


def _option(action: Action) -> Option:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    words = tuple(word for word in metavar.split("|") if _WORD.fullmatch(word)) if "|" in metavar else ()
    text = " ".join((action.help or "").split())
    return Option(tuple(action.option_strings), action.nargs != 0, words, text)


def bash(found: list[Verb]) -> str:
    """A function for bash's `complete`. Behind `--` it completes files, as where a value is a path."""
    lines = [
        "# hvkvm's words, for bash: made by `hvkvm completion bash`.",
        "_hvkvm() {",
        '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" word words=""',
        "    COMPREPLY=()",
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f"        {_words([*(verb.name for verb in found), '--help', '--version'])}",
        "        return",
        "    fi",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        '        if [ "$word" = -- ]; then return; fi',
        "    done",
        '    case "${COMP_WORDS[1]}:$prev" in',
    ]
    for verb in found:
        for option in verb.options:
            if option.takes_value:
                patterns = "|".join(f"{verb.name}:{name}" for name in option.names)
                if option.words:
                    lines.append(f"        {patterns}) {_words(option.words)}; return ;;")
                else:
                    lines.append(f"        {patterns}) return ;;")
    lines += ["    esac", '    case "${COMP_WORDS[1]}" in']
    for verb in found:
        names = [name for option in verb.options for name in option.names]
        lines.append(f'        {verb.name}) words="{" ".join(names)}" ;;')
    lines += ["    esac", '    case "${COMP_WORDS[1]}:$COMP_CWORD" in']
    for verb in found:
        if verb.verbs:
            lines.append(f'        {verb.name}:2) words="{" ".join(verb.verbs)} $words" ;;')
    lines += [
        "    esac",
        '    case "$COMP_CWORD:$cur" in',
        '        2:*|*:-*) COMPREPLY=($(compgen -W "$words" -- "$cur")) ;;',
        "    esac",
        "}",
        "complete -o default -F _hvkvm hvkvm",
    ]
    return "\n".join(lines)


def _words(words: Iterable[str]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$cur"))'


def zsh(found: list[Verb]) -> str:
    """The same, by zsh's support of bash's functions."""
    return f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{bash(found)}"


def fish(found: list[Verb]) -> str:
    """Lines of fish's `complete`."""
    lines = ["# hvkvm's words, for fish: made by `hvkvm completion fish`."]
    for verb in found:
        lines.append(f"complete -c hvkvm -n __fish_use_subcommand -f -a {verb.name} -d {_quoted(verb.help)}")
        seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
        if verb.verbs:
            lines.append(f"complete -c hvkvm {seen} -f -a {_quoted(' '.join(verb.verbs))}")
        for option in verb.options:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
            )
            value = f" -x -a {_quoted(' '.join(option.words))}" if option.words else " -r"
            value = value if option.takes_value else ""
            lines.append(f"complete -c hvkvm {seen} {names}{value} -d {_quoted(option.help)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
