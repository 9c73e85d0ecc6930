"""SynIC registers and messages in words, for dumps and `inspect`.

No state. Any thread.
"""

from __future__ import annotations

from hvkvm.abi import hv_synic as abi
from hvkvm.abi.tlfs import (
    HV_STIMER_AUTOENABLE,
    HV_STIMER_DIRECT_MODE,
    HV_STIMER_ENABLE,
    HV_STIMER_LAZY,
    HV_STIMER_PERIODIC,
    HV_STIMER_SINT_MASK,
    HV_STIMER_SINT_SHIFT,
    HV_STIMER_VECTOR_MASK,
    HV_STIMER_VECTOR_SHIFT,
)

UNITS_A_MILLISECOND = 10_000
"""Reference time counts 100 ns."""

_MESSAGES = {number: name for name, number in vars(abi).items() if name.startswith("HVMSG_")}


def message_type(number: int) -> str:
    """A message's type by its C name, or its number."""
    return _MESSAGES.get(number, f"{number:#x}")


def sint(value: int) -> str:
    """HV_X64_MSR_SINTn: the vector, and what keeps it from interrupting."""
    words = [f"vector {value & abi.HV_SYNIC_SINT_VECTOR_MASK:#x}"]
    flags = (
        (abi.HV_SYNIC_SINT_MASKED, "masked"),
        (abi.HV_SYNIC_SINT_AUTO_EOI, "AutoEOI"),
        (abi.HV_SYNIC_SINT_POLLING, "polling"),
    )
    return ", ".join(words + [name for bit, name in flags if value & bit])


def stimer(config: int, count: int, now: int) -> str:
    """HV_X64_MSR_STIMERn_CONFIG and _COUNT: how it goes off, and when. `now` is reference time."""
    if config & HV_STIMER_DIRECT_MODE:
        to = f"interrupts by vector {config >> HV_STIMER_VECTOR_SHIFT & HV_STIMER_VECTOR_MASK:#x}"
    else:
        to = f"messages to SINT {config >> HV_STIMER_SINT_SHIFT & HV_STIMER_SINT_MASK}"
    words = ["on" if config & HV_STIMER_ENABLE else "off", to]
    if config & HV_STIMER_LAZY:
        words.append("lazy")
    if config & HV_STIMER_AUTOENABLE:
        words.append("auto-enabled")
    if config & HV_STIMER_PERIODIC:
        words.append(f"every {count / UNITS_A_MILLISECOND:g} ms")
    elif not config & HV_STIMER_ENABLE or not count:
        words.append("one-shot")
    elif count > now:
        words.append(f"due in {(count - now) / UNITS_A_MILLISECOND:.1f} ms")
    else:
        words.append(f"due since {(now - count) / UNITS_A_MILLISECOND:.1f} ms")
    return ", ".join(words)
