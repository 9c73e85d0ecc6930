"""Connection tables, on a real I/O loop and real eventfds (S37 to S43, S46, S54)."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest
from fake_kvm import FakeVm

from hvkvm.abi.hv_synic import hv_post_message_input
from hvkvm.abi.tlfs import HvStatus
from hvkvm.errors import Stopped
from hvkvm.hyperv.connections import Connections
from hvkvm.hyperv.synic.kernel_line import KernelSignalPath
from hvkvm.kvm.irqfd import EventFd
from hvkvm.runtime.io_loop import IoLoop

WAIT = 20


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    loop = IoLoop()
    loop.start()
    yield loop
    loop.stop()


@pytest.fixture
def connections(loop: IoLoop) -> Iterator[Connections]:
    connections = Connections(loop)
    yield connections
    connections.close()


def settle(loop: IoLoop) -> None:
    """Return once the loop has run what was ready when this was called."""
    for _ in range(2):
        done = threading.Event()
        loop.call_soon(done.set)
        assert done.wait(WAIT)


def message(conn_id: int) -> hv_post_message_input:
    return hv_post_message_input(connection_id=conn_id, message_type=1)


def ok(message: hv_post_message_input) -> int:
    return HvStatus.SUCCESS


def test_s37_message_table_answers(connections: Connections) -> None:
    heard: list[str] = []

    def first(message: hv_post_message_input) -> int:
        heard.append("first")
        return HvStatus.INSUFFICIENT_BUFFERS

    assert connections.add_message(7, first) == 0
    assert connections.add_message(7, ok) == -errno.EEXIST
    assert connections.post(message(7)) == HvStatus.INSUFFICIENT_BUFFERS
    assert heard == ["first"]
    assert connections.remove_message(7) == 0
    assert connections.remove_message(7) == -errno.ENOENT
    assert connections.post(message(7)) == HvStatus.INVALID_CONNECTION_ID
    assert connections.add_message(7, ok) == 0


def test_s37_event_table_answers(connections: Connections, loop: IoLoop) -> None:
    heard: list[str] = []
    assert connections.add_event(7, lambda: heard.append("first")) == 0
    assert connections.add_event(7, lambda: heard.append("second")) == -errno.EEXIST
    assert connections.signal(7) == HvStatus.SUCCESS
    settle(loop)
    assert heard == ["first"]
    assert connections.remove_event(7) == 0
    assert connections.remove_event(7) == -errno.ENOENT
    assert connections.signal(7) == HvStatus.INVALID_CONNECTION_ID


NOTHING = {"message": [], "running": [], "event": {}}


@pytest.mark.parametrize("conn_id", [0x1000000, -1, 1 << 32])
def test_s38_ids_beyond_24_bits_are_rejected(connections: Connections, conn_id: int) -> None:
    assert connections.add_message(conn_id, ok) == -errno.EINVAL
    assert connections.add_event(conn_id, lambda: None) == -errno.EINVAL
    assert connections.snapshot() == NOTHING


@pytest.mark.parametrize("conn_id", [0, 1, 0xFFFFFF])
def test_s38_every_24_bit_id_is_good(connections: Connections, conn_id: int) -> None:
    assert connections.add_message(conn_id, ok) == connections.add_event(conn_id, lambda: None) == 0
    assert connections.post(message(conn_id)) == connections.signal(conn_id) == 0


def test_s39_removing_waits_for_a_handler_on_another_thread(connections: Connections) -> None:
    inside, let_go, removed = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    def handler(message: hv_post_message_input) -> int:
        if not inside.is_set():  # only the first: one that comes before the row is gone has none to let it go
            inside.set()
            assert let_go.wait(WAIT)
            order.append("handler left")
        return 0

    def remove() -> None:
        assert connections.remove_message(1) == 0
        order.append("removed")
        removed.set()

    connections.add_message(1, handler)
    vcpu = threading.Thread(target=connections.post, args=(message(1),))
    vcpu.start()
    assert inside.wait(WAIT)
    remover = threading.Thread(target=remove)
    remover.start()
    while connections.post(message(1)) != HvStatus.INVALID_CONNECTION_ID:
        pass  # already out of the table, though its remover waits
    assert not removed.is_set()
    let_go.set()
    vcpu.join()
    remover.join()
    assert order == ["handler left", "removed"]


def test_s39_a_handler_may_remove_itself(connections: Connections) -> None:
    connections.add_message(1, lambda message: connections.remove_message(1) & 0)
    assert connections.post(message(1)) == 0
    assert connections.post(message(1)) == HvStatus.INVALID_CONNECTION_ID


def test_s39_a_handler_that_raises_does_not_block_its_removal(connections: Connections) -> None:
    def broken(message: hv_post_message_input) -> int:
        raise RuntimeError("the device's bug")

    connections.add_message(1, broken)
    with pytest.raises(RuntimeError):
        connections.post(message(1))
    assert connections.remove_message(1) == 0


def test_s39_removing_an_event_waits_for_its_callback(connections: Connections, loop: IoLoop) -> None:
    inside, let_go = threading.Event(), threading.Event()
    order: list[str] = []

    def callback() -> None:
        inside.set()
        assert let_go.wait(WAIT)
        order.append("callback left")

    def remove() -> None:
        connections.remove_event(1)
        order.append("removed")

    connections.add_event(1, callback)
    connections.signal(1)
    assert inside.wait(WAIT)
    remover = threading.Thread(target=remove)
    remover.start()
    while connections.signal(1) != HvStatus.INVALID_CONNECTION_ID:
        pass
    let_go.set()
    remover.join()
    settle(loop)
    # A signal that came before it was out of the table may have called it once more; never afterwards.
    assert order.count("removed") == 1
    assert order[0] == "callback left"
    assert order[-1] == "removed"


def test_s39_an_event_may_remove_itself(connections: Connections, loop: IoLoop) -> None:
    removed: list[int] = []
    connections.add_event(1, lambda: removed.append(connections.remove_event(1)))
    connections.signal(1)
    settle(loop)
    assert removed == [0]


@pytest.mark.usefixtures("tiny_switch_interval")
def test_s39_signals_racing_with_removal_reach_nobody_else(
    connections: Connections, loop: IoLoop, open_fds: Callable[[], int]
) -> None:
    """A late signal must not land on an fd that now is another connection's."""
    fds = open_fds()
    for _ in range(150):
        heard: list[int] = []
        connections.add_event(1, lambda: None)
        start = threading.Barrier(2)

        def signaller(start: threading.Barrier = start) -> None:
            start.wait()
            while connections.signal(1) == HvStatus.SUCCESS:
                pass

        thread = threading.Thread(target=signaller)
        thread.start()
        start.wait()
        connections.remove_event(1)
        connections.add_event(2, lambda heard=heard: heard.append(1))
        thread.join()
        settle(loop)
        connections.remove_event(2)
        assert heard == []
    assert open_fds() == fds


def test_s43_an_eventfd_is_not_closed_under_its_signaller(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, removing, removed = threading.Event(), threading.Event(), threading.Event()
    open_throughout: list[bool] = []

    def slow_signal(self: EventFd, n: int = 1) -> None:
        inside.set()
        assert removing.wait(WAIT)
        removed.wait(0.1)  # as long as a removal that does not wait would take
        open_throughout.append(self.fd >= 0)

    def remove() -> None:
        removing.set()
        connections.remove_event(1)
        removed.set()

    connections.add_event(1, lambda: None)
    monkeypatch.setattr(EventFd, "signal", slow_signal)
    signaller = threading.Thread(target=connections.signal, args=(1,))
    signaller.start()
    assert inside.wait(WAIT)
    remover = threading.Thread(target=remove)
    remover.start()
    signaller.join()
    remover.join()
    assert open_throughout == [True]


def test_s40_handler_runs_on_the_callers_thread_and_its_status_has_16_bits(connections: Connections) -> None:
    threads: list[int] = []

    def handler(message: hv_post_message_input) -> int:
        threads.append(threading.get_ident())
        return 0x7_0013

    connections.add_message(1, handler)
    assert connections.post(message(1)) == 0x13
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize(
    ("kernel_error", "expected"), [(errno.EEXIST, -errno.EEXIST), (errno.EBADF, -errno.EBADF)]
)
def test_s41_what_kvm_refuses_leaves_nothing_behind(
    loop: IoLoop, open_fds: Callable[[], int], kernel_error: int, expected: int
) -> None:
    vm = FakeVm()
    connections = Connections(loop, KernelSignalPath(vm))  # type: ignore[arg-type]
    fds = open_fds()
    vm.fail["hyperv_eventfd"] = kernel_error
    assert connections.add_event(5, lambda: None) == expected
    assert open_fds() == fds
    assert connections.signal(5) == HvStatus.INVALID_CONNECTION_ID
    vm.fail.clear()
    assert connections.add_event(5, lambda: None) == 0
    connections.close()
    assert open_fds() == fds


@pytest.mark.parametrize("in_kernel", [True, False])
def test_s41_an_eventfd_of_the_callers_is_signalled_by_either_path(
    loop: IoLoop, open_fds: Callable[[], int], in_kernel: bool
) -> None:
    vm = FakeVm()
    connections = Connections(loop, KernelSignalPath(vm) if in_kernel else None)  # type: ignore[arg-type]
    with EventFd() as mine:
        fds = open_fds()
        assert connections.add_eventfd(5, mine.fd) == 0
        assert connections.add_eventfd(5, mine.fd) == connections.add_event(5, ok_event) == -errno.EEXIST
        assert connections.signal(5) == connections.signal(5) == HvStatus.SUCCESS
        settle(loop)  # which would have read nothing
        assert mine.drain() == 2
        assert connections.remove_event(5) == 0
        assert connections.signal(5) == HvStatus.INVALID_CONNECTION_ID
        assert mine.drain() == 0
        assert open_fds() == fds
    assert vm.log == [("hyperv_eventfd", 5), ("hyperv_eventfd off", 5)] * in_kernel
    connections.close()


def ok_event() -> None:
    """Nothing to do."""


def test_s41_a_callers_eventfd_may_be_closed_while_it_is_signalled(connections: Connections) -> None:
    with EventFd() as mine, EventFd() as other:
        assert connections.add_eventfd(5, mine.fd) == 0
        os.dup2(other.fd, mine.fd)  # whatever gets the number is not written to
        assert connections.signal(5) == HvStatus.SUCCESS
        assert other.drain() == 0


def test_s41_only_an_eventfd_will_do(connections: Connections) -> None:
    with open("/dev/null", "rb") as null:
        assert connections.add_eventfd(5, null.fileno()) == -errno.EINVAL
    for number in (-1, 1 << 20):
        assert connections.add_eventfd(5, number) == -errno.EBADF
    with EventFd() as mine:
        assert connections.add_eventfd(1 << 24, mine.fd) == -errno.EINVAL
        connections.close()
        assert connections.add_eventfd(5, mine.fd) == -errno.ENODEV
    assert connections.snapshot() == NOTHING


def test_s42_both_paths_call_back_alike(loop: IoLoop) -> None:
    """KVM signals the very eventfd that the userspace table would."""
    vm = FakeVm()
    for path in (None, KernelSignalPath(vm)):  # type: ignore[arg-type]
        connections = Connections(loop, path)
        heard = threading.Event()
        assert connections.add_event(5, heard.set) == 0
        assert connections.signal(5) == 0
        assert heard.wait(WAIT)
        connections.close()
    assert vm.log == [("hyperv_eventfd", 5), ("hyperv_eventfd off", 5)]


def test_s43_kvm_lets_go_before_the_eventfd_is_closed(loop: IoLoop, open_fds: Callable[[], int]) -> None:
    vm = FakeVm()
    connections = Connections(loop, KernelSignalPath(vm))  # type: ignore[arg-type]
    fds = open_fds()
    connections.add_event(5, lambda: None)
    open_at_deassign: list[int] = []
    deassign = vm.hyperv_eventfd

    def spy(conn_id: int, fd: int, off: bool = False) -> None:
        open_at_deassign.append(open_fds())
        deassign(conn_id, fd, off)

    vm.hyperv_eventfd = spy  # type: ignore[method-assign]
    connections.remove_event(5)
    assert open_at_deassign == [fds + 1]
    assert open_fds() == fds


def test_s46_the_ids_top_8_bits_do_not_count_for_messages(connections: Connections) -> None:
    connections.add_message(0x123456, ok)
    assert connections.post(message(0xFF123456)) == 0


def test_s54_signals_coalesce_but_none_is_lost(connections: Connections, loop: IoLoop) -> None:
    hold, held = threading.Event(), threading.Event()
    heard: list[int] = []

    def block() -> None:
        held.set()
        hold.wait(WAIT)

    connections.add_event(1, lambda: heard.append(1))
    loop.call_soon(block)
    assert held.wait(WAIT)
    for _ in range(5):
        connections.signal(1)
    hold.set()
    settle(loop)
    assert heard == [1]
    connections.signal(1)
    settle(loop)
    assert heard == [1, 1]


def test_an_ended_loop_takes_no_event_and_leaks_nothing(open_fds: Callable[[], int]) -> None:
    loop = IoLoop()
    loop.stop()
    connections = Connections(loop)
    fds = open_fds()
    with pytest.raises(Stopped):
        connections.add_event(1, lambda: None)
    assert open_fds() == fds


def test_closed_tables_take_nothing(connections: Connections) -> None:
    connections.add_message(1, ok)
    connections.add_event(1, lambda: None)
    assert connections.snapshot() == {"message": ["0x1"], "running": [], "event": {"0x1": "hvkvm"}}
    connections.close()
    assert connections.snapshot() == NOTHING
    assert connections.add_message(2, ok) == connections.add_event(2, lambda: None) == -errno.ENODEV
