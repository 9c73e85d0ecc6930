"""A disk: takes requests, has workers carry them out on its image, and answers each one once.

Order: requests run at once with one another and end in any order, as on a real disk. A FLUSH covers every
write whose `done` was called before the flush was submitted; who needs more waits for the `done`.

What the host's page cache can do at once is done on the loop (`now`); everything else goes to a worker, and
what is submitted in one turn goes together.

What hangs: while a worker is in the kernel with a guest's pages, nobody can take them back. So a request
that hangs is not answered, but named: `inspect()` has it, and the observer hears of it once.

Owner: the I/O loop. `inspect` may be called from any thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hvkvm.block.counter import Counter
from hvkvm.block.flying import Flying, Loop, Work
from hvkvm.block.image import Image
from hvkvm.block.now import NOW_BYTES, ReadWay, Turn, Way, WriteWay
from hvkvm.block.perform import perform
from hvkvm.block.request import Op, Request, Result, Status, failure, result_of
from hvkvm.errors import Stopped
from hvkvm.events import NULL_OBSERVER, Observer
from hvkvm.runtime.workers import Workers

WIDTH = 4
"""Workers that one disk may have at once, if it is not told otherwise."""

HANG_SECONDS = 10.0
"""A request that takes longer is told of."""

LOOK_SECONDS = 0.01
"""So often it is looked whether quick requests wait behind one that is not."""


class Disk:
    """`image` behind a queue of `width` workers. It starts running; `close()` gives the image back closed."""

    def __init__(
        self,
        image: Image,
        workers: Workers,
        io: Loop,
        *,
        name: str = "disk",
        width: int = WIDTH,
        observer: Observer = NULL_OBSERVER,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self.image = image
        self.name = name
        self.on_resize: Callable[[], object] | None = None
        """Called on the loop after the size has changed."""
        self.on_fault: Callable[[Exception], object] | None = None
        """Called on the loop with what a request's `done` raises; without it, that goes on up."""
        self._io = io
        self._queue = workers.queue(width, name)
        self._hang_seconds = hang_seconds
        self._flying = Flying(io, name, observer, hang_seconds)
        self._ready: deque[tuple[Request, Result]] = deque()
        self._together: list[Request] = []
        self._looking = False
        self._stopped: bool = False
        self.counters: dict[Op, Counter] = {op: Counter() for op in Op}
        self._turn = Turn()
        self.reads_now = ReadWay(image, self._turn, self.counters[Op.READ])
        self.writes_now = WriteWay(image, self._turn, self.counters[Op.WRITE])

    @property
    def size(self) -> int:
        """Bytes. Any thread."""
        return self.image.size

    @property
    def stopped(self) -> bool:
        """Whether it takes no requests."""
        return self._stopped

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._flying)

    def submit(self, request: Request) -> None:
        """Begin it; its `done` is called later, never in here. Until then its buffers belong to the disk."""
        refusal = self._refusal(request)
        self._flying.begin(request)
        if refusal is not None:
            self._answer(request, refusal)
            return
        op = request.op
        way = self._way_of(request)
        if way is not None and way.move(request.offset, request.buffers, request.length):
            self._answer(request, way.result)
            return
        if request.fua or (op is not Op.READ and op is not Op.WRITE):
            self._hand_over()  # workers begin in the order of submission
            try:
                self._queue.submit(self._perform, request, self._finished)
            except Stopped as error:
                self._answer(request, failure(error))
            return
        self._together.append(request)
        if len(self._together) == 1:
            self._io.call_soon(self._hand_over, cancelled=self._hand_over)

    def begin(self, request: Request) -> None:
        """As `submit`, for a READ or WRITE that lies on the disk, of some whole sectors, and may be done.

        What can be answered at once is, inside of this call: a device that takes many requests in a turn is
        spared what `submit` needs to answer later.
        """
        way = self._way_of(request)
        if (
            way is not None
            and not self._stopped
            and way.move(request.offset, request.buffers, request.length)
        ):
            way.tally(1, request.length)
            request.done(way.result)
        else:
            self.submit(request)

    def take(self, request: Request) -> None:
        """As `submit`, of a READ or WRITE: what can be is answered inside of this call, as by `begin`."""
        if self._refusal(request) is None:
            self.begin(request)
        else:
            self.submit(request)

    def poll(self) -> None:
        """A batch was submitted: have workers begin, and answer now what has been answered on the loop."""
        self._turn.left = NOW_BYTES
        if self._together:
            self._hand_over()
        if self._ready:
            self._deliver()

    def stop(self, done: Callable[[], object]) -> None:
        """Take no more requests; `done()` on the loop once all are answered: guest memory is left alone then.

        If the host hangs it does not come; `inspect()` says what it waits for.
        """
        self._stopped = True
        self.drain(done)

    def start(self) -> None:
        """Take requests again after `stop`."""
        self._stopped = False

    def drain(self, done: Callable[[], object]) -> None:
        """`done()` on the loop once no request and no resize is under way; one more makes it wait on."""
        self._flying.when_none(done)

    def close(self, done: Callable[[Result], object]) -> None:
        """Give back what has not begun as CANCELLED, end the rest, make all stable, close the image.

        `done(result)` on the loop; the result is the last flush's, the image is closed in any case. A server
        that has not answered what is in flight in `hang_seconds` is waited for no more.
        """
        closed = False

        def finished(_item: object, outcome: object) -> None:
            nonlocal closed
            closed = True
            done(self._shut_here() if isinstance(outcome, Stopped) else result_of(outcome))

        def shut() -> None:
            try:
                self._queue.submit(self._shut, None, finished)
            except Stopped as error:
                finished(None, error)

        def give_up() -> None:
            if not closed:
                self.image.interrupt()

        self._hand_over()
        self._queue.take_back()
        self.stop(shut)
        self._io.call_later(self._hang_seconds, give_up)

    def resize(self, size: int, done: Callable[[Result], object]) -> None:
        """Make it `size` bytes, or look again how large it is; `done(result)` on the loop.

        `drain`, `stop` and `close` wait for it, as for a request.
        """

        under_way = Work(f"resize to {size} bytes")

        def finished(_item: object, outcome: object) -> None:
            result = result_of(outcome)
            self._flying.end(under_way)
            try:
                if result.status is Status.OK and self.on_resize is not None:
                    self.on_resize()
                done(result)
            finally:
                self._flying.look()

        def work(_item: object) -> Result:
            self.image.resize(size)
            return Result(Status.OK)

        self._queue.submit(work, None, finished)
        self._flying.begin(under_way)

    @property
    def hung(self) -> str:
        """The request that the host has not answered for long, and for how long; "" while it answers."""
        return self._flying.hung

    def inspect(self) -> dict[str, object]:
        """Its image, what it did, and what it is at."""
        return {
            "name": self.name,
            "image": self.image.inspect(),
            "read_only": self.image.read_only,
            **self._flying.inspect(),
            "waiting": len(self._queue) + len(self._together),
            "answered_on_loop": self.reads_now.count + self.writes_now.count,
            "operations": {op.value: one.inspect() for op, one in self.counters.items()},
        }

    # On the loop.

    def _refusal(self, request: Request) -> Result | None:
        if self._stopped:
            return Result(Status.CANCELLED, 0, f"{self.name} is stopped")
        if request.op is Op.FLUSH:
            return None
        image = self.image
        offset, length = request.offset, request.length
        if offset < 0 or offset + length > image.size:
            return Result(Status.OUT_OF_RANGE, 0, f"{request} of {image.size}")
        if (offset | length) & image.sector_size - 1:
            return Result(Status.MISALIGNED, 0, f"{request}, sectors of {image.sector_size}")
        if image.read_only and request.op is not Op.READ:
            return Result(Status.READ_ONLY)
        if not length:
            return Result(Status.OK)
        return None

    def _hand_over(self) -> None:
        """Give workers what was submitted in this turn."""
        together, self._together = self._together, []
        if not together:
            return
        try:
            self._queue.submit_all(self._perform, together, self._finished)
        except Stopped as error:
            for request in together:
                self._answer(request, failure(error))
            return
        if not self._looking:
            self._looking = True
            self._io.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._looking = self._queue.look()
        if self._looking:
            self._io.call_later(LOOK_SECONDS, self._look)

    def _way_of(self, request: Request) -> Way | None:
        """How it may be done on the loop."""
        if request.op is Op.READ:
            return self.reads_now
        return self.writes_now if request.op is Op.WRITE and not request.fua else None

    def _answer(self, request: Request, result: Result) -> None:
        ready = self._ready
        ready.append((request, result))
        if len(ready) == 1:
            self._io.call_soon(self._deliver, cancelled=self._deliver)

    def _deliver(self) -> None:
        self._turn.left = NOW_BYTES
        ready, self._ready = self._ready, deque()
        try:
            while ready:
                self._finished(*ready.popleft())
        finally:
            if ready:  # a `done` raised: the others get their answers all the same
                ready.extend(self._ready)
                self._ready = ready
                self._io.call_soon(self._deliver, cancelled=self._deliver)

    def _finished(self, request: Request, outcome: object) -> None:
        result = outcome if type(outcome) is Result else result_of(outcome)
        seconds = self._flying.end(request)
        counter = self.counters[request.op]
        counter.requests += 1
        counter.bytes += result.transferred
        counter.seconds += seconds
        if result.status is not Status.OK:
            counter.failed += 1
        try:
            request.answer(result, self.on_fault)
        finally:
            self._flying.look()

    # On a worker.

    def _perform(self, request: Request) -> Result:
        return perform(self.image, request)

    def _shut(self, _item: object) -> Result:
        try:
            self.image.flush()
        finally:
            self.image.close()
        return Result(Status.OK)

    def _shut_here(self) -> Result:
        """On the loop, for no worker can be had: else the file stays open. No server is waited for."""
        self.image.interrupt()
        try:
            return self._shut(None)
        except Exception as error:
            return failure(error)
