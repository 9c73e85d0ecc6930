"""`hvkvm ctl`: operate a running guest through its VM's control socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hvkvm.cli import ctl_net, ctl_text
from hvkvm.cli.arguments import Parser, path_word, split_words
from hvkvm.cli.ctl_client import MissingKey, Vm, find
from hvkvm.cli.output import complain, show
from hvkvm.errors import ConfigError, HvkvmError, VmGone, harmless
from hvkvm.observe import control_path

EPILOG = """verbs:
  list                      the VMs that run
  info                      configuration, enlightenments, up time, resets, exits
  inspect                   channels, rings, routes, devices: as they are now
  dump                      who waits for what, as SIGQUIT prints it
  shutdown|reboot|hibernate ask the guest; --wait until it has happened
  heartbeat                 whether the guest's driver answers
  time sync|show            set the guest's clock to the host's
  keys TEXT                 type; --press ctrl-alt-delete, --scancode 1d,38,e053
  break [KEYS]              break on the serial console; Linux takes the next key as SysRq
  nmi                       interrupt that cannot be masked, for --cpu N or for each
  save FILE                 the whole VM, for hvkvm run --restore FILE; it runs on
  dmesg                     a Linux guest's kernel log, read from its RAM
  screenshot FILE.png       what the guest's framebuffer shows
  net list|stats            the NICs; add WIRE, remove NAME, link NAME up|down
  kvp get|set|delete|list   key-value exchange with the guest's daemon
  freeze, thaw              the guest's file systems, for a snapshot
  disk list|add|remove|...  disks and DVD drives, while the guest runs
  quit                      end the run now

`hvkvm ctl VERB --help` explains a verb's options.

VMs are looked for in $XDG_RUNTIME_DIR/hvkvm and /tmp/hvkvm-UID, or in $HVKVM_CONTROL_DIR, an absolute path.

exit status:
  0 done; 1 the guest or the VM refused or did not answer, and the line says why;
  2 usage, or no VM or several to choose from; 69 no such VM, or it ended meanwhile;
  74 it was done, but the answer could not be written; 130 interrupted
"""

Options = Any
POOLS = ("external", "guest", "auto")
USUAL_SECONDS = 10.0
SECONDS = {
    "list": 2.0,
    **dict.fromkeys(("dump", "shutdown", "reboot", "hibernate", "quit"), 30.0),
    "net": 30.0,  # a guest that holds its NIC is waited for when that is taken away
    "kvp": 40.0,  # Linux itself gives its daemon 30 s
    **dict.fromkeys(("freeze", "thaw", "screenshot"), 60.0),
    "disk": 60.0,  # an image that is taken away is flushed first
    "dmesg": 60.0,  # all RAM that the guest has written is searched
    "save": 600.0,
}
"""How long a verb waits for its answer, where it is not USUAL_SECONDS."""
WAIT_SECONDS = 300.0
ADDRESS_SECONDS = 2.0
MOST_SECONDS = 24 * 3600.0

_WITH_OPTIONS = ("shutdown", "keys", "kvp", "nmi", "disk")
"""Verbs that between them have every option."""
_REQUESTED = {"shutdown": "power-off", "reboot": "reboot", "hibernate": "hibernate"}


def _common(parser: Parser, seconds: str) -> None:
    """What every verb takes; `seconds` are those of --timeout, where it is not given."""
    parser.add_argument("--vm", metavar="NAME|PID|PATH", help="which VM (the only one that runs)")
    parser.add_argument("--timeout", metavar="S", help=f"how long to wait for the answer ({seconds})")
    parser.add_argument("--json", action="store_true", help="print JSON")


def verb_parser(verb: str) -> Parser:
    """The options and words of one verb; an option's name means the same with each that has it."""
    parser = Parser(f"hvkvm ctl {verb}", ctl_text.SUMMARY[verb])
    more = f"; with --wait {WAIT_SECONDS:g}" if verb in _REQUESTED else ""
    _common(parser, f"{SECONDS.get(verb, USUAL_SECONDS):g}{more}")
    if verb in _REQUESTED:
        parser.add_argument("--wait", action="store_true", help="until it has happened")
    elif verb == "time":
        parser.add_argument("what", choices=("sync", "show"), help="set the guest's clock, or tell of it")
    elif verb == "keys":
        parser.add_argument("text", nargs="?", metavar="TEXT", help="what to type, on a US keyboard")
        parser.add_argument("--enter", action="store_true", help="press Enter behind TEXT")
        parser.add_argument("--press", metavar="KEYS", help="press together: ctrl-alt-delete, alt-f2, esc")
        parser.add_argument("--scancode", metavar="CODES", help="press together, by code set 1: 1d,38,e053")
    elif verb == "break":
        parser.add_argument(
            "keys", nargs="?", metavar="KEYS", help="what to type behind it; h lists SysRq keys"
        )
    elif verb == "save":
        parser.add_argument(
            "file", type=path_word, metavar="FILE", help="where to; one that is there is replaced"
        )
        parser.add_argument("--end", action="store_true", help="end the run at that: for a VM with disks")
        parser.add_argument("--compress", action="store_true", help="by zstd, for keeping: small, and slower")
    elif verb == "screenshot":
        parser.add_argument(
            "file", type=path_word, metavar="FILE.png", help="where to; one that is there is replaced"
        )
    elif verb == "nmi":
        parser.add_argument("--cpu", metavar="N", help="for this vCPU only")
    elif verb == "disk":
        from hvkvm.cli import ctl_disk

        parser.epilog = ctl_disk.HELP
        parser.add_argument("what", choices=tuple(ctl_disk.WORDS))
        parser.add_argument("words", nargs="*", metavar="WORD", help="see below")
        parser.add_argument("--cdrom", action="store_true", help="add a DVD drive")
        parser.add_argument("--force", action="store_true", help="eject what the guest holds")
    elif verb == "net":
        ctl_net.arguments(parser)
    elif verb == "kvp":
        parser.add_argument("what", choices=("get", "set", "delete", "list"))
        parser.add_argument("key", nargs="?", metavar="KEY")
        parser.add_argument("value", nargs="?", metavar="VALUE")
        pool = "which pool (list: auto; set, delete: external; get: the first that has the key)"
        parser.add_argument("--pool", choices=POOLS, help=pool)
    return parser


def parse(arguments: Sequence[str]) -> Options:
    """The options with `verb`. ConfigError for what makes no sense."""
    from itertools import chain

    parser = Parser("hvkvm ctl", "Operate a running guest.", EPILOG)
    parser.usage = "hvkvm ctl [--vm NAME|PID|PATH] [--timeout S] [--json] VERB ..."
    _common(parser, "as each verb's --help says")
    # Options may stand before the verb too, so all of them must be known to tell their values from it.
    with_value = set(chain.from_iterable(verb_parser(verb).value_options() for verb in _WITH_OPTIONS))
    options, words = split_words(arguments, with_value)
    if not words:
        parser.parse_args(options)
        raise ConfigError(f"no verb; choose {', '.join(VERBS)}")
    verb = words.pop(0)
    if verb not in VERBS:
        raise ConfigError(f"{verb}: no such verb; choose {', '.join(VERBS)}")
    parsed = verb_parser(verb).parse_args([*options, "--", *words])
    parsed.verb = verb
    if parsed.timeout is not None:
        parsed.timeout = _seconds(parsed.timeout)
    return parsed


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MOST_SECONDS:
        limit = f"above 0 and up to {MOST_SECONDS:.0f} (24 h)"
        raise ConfigError(
            f"--timeout {text}: not a number of seconds {limit}; write one, such as --timeout 30"
        )
    return seconds


def main(arguments: list[str]) -> int:
    """Run the verb; returns the exit status."""
    options = parse(arguments)
    return VERBS[options.verb](options)


def _tell(options: Options, result: Any, text: Callable[[Any], str]) -> int:
    """Print what came: JSON when asked, else `text` of it."""
    if options.json:
        from json import dumps

        show(dumps(result, indent=2))
    else:
        show(text(result))
    return 0


def _seconds_of(options: Options) -> float:
    """How long to wait for the verb's answer."""
    return options.timeout or SECONDS.get(options.verb, USUAL_SECONDS)


def _ask(options: Options, do: str, **request: Any) -> Any:
    with find(options.vm) as vm:
        return vm.ask(do, _seconds_of(options), **request)


def _list(options: Options) -> int:
    found = []
    for path in control_path.sockets():
        record: dict[str, Any] = {"name": path.stem, "socket": str(path)}
        try:
            with Vm(path) as vm:
                record["pid"] = vm.pid
                info = vm.ask("info", _seconds_of(options))
            record |= {key: info[key] for key in ("uptime", "resets", "synic", "vmbus_version")}
            record |= {key: info["config"].get(key) for key in ("kernel", "firmware")}
        except VmGone:
            continue
        except HvkvmError as error:
            record["error"] = str(error)
        found.append(record)
    return _tell(options, found, ctl_text.vm_list)


def _info(options: Options) -> int:
    with find(options.vm) as vm:
        info = vm.ask("info", _seconds_of(options))
        if info["vmbus_version"] is not None:
            info["addresses"] = _addresses(vm)
    return _tell(options, info, ctl_text.info)


def _addresses(vm: Vm) -> list[str]:
    """The guest's, as its daemon for key-value exchange tells them; none where none runs."""
    found: list[str] = []
    for key in ("NetworkAddressIPv4", "NetworkAddressIPv6"):
        try:
            pairs = vm.ask("kvp", ADDRESS_SECONDS, what="get", pool="auto", key=key)["pairs"]
        except VmGone:
            raise
        except HvkvmError:
            continue
        found += [address for _key, value in pairs for address in str(value).split(";") if address]
    return found


def _inspect(options: Options) -> int:
    return _tell(options, _ask(options, "inspect"), ctl_text.inspect)


def _dump(options: Options) -> int:
    return _tell(options, _ask(options, "dump"), str)


def _quit(options: Options) -> int:
    with find(options.vm) as vm:
        return _tell(options, _until_end(vm, "quit", _seconds_of(options)), ctl_text.ended)


def _until_end(vm: Vm, do: str, seconds: float, **request: Any) -> dict[str, Any]:
    """How it ended; a VM that goes before it can say so has ended too."""
    try:
        result: dict[str, Any] = vm.ask(do, seconds, **request)
        return result
    except VmGone:
        return {"ending": "ended"}


def _shutdown(options: Options) -> int:
    what = _REQUESTED[options.verb]
    with find(options.vm) as vm:
        if options.wait:
            ended = _until_end(vm, "shutdown", options.timeout or WAIT_SECONDS, what=what, wait=True)
            return _tell(options, ended, ctl_text.ended)
        accepted = vm.ask("shutdown", _seconds_of(options), what=what)
        return _tell(options, accepted, lambda _result: f"the guest accepts: {what}")


def _heartbeat(options: Options) -> int:
    result = _ask(options, "heartbeat")
    _tell(options, result, ctl_text.heartbeat)
    return 0 if result["alive"] else 1


def _time(options: Options) -> int:
    return _tell(options, _ask(options, "time", what=options.what), ctl_text.time)


def _keys(options: Options) -> int:
    given = {key: getattr(options, key) for key in ("text", "press", "scancode")}
    given = {key: value for key, value in given.items() if value is not None}
    if options.enter and given.keys() <= {"text"}:
        given["text"] = given.get("text", "") + "\n"
    if len(given) != 1 or (options.enter and "text" not in given):
        raise ConfigError("keys: what to type? give TEXT, --press or --scancode, and one of them only")
    return _tell(
        options, _ask(options, "keys", **given), lambda result: f"{result['events']} key events sent"
    )


def _break(options: Options) -> int:
    more = {} if options.keys is None else {"keys": options.keys}

    def text(result: dict[str, Any]) -> str:
        return (
            "break sent"
            if result["listens"]
            else "break sent, but nothing in the guest reads its console yet"
        )

    return _tell(options, _ask(options, "break", **more), text)


def _nmi(options: Options) -> int:
    cpu = options.cpu
    if cpu is not None and not (cpu.isascii() and cpu.isdecimal() and len(cpu) < 9):
        raise ConfigError(f"--cpu {cpu}: not the number of a vCPU; write one, such as --cpu 0")
    result = _ask(options, "nmi", **({} if cpu is None else {"cpu": int(cpu)}))
    return _tell(options, result, ctl_text.nmi)


def _save(options: Options) -> int:
    file = _absolute(options.file)
    result = _ask(options, "save", file=file, end=options.end, compress=options.compress)
    return _tell(options, result, lambda result: f"saved to {harmless(result['file'])}")


def _absolute(file: str) -> str:
    from hvkvm.machine.own_files import absolute

    return absolute(file)


def _dmesg(options: Options) -> int:
    return _tell(options, _ask(options, "dmesg"), lambda result: ctl_text.dmesg(result["lines"]))


def _screenshot(options: Options) -> int:
    result = _ask(options, "screenshot", file=_absolute(options.file))
    return _tell(options, result, ctl_text.screenshot)


def _net(options: Options) -> int:
    result = _ask(options, "net", **ctl_net.request(options))
    return _tell(options, result, ctl_net.text_of(options))


def _kvp(options: Options) -> int:
    what, key, value = options.what, options.key, options.value
    wanted = {"list": 0, "set": 2}.get(what, 1)
    if (key is not None) + (value is not None) != wanted:
        takes = ("nothing more", "a KEY", "a KEY and a VALUE")[wanted]
        raise ConfigError(f"kvp {what}: takes {takes}; see hvkvm ctl kvp --help")
    more = {name: text for name, text in (("key", key), ("value", value)) if text is not None}
    with find(options.vm) as vm:
        seconds = _seconds_of(options)
        if options.pool is not None or what != "get":
            pool = options.pool or ("auto" if what == "list" else "external")
            return _tell_kvp(options, vm.ask("kvp", seconds, what=what, pool=pool, **more))
        for pool in POOLS:
            try:
                return _tell_kvp(options, vm.ask("kvp", seconds, what=what, pool=pool, **more))
            except MissingKey:
                continue
    raise MissingKey(f"{key}: no such key in any pool")


def _tell_kvp(options: Options, result: dict[str, Any]) -> int:
    if options.json:
        _tell(options, dict(result["pairs"]), str)
    elif lines := ctl_text.kvp(options.what, result):
        show("\n".join(lines))
    if result["note"]:  # no pair, and so no part of what a program reads
        complain(f"hvkvm: {harmless(result['note'])}")
    return 0


def _freeze(options: Options) -> int:
    return _tell(options, _ask(options, "freeze"), ctl_text.snapshot)


def _thaw(options: Options) -> int:
    return _tell(options, _ask(options, "thaw"), ctl_text.snapshot)


def _disk(options: Options) -> int:
    from hvkvm.cli import ctl_disk

    asked = ctl_disk.request(options.what, options.words, cdrom=options.cdrom, force=options.force)
    result = _ask(options, "disk", **asked)
    return _tell(options, result, lambda result: ctl_text.harmless_lines(ctl_disk.text(options.what, result)))


VERBS: dict[str, Callable[[Options], int]] = {
    "list": _list,
    "info": _info,
    "inspect": _inspect,
    "dump": _dump,
    **dict.fromkeys(_REQUESTED, _shutdown),
    "heartbeat": _heartbeat,
    "time": _time,
    "keys": _keys,
    "break": _break,
    "nmi": _nmi,
    "save": _save,
    "dmesg": _dmesg,
    "screenshot": _screenshot,
    "net": _net,
    "kvp": _kvp,
    "freeze": _freeze,
    "thaw": _thaw,
    "disk": _disk,
    "quit": _quit,
}
"""The verbs, and what each does."""
