"""What becomes of a test's guests when it has ended, and of what the code that they called has raised.

A guest calls code of its test on threads of its own: handlers, devices, sinks. An
assertion that fails there ends the guest, and whoever of the test waits for that guest
hears of it. A test that waits for none hears of it here, as its own failure.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hvkvm.testing.guest import Guest

GUESTS = pytest.StashKey[list["Guest"]]()
"""The guests of a test, as long as they are open."""


def close_all(guests: list[Guest]) -> None:
    """Close and forget every guest, though some raise; then raise what they raised."""
    errors: list[BaseException] = []
    while guests:
        try:
            guests.pop().close()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                close_all(guests)
                raise
            errors.append(error)
    if len(errors) > 1:
        raise BaseExceptionGroup("several guests failed", errors)
    if errors:
        raise errors[0]


def _hear(item: pytest.Item) -> Generator[None, object, object]:
    """Have a step of a test fail by what its guests' callbacks have raised, if nobody has heard that yet.

    What the step itself has raised is often a consequence of it, and is shown above it.
    """
    __tracebackhide__ = True
    try:
        result = yield
    except (KeyboardInterrupt, SystemExit, pytest.exit.Exception) as error:
        for guest in item.stash.get(GUESTS, []):
            guest.machine.note_error_on(error)  # raised by a fixture's end, it would be pytest's own
        raise
    except BaseException:
        for guest in item.stash.get(GUESTS, []):
            guest.raise_error()
        raise
    for guest in item.stash.get(GUESTS, []):
        guest.raise_error()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Of fixtures that run guests."""
    __tracebackhide__ = True
    return (yield from _hear(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Of the test itself."""
    __tracebackhide__ = True
    return (yield from _hear(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach what one would ask of the guests of a test that failed."""
    report = yield
    guests = item.stash.get(GUESTS, [])
    if report.failed and call.when in ("setup", "call") and guests:
        from hvkvm.testing.report import sections

        add = getattr(report.longrepr, "addsection", None)
        for title, text in sections(guests):
            if add is not None:
                add(title, text)  # JUnit reports have what belongs to the failure, and no other sections
            else:
                report.sections.append((title, text))
        if item.config.getoption("--hvkvm-keep"):
            _wait_for(item, guests)
    return report


def _wait_for(item: pytest.Item, guests: Sequence[Guest]) -> None:
    """Leave guests of a failed test as they are until somebody ends them, or presses Ctrl-C."""
    running = [guest for guest in guests if guest.started and guest.ended is None]
    if not running:
        return
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    try:
        for guest in running:
            name = guest.machine.name
            print(f"\n{item.nodeid} has failed, and its guest runs on: hvkvm ctl --vm {name} inspect")
            print(f"hvkvm ctl --vm {name} quit, or Ctrl-C here, ends it", flush=True)
            try:
                guest.machine.wait()
            except KeyboardInterrupt:
                continue
    finally:
        if capture is not None:
            capture.resume_global_capture()
