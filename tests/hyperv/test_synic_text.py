"""What a dump says of a SynIC: messages and flags not taken, SINTs that cannot interrupt, timers due."""

from __future__ import annotations

import pytest
from fake_synic import EVENT_GPA, FakeVp, Recorder

from hvkvm.hyperv import synic_text
from hvkvm.observe.bus_text import synic_lines


def lines(vp: FakeVp) -> list[str]:
    snapshot = vp.snapshot()
    nothing = {"message": [], "running": [], "event": {}}
    return synic_lines({"vps": [snapshot] if snapshot else [], "routes": [], "connections": nothing})[:-1]


def test_a_message_that_the_guest_leaves_and_one_behind_it_are_told_until_the_vp_is_closed() -> None:
    vp = FakeVp(3, Recorder())
    assert lines(vp) == []
    vp.active = True
    assert lines(vp) == [], "as at power-on"
    vp.switch_on()
    for status in (0, -11):
        assert vp.post_message(2, (0x80000010).to_bytes(4, "little") + bytes(252)) == status
    for flag in (7, *range(1000, 1020)):
        vp.set_event_flag(15, flag)
    said = lines(vp)
    assert said[0].startswith("synic: vp 3: on, message page 0x")
    assert said[0].endswith(f", event page {EVENT_GPA:#x}")
    assert said[1] == "synic:   sint 2: HVMSG_TIMER_EXPIRED in its slot and another waits"
    assert said[2].startswith("synic:   sint 15: event flags 7 1000 1001 ")
    assert said[2].endswith(" 1014 and 5 more set")
    vp.update(0, vp.siefp, 0)
    assert lines(vp)[0] == f"synic: vp 3: off, message page off, event page {EVENT_GPA:#x}"
    vp.close()
    assert lines(vp) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0xF3 | 1 << 17, "vector 0xf3, AutoEOI"),
        (0x31 | 1 << 16, "vector 0x31, masked"),
        (0x40 | 1 << 18, "vector 0x40, polling"),
    ],
)
def test_a_sint_that_cannot_interrupt_says_so(value: int, text: str) -> None:
    assert synic_text.sint(value) == text


@pytest.mark.parametrize(
    ("config", "count", "text"),
    [
        (0x1ED9, 836553043, "on, interrupts by vector 0xed, auto-enabled, due since 49.3 ms"),
        (0x1ED9, 837145721, "on, interrupts by vector 0xed, auto-enabled, due in 10.0 ms"),
        (0x30008, 0, "off, messages to SINT 3, auto-enabled, one-shot"),
        (0x30007, 10_000, "on, messages to SINT 3, lazy, every 1 ms"),
    ],
)
def test_a_timer_says_when_it_goes_off_and_how(config: int, count: int, text: str) -> None:
    assert synic_text.stimer(config, count, 837045721) == text
