"""The tests' own guard: a test that leaves a file open is told so, and who comes next does not meet it."""

from __future__ import annotations

import sys

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import gc, left_open, os, pytest, threading, time
from contextlib import ExitStack
from left_open import LeftOpen
from open_files import open_files

@pytest.fixture(scope="session", autouse=True)
def for_all():
    gc.disable()
    fd = os.open("/dev/zero", os.O_RDONLY)
    yield
    os.close(fd)

@pytest.fixture(scope="module")
def opener():
    with ExitStack() as stack:
        yield lambda: stack.enter_context(open("/dev/random"))

@pytest.fixture
def own():
    fd = os.open("/dev/zero", os.O_RDONLY)
    yield
    os.close(fd)

def test_closes(own): pass

def test_has_its_module_open_one(opener):
    opener()

def test_has_a_thread_close_it():
    later = open("/dev/full")
    threading.Thread(target=lambda: (time.sleep(0.2), later.close())).start()

def test_forgets():
    left_open.SECONDS = 0.1
    os.open("/dev/full", os.O_RDONLY)

def test_drops_in_a_cycle():
    ring = [open("dropped", "w")]
    ring.append(ring)

def test_sees_it_no_more():
    assert not [to for to in open_files().values() if to.endswith("/dropped")]
"""


@pytest.mark.filterwarnings("ignore")
def test_what_is_left_is_named_and_what_is_in_a_cycle_is_closed(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        f"import sys\nsys.path[:0] = {sys.path!r}\n"
        "from left_open import LeftOpen\n"
        "def pytest_configure(config):\n    config.pluginmanager.register(LeftOpen())\n"
    )
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "no:xdist", "-W", "ignore")
    result.assert_outcomes(passed=6, errors=1)
    result.stdout.fnmatch_lines(["*test_forgets left open: {'*': '/dev/full'}*"])
