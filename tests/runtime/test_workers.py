"""Worker threads: every job is answered once, whoever stops first; few threads, and none that idles on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep

import pytest

from hvkvm.errors import Stopped, Stuck
from hvkvm.runtime.io_loop import IoLoop
from hvkvm.runtime.worker_queue import WorkerQueue
from hvkvm.runtime.workers import Workers

SECONDS = 30


class Answers:
    """Collects what `done` was called with, and on which thread."""

    def __init__(self, expected: int) -> None:
        self.came: list[tuple[object, object]] = []
        self.threads: set[str] = set()
        self._expected = expected
        self.all_in = threading.Event()

    def done(self, item: object, outcome: object) -> None:
        self.came.append((item, outcome))
        self.threads.add(threading.current_thread().name)
        if len(self.came) == self._expected:
            self.all_in.set()


def wait_until(true: Callable[[], bool]) -> None:
    end = monotonic() + SECONDS
    while not true():
        assert monotonic() < end
        sleep(0.005)


def test_every_job_is_answered_once_on_the_loop(loop: IoLoop, tiny_switch_interval: None) -> None:
    workers = Workers(loop, limit=5)
    queues = [workers.queue(2, f"queue {number}") for number in range(4)]
    answers = Answers(4000)

    def submit(queue_number: int) -> None:
        for number in range(1000):
            queues[queue_number].submit(lambda item: item, (queue_number, number), answers.done)

    submitters = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    assert answers.all_in.wait(SECONDS)
    assert answers.threads == {loop.name}
    assert len({item for item, _ in answers.came}) == 4000
    assert all(item == outcome for item, outcome in answers.came)
    assert workers.threads <= 5
    workers.close()


def test_what_a_job_raises_comes_as_its_outcome(loop: IoLoop) -> None:
    workers = Workers(loop)
    answers = Answers(1)
    workers.queue(1, "one").submit(lambda _item: 1 // 0, None, answers.done)
    assert answers.all_in.wait(SECONDS)
    assert isinstance(answers.came[0][1], ZeroDivisionError)
    workers.close()


def test_one_queue_that_hangs_leaves_workers_to_the_others(loop: IoLoop) -> None:
    workers = Workers(loop, limit=3)
    release = threading.Event()
    stuck, free = Answers(5), Answers(50)
    hanging, other = workers.queue(2, "hanging"), workers.queue(2, "other")
    for number in range(5):
        hanging.submit(lambda _item: release.wait(SECONDS), number, stuck.done)
    for number in range(50):
        other.submit(lambda item: item, number, free.done)
    assert free.all_in.wait(SECONDS)
    # Both of its jobs run, and no third; the second worker may have begun after all of the others' ended.
    wait_until(lambda: [one.queue for one in workers.running()] == ["hanging", "hanging"])
    assert not stuck.came
    release.set()
    assert stuck.all_in.wait(SECONDS)
    workers.close()


def test_idle_threads_end_and_come_back(loop: IoLoop) -> None:
    workers = Workers(loop, limit=4, idle_seconds=0.01)
    queue = workers.queue(4, "one")
    for _ in range(3):
        answers = Answers(20)
        for number in range(20):
            queue.submit(lambda item: item, number, answers.done)
        assert answers.all_in.wait(SECONDS)
        wait_until(lambda: workers.threads == 0)
    workers.close()


def test_closing_waits_for_a_thread_that_had_gone_idle_just_before(
    loop: IoLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = threading.Thread.run

    def end_late(thread: threading.Thread) -> None:
        run(thread)
        sleep(0.2)

    monkeypatch.setattr(threading.Thread, "run", end_late)
    workers = Workers(loop, idle_seconds=0.01, name="idler")
    answers = Answers(1)
    workers.queue(1, "one").submit(lambda item: item, 1, answers.done)
    assert answers.all_in.wait(SECONDS)
    wait_until(lambda: workers.threads == 0)
    workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("idler")]


def test_closing_gives_back_what_has_not_begun_and_waits_for_the_rest(loop: IoLoop) -> None:
    workers = Workers(loop)
    queue = workers.queue(1, "one")
    begun, release = threading.Event(), threading.Event()
    answers = Answers(3)

    def work(item: object) -> object:
        begun.set()
        release.wait(SECONDS)
        return item

    def done(item: object, outcome: object) -> None:
        answers.done(item, outcome)
        if len(answers.came) == 2:
            release.set()  # both that had not begun are back: the one that runs may end

    for number in range(3):
        queue.submit(work, number, done)
    assert begun.wait(SECONDS)
    workers.close()
    assert answers.all_in.wait(SECONDS)
    outcomes = dict(answers.came)
    assert outcomes[0] == 0
    assert isinstance(outcomes[1], Stopped)
    assert isinstance(outcomes[2], Stopped)
    with pytest.raises(Stopped):
        queue.submit(work, 4, answers.done)


def test_what_is_submitted_while_they_close_is_answered() -> None:
    """Closing comes between a submission's look at whether it may and its putting the job there."""
    answered: list[object] = []

    class ClosesNow:
        @property
        def closed(self) -> bool:
            took_back.start()
            took_back.join(0.2)
            return False

        def offer(self, _queue: WorkerQueue) -> None:
            pass  # closed: no worker comes any more

        def finish(self, _done: object, _item: object, outcome: object) -> None:
            answered.append(outcome)

        def deliver_now(self) -> None:
            pass

    queue = WorkerQueue(ClosesNow(), 1, "one")
    took_back = threading.Thread(target=queue.take_back)
    queue.submit(lambda item: item, 1, lambda _item, _outcome: None)
    took_back.join()
    assert [type(outcome) for outcome in answered] == [Stopped]


def test_a_job_that_was_given_back_while_no_thread_was_to_be_had_is_answered_once() -> None:
    answered: list[object] = []

    class ClosesNow:
        closed = False

        def offer(self, queue: WorkerQueue) -> None:
            queue.take_back()
            raise RuntimeError("can't start new thread")

        def finish(self, _done: object, _item: object, outcome: object) -> None:
            answered.append(outcome)

    queue = WorkerQueue(ClosesNow(), 1, "one")
    queue.submit_all(lambda item: item, [1, 2], lambda _item, _outcome: None)
    assert [type(outcome) for outcome in answered] == [Stopped, Stopped]


def test_a_job_that_hangs_is_named_when_closing(loop: IoLoop) -> None:
    workers = Workers(loop)
    release = threading.Event()
    answers = Answers(1)
    workers.queue(1, "nfs disk").submit(lambda _item: release.wait(SECONDS), None, answers.done)
    wait_until(lambda: bool(workers.running()))
    with pytest.raises(Stuck, match=r"1 jobs have not ended within 0.01 s: nfs disk \("):
        workers.close(0.01)
    release.set()
    assert answers.all_in.wait(SECONDS)
    workers.close()


def test_an_answer_after_the_loop_has_ended_is_given_by_close(no_leaks: None) -> None:
    loop = IoLoop()
    loop.start()
    workers = Workers(loop)
    release = threading.Event()
    answers = Answers(1)
    workers.queue(1, "one").submit(lambda item: (release.wait(SECONDS), item)[1], 7, answers.done)
    wait_until(lambda: bool(workers.running()))
    loop.stop()
    release.set()
    workers.close()
    assert answers.came == [(7, 7)]


def test_a_done_that_raises_keeps_nobody_from_his_answer(loop: IoLoop, faults: list[BaseException]) -> None:
    workers = Workers(loop)
    queue = workers.queue(1, "one")
    answers = Answers(20)

    def done(item: object, outcome: object) -> None:
        answers.done(item, outcome)
        raise ValueError(item)

    for number in range(20):
        queue.submit(lambda item: item, number, done)
    assert answers.all_in.wait(SECONDS)
    workers.close()
    wait_until(lambda: len(faults) == 20)


def test_a_host_without_threads_begins_nothing_and_is_asked_again(
    loop: IoLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not begin is told at once; it takes nothing of the queue's width."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers(loop)
    queue = workers.queue(1, "one")
    answers = Answers(1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(Stopped, match="one: can't start new thread"):
                queue.submit(lambda item: item, 1, answers.done)
    queue.submit(lambda item: item, 2, answers.done)
    assert answers.all_in.wait(SECONDS)
    assert answers.came == [(2, 2)]
    workers.close()


def test_all_of_a_batch_are_answered_once(loop: IoLoop, tiny_switch_interval: None) -> None:
    workers = Workers(loop, limit=5)
    queues = [workers.queue(width, f"queue {width}") for width in (1, 2, 4)]
    answers = Answers(3000)

    def submit(number: int) -> None:
        for first in range(0, 1000, 20):
            items = [(number, first + n) for n in range(19)]
            queues[number].submit_all(lambda item: item, items, answers.done)
            queues[number].submit(lambda item: item, (number, first + 19), answers.done)

    submitters = [threading.Thread(target=submit, args=(number,)) for number in range(3)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    assert answers.all_in.wait(SECONDS)
    assert len({item for item, _ in answers.came}) == 3000
    assert all(item == outcome for item, outcome in answers.came)
    workers.close()
    with pytest.raises(Stopped):
        queues[0].submit_all(lambda item: item, [1, 2], answers.done)


def narrowed(queue: WorkerQueue) -> WorkerQueue:
    """As a queue is whose jobs were quick for a while."""
    for _ in range(100):
        queue.took(1e-6, 1e-6)
    assert queue.narrow
    return queue


def test_quick_jobs_make_a_queue_narrow_and_slow_ones_wide_again(loop: IoLoop) -> None:
    workers = Workers(loop)
    queue = narrowed(workers.queue(4, "one"))
    for _ in range(100):
        queue.took(1.0, 1e-6)
    assert not queue.narrow
    single = workers.queue(1, "single")
    for _ in range(100):
        single.took(1e-6, 1e-6)
    assert not single.narrow  # it has one worker in any case, and delivers at once
    workers.close()


def test_a_batch_of_a_narrow_queue_has_one_worker(loop: IoLoop) -> None:
    workers = Workers(loop)
    queue = narrowed(workers.queue(4, "one"))
    release, answers = threading.Event(), Answers(20)
    queue.submit_all(lambda item: release.wait(SECONDS) and item, list(range(20)), answers.done)
    wait_until(lambda: len(workers.running()) == 1)
    assert len(queue) == 19
    release.set()
    assert answers.all_in.wait(SECONDS)
    workers.close()


def test_what_hangs_in_a_narrow_queue_keeps_nobody_from_the_workers(loop: IoLoop) -> None:
    """Neither those that wait nor those that are done; whoever submits looks every so often."""
    workers = Workers(loop)
    queue = narrowed(workers.queue(3, "one"))
    release, answers = threading.Event(), Answers(8)

    def work(item: int) -> int:
        if item == 2:
            release.wait(SECONDS)
        return item

    queue.submit_all(work, range(8), answers.done)
    wait_until(lambda: any(one.item == 2 for one in workers.running()))

    def look() -> None:
        if queue.look():
            loop.call_later(0.005, look)

    loop.call_soon(look)
    wait_until(lambda: len(answers.came) == 7)
    assert sorted(item for item, _ in answers.came if isinstance(item, int)) == [0, 1, 3, 4, 5, 6, 7]
    release.set()
    assert answers.all_in.wait(SECONDS)
    workers.close()
