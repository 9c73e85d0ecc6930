"""The routing table's logic against a recorder in KVM's place, and once against KVM."""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hvkvm.errors import KvmIoctlError, RouteError
from hvkvm.kvm.gsi import GSI_LIMIT, GsiTable

DEFAULT = (
    [r for g in range(8) for r in ((g, 1, (0, g)), (g, 1, (2, g)))]
    + [r for g in range(8, 16) for r in ((g, 1, (1, g - 8)), (g, 1, (2, g)))]
    + [(g, 1, (2, g)) for g in range(16, 24)]
)


class Recorder:
    """Takes tables as KVM would; fails on demand."""

    def __init__(self) -> None:
        self.commits = []
        self.fail = 0

    def set_gsi_routing(self, entries) -> None:
        if self.fail:
            raise KvmIoctlError(self.fail, "KVM_SET_GSI_ROUTING", "vm")
        self.commits.append([self.row(entry) for entry in entries])

    @staticmethod
    def row(entry):
        assert (entry.flags, entry.pad) == (0, 0)
        if entry.type == 1:
            return entry.gsi, 1, (entry.u.irqchip.irqchip, entry.u.irqchip.pin)
        if entry.type == 2:
            msi = entry.u.msi
            return entry.gsi, 2, (msi.address_hi << 32 | msi.address_lo, msi.data)
        return entry.gsi, entry.type, (entry.u.hv_sint.vcpu, entry.u.hv_sint.sint)


@pytest.fixture
def vm():
    return Recorder()


def test_making_a_table_commits_nothing(vm):
    table = GsiTable(vm)
    assert vm.commits == []
    table.recommit()
    assert vm.commits == [DEFAULT]


def test_split_irqchip_starts_empty_and_still_gives_24_first(vm):
    table = GsiTable(vm, full_irqchip=False)
    assert table.add_msi(0xFEE00000, 0x41) == 24
    assert vm.commits == [[(24, 2, (0xFEE00000, 0x41))]]


def test_each_add_commits_the_whole_table_s15(vm):
    table = GsiTable(vm)
    assert table.add_hv_sint(3, 2) == 24
    assert table.add_msi(0x1_FEE0_1000, 0x52) == 25
    assert vm.commits[0] == [*DEFAULT, (24, 4, (3, 2))]
    assert vm.commits[1] == [*DEFAULT, (24, 4, (3, 2)), (25, 2, (0x1FEE01000, 0x52))]


def test_release_commits_at_once_s15(vm):
    table = GsiTable(vm)
    gsi = table.add_hv_sint(0, 2)
    table.release(gsi)
    assert vm.commits[-1] == DEFAULT
    assert table.gsis() == []
    assert table.add_hv_sint(1, 2) == gsi  # and the GSI is free again


def test_dynamic_gsis_start_at_24_s16(vm):
    table = GsiTable(vm)
    assert min(table.add_hv_sint(n, 0) for n in range(5)) == 24


@pytest.mark.parametrize("sint", [-1, 16, 99, 2**32])
def test_sint_out_of_range_never_reaches_kvm_s11(vm, sint):
    table = GsiTable(vm)
    with pytest.raises(RouteError, match="SINTs 0 to 15"):
        table.add_hv_sint(0, sint)
    assert vm.commits == []
    assert table.gsis() == []


@pytest.mark.parametrize("vp_index", [-1, 2**32])
def test_vp_out_of_range_never_reaches_kvm_s11(vm, vp_index):
    with pytest.raises(RouteError, match="no such VP"):
        GsiTable(vm).add_hv_sint(vp_index, 2)
    assert vm.commits == []


def test_failed_add_leaves_the_table_as_it_was_s14(vm):
    table = GsiTable(vm)
    table.add_msi(0xFEE00000, 1)
    vm.fail = errno.ENOMEM
    with pytest.raises(KvmIoctlError) as caught:
        table.add_hv_sint(0, 2)
    assert caught.value.errno == errno.ENOMEM
    vm.fail = 0
    assert table.gsis() == [24]
    table.recommit()
    assert vm.commits[-1] == [*DEFAULT, (24, 2, (0xFEE00000, 1))]
    assert table.add_msi(0xFEE00000, 2) == 25  # not 26: the GSI did not leak


def test_failed_release_keeps_the_route(vm):
    table = GsiTable(vm)
    gsi = table.add_msi(0xFEE00000, 1)
    vm.fail = errno.EINVAL
    with pytest.raises(KvmIoctlError):
        table.release(gsi)
    assert table.gsis() == [gsi]


@pytest.mark.parametrize("gsi", [0, 23, 24, 4096, -1])
def test_releasing_what_was_not_given_out_is_refused(vm, gsi):
    table = GsiTable(vm)
    with pytest.raises(RouteError, match="not given out"):
        table.release(gsi)
    assert vm.commits == []


def test_double_release_is_refused(vm):
    table = GsiTable(vm)
    gsi = table.add_msi(0xFEE00000, 1)
    table.release(gsi)
    with pytest.raises(RouteError):
        table.release(gsi)


def test_update_msi_keeps_the_gsi(vm):
    table = GsiTable(vm)
    gsi = table.add_msi(0xFEE00000, 1)
    table.update_msi(gsi, 0xFEE01000, 2)
    assert vm.commits[-1] == [*DEFAULT, (gsi, 2, (0xFEE01000, 2))]
    with pytest.raises(RouteError):
        table.update_msi(table.add_hv_sint(0, 0), 0xFEE01000, 2)
    with pytest.raises(RouteError):
        table.update_msi(5, 0xFEE01000, 2)


def test_a_batch_commits_once(vm):
    table = GsiTable(vm)
    with table.batch():
        first = table.add_msi(0xFEE00000, 1)
        with table.batch():
            second = table.add_msi(0xFEE00000, 2)
        table.release(first)
    assert vm.commits == [[*DEFAULT, (second, 2, (0xFEE00000, 2))]]


def test_a_batch_without_change_commits_nothing(vm):
    with GsiTable(vm).batch():
        pass
    assert vm.commits == []


def test_a_batch_that_raises_changes_nothing(vm):
    table = GsiTable(vm)
    kept = table.add_msi(0xFEE00000, 1)

    def body():
        with table.batch():
            table.add_msi(0xFEE00000, 2)
            table.release(kept)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert len(vm.commits) == 1
    assert table.gsis() == [kept]
    with table.batch():
        pass
    assert len(vm.commits) == 1  # nothing of the failed batch is left to commit


def test_a_batch_whose_commit_fails_changes_nothing(vm):
    table = GsiTable(vm)

    def body():
        with table.batch():
            table.add_msi(0xFEE00000, 1)
            table.add_msi(0xFEE00000, 2)

    vm.fail = errno.ENOMEM
    with pytest.raises(KvmIoctlError):
        body()
    assert table.gsis() == []


def test_a_full_table_says_so_and_changes_nothing(vm):
    table = GsiTable(vm)
    with table.batch():
        for _ in range(GSI_LIMIT - 24):
            table.add_msi(0xFEE00000, 1)
    commits = len(vm.commits)
    with pytest.raises(RouteError, match="taken"):
        table.add_msi(0xFEE00000, 1)
    assert len(vm.commits) == commits
    table.release(100)
    assert table.add_msi(0xFEE00000, 1) == 100


def test_threads_never_share_a_gsi_and_the_last_commit_has_everything(vm):
    for _ in range(20):
        table = GsiTable(vm)
        start = threading.Barrier(4)
        got = []

        def work(table=table, start=start, got=got):
            start.wait()
            for n in range(10):
                gsi = table.add_msi(0xFEE00000, n)
                if n % 3:
                    got.append(gsi)
                else:
                    table.release(gsi)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(got)) == len(got) == 24
        assert sorted(got) == table.gsis()
        assert sorted(row[0] for row in vm.commits[-1] if row[1] == 2) == table.gsis()


class GsiMachine(RuleBasedStateMachine):
    """Whatever happens, the kernel's table is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.vm = Recorder()
        self.table = GsiTable(self.vm)
        self.model = {}

    @rule(data=st.integers(0, 255), fail=st.booleans())
    def add(self, data, fail):
        self.vm.fail = errno.ENOMEM if fail else 0
        try:
            gsi = self.table.add_msi(0xFEE00000, data)
        except KvmIoctlError:
            assert fail
        else:
            assert gsi not in self.model
            self.model[gsi] = data

    @precondition(lambda self: self.model)
    @rule(pick=st.randoms(use_true_random=False), fail=st.booleans())
    def release(self, pick, fail):
        self.vm.fail = errno.ENOMEM if fail else 0
        gsi = pick.choice(sorted(self.model))
        try:
            self.table.release(gsi)
        except KvmIoctlError:
            assert fail
        else:
            del self.model[gsi]

    @rule(count=st.integers(1, 3), fail=st.booleans())
    def batch(self, count, fail):
        self.vm.fail = errno.ENOMEM if fail else 0
        try:
            with self.table.batch():
                added = [self.table.add_msi(0xFEE00000, 7) for _ in range(count)]
        except KvmIoctlError:
            assert fail
        else:
            self.model |= dict.fromkeys(added, 7)

    @invariant()
    def kernel_has_the_model(self):
        assert self.table.gsis() == sorted(self.model)
        if self.vm.commits:
            wanted = [(g, 2, (0xFEE00000, d)) for g, d in sorted(self.model.items())]
            assert self.vm.commits[-1] == DEFAULT + wanted


TestGsiMachine = GsiMachine.TestCase
TestGsiMachine.settings = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.kvm
def test_kvm_takes_the_default_table_and_msis(kvm):
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        table = GsiTable(vm)
        table.recommit()
        gsi = table.add_msi(0xFEE00000, 0x41)
        table.release(gsi)
