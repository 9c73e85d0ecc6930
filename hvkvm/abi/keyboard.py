"""The synthetic keyboard: its messages, and scan code set 1 with a US layout.

Why: the device, `hvkvm ctl keys` and the tests must mean the same key by the
same name. Messages are those of Linux's hyperv-keyboard.c; there is no pipe
header. Numbers and layouts only; anyone may import this.
"""

from __future__ import annotations

from struct import Struct

from hvkvm.tuples import NamedTuple

SYNTH_KBD_PROTOCOL_REQUEST = 1
SYNTH_KBD_PROTOCOL_RESPONSE = 2
SYNTH_KBD_EVENT = 3
SYNTH_KBD_LED_INDICATORS = 4

SYNTH_KBD_VERSION = 0x00010000
PROTOCOL_ACCEPTED = 1 << 0

IS_BREAK = 1 << 1
IS_E0 = 1 << 2
IS_E1 = 1 << 3

message_type = Struct("<I")
protocol_request = Struct("<II")
"""Type, version."""
protocol_response = Struct("<II")
"""Type, PROTOCOL_ACCEPTED or 0."""
event = Struct("<IHHI")
"""Type, make code, reserved, info (IS_*)."""
led_indicators = Struct("<IH2x")
"""Type, and the guest's LEDs: scroll lock 1, num lock 2, caps lock 4."""


class Key(NamedTuple):
    """A key of scan code set 1: its make code (1 to 0x7f), and IS_E0 if that is its prefix."""

    code: int
    prefix: int = 0

    def event(self, *, release: bool = False) -> bytes:
        """The SYNTH_KBD_EVENT for pressing it, or for letting it go."""
        return event.pack(SYNTH_KBD_EVENT, self.code, 0, self.prefix | (IS_BREAK if release else 0))


_ROWS = (
    (0x02, "1234567890-="),
    (0x10, "qwertyuiop[]"),
    (0x1E, "asdfghjkl;'`"),
    (0x2B, "\\zxcvbnm,./"),
)
_SHIFTED_ROWS = (
    (0x02, "!@#$%^&*()_+"),
    (0x10, "QWERTYUIOP{}"),
    (0x1E, 'ASDFGHJKL:"~'),
    (0x2B, "|ZXCVBNM<>?"),
)

SHIFT = Key(0x2A)

_PLAIN = {"esc": 0x01, "minus": 0x0C, "equal": 0x0D, "backspace": 0x0E, "tab": 0x0F, "enter": 0x1C}
_PLAIN |= {"ctrl": 0x1D, "shift": 0x2A, "rightshift": 0x36, "kpasterisk": 0x37, "alt": 0x38, "space": 0x39}
_PLAIN |= {"capslock": 0x3A, "numlock": 0x45, "scrolllock": 0x46, "f11": 0x57, "f12": 0x58}
_PLAIN |= {f"f{n}": 0x3A + n for n in range(1, 11)}
_PLAIN |= {"kp7": 0x47, "kp8": 0x48, "kp9": 0x49, "kpminus": 0x4A, "kp4": 0x4B, "kp5": 0x4C, "kp6": 0x4D}
_PLAIN |= {"kpplus": 0x4E, "kp1": 0x4F, "kp2": 0x50, "kp3": 0x51, "kp0": 0x52, "kpdot": 0x53}
_EXTENDED = {"kpenter": 0x1C, "rightctrl": 0x1D, "kpslash": 0x35, "sysrq": 0x37, "rightalt": 0x38}
_EXTENDED |= {"home": 0x47, "up": 0x48, "pageup": 0x49, "left": 0x4B, "right": 0x4D, "end": 0x4F}
_EXTENDED |= {"down": 0x50, "pagedown": 0x51, "insert": 0x52, "delete": 0x53, "meta": 0x5B, "menu": 0x5D}

KEYS: dict[str, Key] = {character: Key(at + i) for at, row in _ROWS for i, character in enumerate(row)}
"""Keys by name: the character on an unshifted US key, or a word."""
KEYS |= {name: Key(code) for name, code in _PLAIN.items()}
KEYS |= {name: Key(code, IS_E0) for name, code in _EXTENDED.items()}

TYPED: dict[str, tuple[Key, bool]] = {
    **{character: (Key(at + i), False) for at, row in _ROWS for i, character in enumerate(row)},
    **{character: (Key(at + i), True) for at, row in _SHIFTED_ROWS for i, character in enumerate(row)},
    " ": (KEYS["space"], False),
    "\n": (KEYS["enter"], False),
    "\t": (KEYS["tab"], False),
    "\b": (KEYS["backspace"], False),
    "\x1b": (KEYS["esc"], False),
}
"""Characters of a US keyboard: the key, and whether shift is held."""


def text_events(text: str) -> list[bytes]:
    """The events that type `text`. ValueError for a character that a US keyboard has not."""
    events = []
    for character in text:
        found = TYPED.get(character)
        if found is None:
            raise ValueError(f"{character!r} is on no key of a US keyboard")
        key, shifted = found
        if shifted:
            events.append(SHIFT.event())
        events += [key.event(), key.event(release=True)]
        if shifted:
            events.append(SHIFT.event(release=True))
    return events


def chord_events(keys: list[Key]) -> list[bytes]:
    """The events that press `keys` in this order and let them go in the other."""
    return [key.event() for key in keys] + [key.event(release=True) for key in reversed(keys)]


def parse_chord(text: str) -> list[Key]:
    """Keys by name, joined by "-": "ctrl-alt-delete", "f1". ValueError for a name that is none."""
    keys = []
    for name in text.strip().split("-"):
        key = KEYS.get(name.lower())
        if key is None:
            raise ValueError(f"{name or text!r}: no such key; names are esc, enter, ctrl, f1, delete, a, ...")
        keys.append(key)
    return keys


def parse_scan_codes(text: str) -> list[Key]:
    """Make codes in hexadecimal, separated by commas: "1d,38,e053". ValueError for what is none."""
    keys = []
    for word in text.split(","):
        digits = word.strip().lower().removeprefix("0x")
        prefix, digits = (IS_E0, digits[2:]) if len(digits) == 4 and digits[:2] == "e0" else (0, digits)
        try:
            code = int(digits, 16) if digits.isascii() and digits.isalnum() else 0
        except ValueError:
            code = 0
        if not 1 <= code <= 0x7F:
            raise ValueError(f"{word or text!r}: not a make code; write 01 to 7f in hexadecimal, or e053")
        keys.append(Key(code, prefix))
    return keys
