"""A test whose guest calls code that fails: it fails by that, once, with the place where the user looks."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.kvm

TESTS = """
import pytest

WRITES = "movw $0x700, %dx\\noutb %al, %dx\\n1: jmp 1b"

class Port:
    def __init__(self, fn):
        self.fn = fn
    def read(self, offset, size):
        return 0
    def write(self, offset, size, value):
        self.fn()

def check():
    assert [1, 2] == [1, 3], "of a handler"

def listening(micro_guest, fn=check):
    guest = micro_guest(WRITES)
    guest.machine.board.ports.add(0x700, 1, Port(fn))
    return guest

@pytest.fixture
def started(micro_guest):
    guest = listening(micro_guest)
    guest.start()
    guest.wait_for("never")

def test_run(micro_guest):
    listening(micro_guest).run()

def test_wait(micro_guest):
    guest = listening(micro_guest)
    guest.start()
    guest.wait_for("never")

def test_looks_no_more(micro_guest):
    guest = listening(micro_guest)
    guest.start()
    guest.machine.wait(100)

def test_looks_elsewhere(micro_guest):
    guest = listening(micro_guest)
    guest.start()
    guest.machine.wait(100)
    assert guest.console == "consequence"

def test_setup(started):
    pass

def test_fail(micro_guest):
    listening(micro_guest, lambda: pytest.fail("by name")).run()

def test_skip(micro_guest):
    listening(micro_guest, lambda: pytest.skip("of a handler")).run()

@pytest.mark.xfail(raises=AssertionError, strict=True)
def test_expected(micro_guest):
    listening(micro_guest).run()

def test_caught(micro_guest):
    with pytest.raises(AssertionError, match="of a handler"):
        listening(micro_guest).run()

def test_at_the_end(micro_guest):
    guest = micro_guest('print "hello"\\nresult $1\\n1: jmp 1b')
    def late(data):
        guest.machine.wait(100)
        pytest.fail("too late")
    guest.machine.board.attach_sink(late)
    guest.start()
    guest.wait_until(lambda: guest.results, "result")
"""


def test_each_is_told_once_and_in_its_place(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that did not look at the guest's status passed; the others said nothing of the assertion."""
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-rA", "--junitxml=report.xml")
    text = result.stdout.str()
    result.assert_outcomes(failed=5, errors=2, skipped=1, xfailed=1, passed=2)
    ends = dict(re.findall(r"^(?:FAILED|ERROR) \S+::(\w+) - (.*)$", text, re.MULTILINE))
    assertion = "AssertionError: of a handler"
    assert ends == {
        "test_run": assertion,
        "test_wait": assertion,
        "test_looks_no_more": assertion,
        "test_looks_elsewhere": assertion,
        "test_setup": assertion,
        "test_fail": "Failed: by name",
        "test_at_the_end": "Failed: too late",
    }
    assert text.count("E       AssertionError: of a handler") == 5, "each once"
    assert text.count('>       assert [1, 2] == [1, 3], "of a handler"') >= 5
    assert text.count("During handling of the above exception") == 1, "behind what it made of the test"
    assert "hvkvm/runtime/vcpu_thread.py" not in text, "the way to the handler says nothing to the user"
    cases = {case.get("name"): case for case in ET.parse(pytester.path / "report.xml").iter("testcase")}
    (failure,) = cases["test_run"].iter("failure")
    assert "of a handler" in str(failure.get("message"))
    said = str(failure.text)
    assert "- guest: how it ended -" in said, "all that is worth keeping, says docs/ci.md, is this file"
    assert "error in the host's code: vcpu0: AssertionError: of a handler" in said
    assert text.count("- guest: how it ended -") == 6


def test_every_guest_is_closed_though_one_raises(pytester: pytest.Pytester) -> None:
    """`pytest.fail` in the last output of one left the others open, and their threads running."""
    pytester.makeconftest(
        """
        import threading
        def pytest_sessionfinish():
            left = [thread.name for thread in threading.enumerate() if thread.name.startswith("vcpu")]
            print("left:", left)
        """
    )
    pytester.makepyfile(
        """
        import pytest

        def test_two(micro_guest):
            micro_guest("1: jmp 1b").start()
            for _ in range(2):
                guest = micro_guest('print "hello"\\nresult $1\\n1: jmp 1b')
                def fail(data, machine=guest.machine):
                    machine.wait(100)
                    pytest.fail("too late")
                guest.machine.board.attach_sink(fail)
                guest.start()
                guest.wait_until(lambda: guest.results, "result")
        """
    )
    result = pytester.runpytest_subprocess("-s")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left: []*", "*several guests failed (2 sub-exceptions)*"])


def test_ctrl_c_ends_a_session_as_ever(pytester: pytest.Pytester) -> None:
    """A handler's error that nobody had heard came out of a fixture's end then, where pytest catches none."""
    pytester.makepyfile(
        TESTS.partition("@pytest.fixture")[0]
        + """
def test_interrupted(micro_guest):
    guest = listening(micro_guest)
    guest.start()
    guest.machine.wait(100)
    raise KeyboardInterrupt
"""
    )
    result = pytester.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*KeyboardInterrupt*", "before that a callback raised AssertionError: *"])
    assert "Traceback" not in result.stderr.str()
