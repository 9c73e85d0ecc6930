"""A call to another thread: result, error, cancelled, or withdrawn when the caller gives up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from hvkvm.errors import Stopped
from hvkvm.runtime.call import Call


def test_gives_back_the_result() -> None:
    call = Call(divmod, (7, 2))
    call.run()
    assert call.wait(0) == (3, 1)


def test_raises_what_it_raised() -> None:
    call = Call(divmod, (7, 0))
    call.run()
    with pytest.raises(ZeroDivisionError):
        call.wait(None)


def test_cancelled_is_stopped_and_names_the_call() -> None:
    call = Call(divmod, (7, 2))
    call.cancel()
    call.run()
    with pytest.raises(Stopped, match="divmod"):
        call.wait(None)


def test_withdrawn_on_timeout_it_never_runs() -> None:
    runs: list[int] = []
    call = Call(runs.append, (1,))
    with pytest.raises(TimeoutError, match="withdrawn"):
        call.wait(0)
    call.run()
    call.cancel()
    assert not runs


def test_a_timeout_says_when_it_is_running_already() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        go_on.wait()
        return "done"

    call = Call(slow, ())
    thread = threading.Thread(target=call.run)
    thread.start()
    begun.wait()
    with pytest.raises(TimeoutError, match="begun"):
        call.wait(0)
    go_on.set()
    assert call.wait(None) == "done"
    thread.join()


def test_a_wait_that_ends_while_the_call_is_cancelled_says_so() -> None:
    outcome: list[object] = []

    class Named:
        """Is asked for its name by `cancel`, when it is decided that nothing will be run."""

        def __getattr__(self, name: str) -> str:
            waiter.start()
            waiter.join(0.3)  # it ends when the cancelling has
            return "this"

        def __call__(self) -> None:
            outcome.append("ran")

    def wait() -> None:
        try:
            call.wait(0)
        except (TimeoutError, Stopped) as error:
            outcome.append(str(error))

    call = Call(Named(), ())
    waiter = threading.Thread(target=wait)
    call.cancel()
    waiter.join()
    assert outcome == ["this was cancelled"]


@pytest.mark.usefixtures("tiny_switch_interval")
def test_running_cancelling_and_withdrawing_exclude_each_other(in_threads: Callable[..., None]) -> None:
    for _ in range(300):
        runs: list[int] = []
        outcome: list[object] = []
        call = Call(lambda runs=runs: runs.append(1) or "ran", ())

        def wait(call: Call = call, outcome: list[object] = outcome) -> None:
            try:
                outcome.append(call.wait(0))
            except (TimeoutError, Stopped) as error:
                outcome.append(error)

        in_threads(call.run, call.cancel, wait)
        (result,) = outcome
        if isinstance(result, Stopped) or "withdrawn" in str(result):
            assert not runs
        else:  # it ran, or was just running when the wait gave up
            assert runs == [1]
