"""The control socket's requests that need the guest's help: a device on the bus carries each.

A request is answered once: by the guest, by its leaving, by the limit of time
that `control` sets, or at once when the device or its driver is not there. What
the guest has not been sent by the time that nobody waits for it is not sent any more:
a power-off must not meet a guest that comes back behind a `no answer`.

Owner: the I/O loop. ValueError is a mistake of the client and becomes its reply.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time
from typing import TYPE_CHECKING, Any

from hvkvm.abi import ic, keyboard, kvp
from hvkvm.observe.control_socket import Answer

if TYPE_CHECKING:
    from hvkvm.devices.synth.kvp import KvpReply
    from hvkvm.machine.parts import Parts

Request = dict[str, Any]
Handler = Callable[[Request, Answer], object]

POOLS = {"external": kvp.KVP_POOL_EXTERNAL, "guest": kvp.KVP_POOL_GUEST, "auto": kvp.KVP_POOL_AUTO}

MODULES = {
    "heartbeat": "hv_utils",
    "shutdown": "hv_utils",
    "timesync": "hv_utils",
    "kvp": "hv_utils, and hv_kvp_daemon running",
    "vss": "hv_utils, and hv_vss_daemon running",
    "keyboard": "hyperv_keyboard",
}
"""What a Linux guest needs for each device."""


Wait = Callable[[Answer, "int | None"], object]
"""wait(answer, resets): answers at the end of the run, or after one more reset than `resets`."""


def requests(parts: Parts, wait: Wait) -> dict[str, Handler]:
    """The handlers by name."""
    guest = _Guest(parts, wait)
    return {
        "heartbeat": guest.heartbeat,
        "shutdown": guest.shutdown,
        "time": guest.time,
        "keys": guest.keys,
        "kvp": guest.kvp,
        "freeze": guest.freeze,
        "thaw": guest.thaw,
    }


def number(request: Request, key: str, default: float, most: float) -> float:
    """A number of `request` above 0 and up to `most`. ValueError."""
    value = request.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ValueError(f'"{key}" is a number above 0 and up to {most:g}')
    return float(value)


def text(request: Request, key: str, choices: tuple[str, ...] = ()) -> str:
    """A text of `request`. ValueError for none, or for none of `choices`."""
    value = request.get(key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is missing, or no text')
    if choices and value not in choices:
        raise ValueError(f"{value[:40]}: choose {', '.join(choices)}")
    return value


class _Guest:
    def __init__(self, parts: Parts, wait: Wait) -> None:
        self._parts = parts
        self._wait = wait

    def _device(self, name: str, answer: Answer, *, driver: bool = True) -> Any:
        """The device, or None when it is not there; then the answer says why."""
        if self._parts.bus is None:
            answer.fail("absent", "this VM has no VMBus; start it with --vmbus on")
            return None
        device = getattr(self._parts.bus, name, None)
        if device is None:
            answer.fail("absent", f"this VM has no {name} device")
        elif driver and not device.ready_for_requests:
            answer.fail(
                "guest", f"no driver in the guest has taken the {name} device; it needs {MODULES[name]}"
            )
            return None
        return device

    def heartbeat(self, _request: Request, answer: Answer) -> None:
        device = self._device("heartbeat", answer)
        if device is not None:
            answer.ok({"alive": device.alive, "beats": device.beats, "missed": device.missed})

    def shutdown(self, request: Request, answer: Answer) -> None:
        """Have the guest do "what": power-off, reboot or hibernate. It answers before it acts."""
        what = text(request, "what", ("power-off", "reboot", "hibernate"))
        resets = self._parts.lifecycle.resets
        device = self._device("shutdown", answer)
        if device is None:
            return

        def reply(status: int, _body: bytes) -> None:
            if status == ic.HV_S_OK and request.get("wait"):
                self._wait(answer, resets if what == "reboot" else None)
            elif status == ic.HV_S_OK:
                answer.ok({"accepted": True})
            elif not device.ready_for_requests:
                answer.fail("guest", "the guest left without an answer")
            else:
                answer.fail("guest", f"the guest refuses to {what}: {ic.status_text(status)}")

        if not device.request(what, reply, _waits(answer)):
            answer.fail("guest", "too many requests wait for the guest already")

    def time(self, request: Request, answer: Answer) -> None:
        """To "sync" is to set the guest's clock to the host's, to "show" to tell what was sent to it."""
        what = text(request, "what", ("sync", "show"))
        device = self._device("timesync", answer, driver=what == "sync")
        if device is None:
            return
        version = device.message_version
        shown = {
            "host": time(),
            "driver": version is not None,
            "version": None if version is None else f"{version[0]}.{version[1]}",
            "sent": dict(device.sent),
        }
        if what == "show":
            answer.ok(shown)
            return

        def reply(status: int, _body: bytes) -> None:
            if status == ic.HV_S_OK:
                answer.ok({**shown, "sent": dict(device.sent)})
            else:
                answer.fail("guest", f"the guest did not take the time: {ic.status_text(status)}")

        if not device.sync(reply, _waits(answer)):
            answer.fail("guest", "too many requests wait for the guest already")

    def keys(self, request: Request, answer: Answer) -> None:
        """What to type as "text", or keys to press together: "press" has names, "scancode" make codes."""
        given = [key for key in ("text", "press", "scancode") if key in request]
        if len(given) != 1:
            raise ValueError('one of "text", "press" and "scancode" says what to type')
        content = text(request, given[0])
        if given[0] == "text":
            events = keyboard.text_events(content)
        else:
            parse = keyboard.parse_chord if given[0] == "press" else keyboard.parse_scan_codes
            events = keyboard.chord_events(parse(content))
        device = self._device("keyboard", answer)
        if device is None:
            return

        def typed(whole: bool) -> None:
            if whole:
                answer.ok({"events": len(events)})
            else:
                answer.fail("guest", "the guest left while keys waited for it")

        if not device.send_events(events, typed, _waits(answer)):
            answer.fail("guest", f"too many keys wait for the guest already ({device.waiting})")

    def kvp(self, request: Request, answer: Answer) -> None:
        """Key-value exchange: "what" is get, set, delete or list; "pool", "key" and "value" say with what."""
        what = text(request, "what", ("get", "set", "delete", "list"))
        pool = POOLS[text(request, "pool", tuple(POOLS))]
        key = "" if what == "list" else text(request, "key")
        value = text(request, "value") if what == "set" else ""
        device = self._device("kvp", answer)
        if device is None:
            return

        def reply(result: KvpReply) -> None:
            if result.status == ic.HV_S_CONT:
                answer.fail("missing", f"{key}: no such key in the pool {request['pool']}")
            elif not result.ok:
                answer.fail("guest", result.text)
            else:
                pairs = [[pair.key, _plain(pair.value)] for pair in result.pairs]
                answer.ok({"pairs": pairs, "note": result.note})

        wanted = _waits(answer)
        if what == "list":
            device.enumerate(pool, reply, wanted)
        elif what == "set":
            device.set(pool, key, value, reply, wanted)
        elif what == "delete":
            device.delete(pool, key, reply, wanted)
        else:
            device.get(pool, key, reply, wanted)

    def freeze(self, _request: Request, answer: Answer) -> None:
        self._snapshot("freeze", answer)

    def thaw(self, _request: Request, answer: Answer) -> None:
        self._snapshot("thaw", answer)

    def _snapshot(self, what: str, answer: Answer) -> None:
        device = self._device("vss", answer)
        if device is None:
            return

        def reply(result: Any) -> None:
            if what == "freeze" and result.ok and not answer.wanted:
                # Whoever asked has given up, and would not know that there is something to thaw.
                device.thaw(lambda _result: None)
            if result.ok:
                answer.ok({"state": device.state})
            else:
                answer.fail("guest", result.text)

        getattr(device, what)(reply)


def _waits(answer: Answer) -> Callable[[], bool]:
    """Whether somebody waits for it, as devices ask before they send."""
    return lambda: answer.wanted


def _plain(value: str | int | bytes) -> str | int:
    return value.hex() if isinstance(value, bytes) else value
