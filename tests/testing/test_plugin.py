"""The plugin as its users meet it: their tests in a folder of their own, run by a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hvkvm.testing.plugin import TierReport, counted_tier

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.kvm


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HVKVM_REQUIRE", "HVKVM_SYNIC", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)


def test_micro_guests_pass_fail_and_say_why(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_numbers(micro_guest):
            result = micro_guest('''
                movabsq $0x123456789abcdef0, %rbx
                result %rbx
                result $-1
                print "hello "
                print_hex %rbx
                exit 7
            ''').run()
            assert result.results == (0x123456789abcdef0, (1 << 64) - 1)
            assert (result.status, result.console) == (7, "hello 123456789abcdef0")

        def test_the_end_is_status_0(micro_guest):
            assert micro_guest("nop").run().status == 0

        def test_a_caught_exception(micro_guest):
            result = micro_guest('''
                catch   1f
                read_msr 0x12345678
                exit    1
            1:  result  fault_vector
            ''').run()
            assert (result.status, result.results) == (0, (13,))

        def test_an_interrupt(micro_guest):
            result = micro_guest('''
                on_interrupt 0x60, handler
                movl    $0xFEE00300, %eax
                movl    $0x44060, (%rax)        # to self
                sti
            1:  cmpq    $0, taken
                je      1b
                result  taken
                exit    0
            handler:
                pushq   %rax
                incq    taken
                eoi
                popq    %rax
                iretq
                .data
            taken: .quad 0
            ''').run()
            assert result.results == (1,)

        @pytest.mark.hvkvm(cpus=[1, 3])
        def test_all_cpus(micro_guest, hvkvm_cpus):
            guest = micro_guest('''
            1:  pause
                jmp     1b
            ap_main:
                result  %rdi
            2:  hlt
                jmp     2b
            ''')
            guest.start()
            guest.wait_until(lambda: len(guest.results) == hvkvm_cpus - 1 and guest, "every CPU")
            assert sorted(guest.results) == list(range(1, hvkvm_cpus))

        def test_exception(micro_guest):
            micro_guest("print \\"before \\"\\n ud2").run()

        @pytest.mark.hvkvm(seconds=0.3)
        def test_hang(micro_guest):
            micro_guest("1: jmp 1b").run()

        def test_nonsense(micro_guest):
            micro_guest('''
                nop
                frobnicate %rax
            ''')
        """
    )
    result = pytester.runpytest_subprocess("--junitxml=report.xml", "-p", "no:randomly")
    result.assert_outcomes(passed=6, failed=3)
    result.stdout.fnmatch_lines_random(
        [
            "*the micro guest took exception 6, error code 0x0, rip 0x*",
            "*guest: console*",
            "before *",
            "*guest: how it ended*",
            "triple fault: exception 6*",
            "*the guest has not ended within 0.3 s",
            "vcpu0: running guest*",
            "*micro guest:3: Error: no such instruction: `frobnicate %rax'",
        ]
    )
    cases = {case.get("name"): case for case in ET.parse(pytester.path / "report.xml").iter("testcase")}
    properties = {p.get("name"): p.get("value") for p in cases["test_all_cpus[cpus=3]"].iter("property")}
    assert properties["hvkvm.cpus"] == "3"
    assert properties["hvkvm.synic"] == "none"
    assert "hvkvm.host" in properties


def test_the_host_is_a_test_on_every_synic(pytester: pytest.Pytester) -> None:
    """On a KVM without Hyper-V of its own one of the two is skipped, with the reason."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.hvkvm(synic=["kernel", "user"])
        def test_post(micro_guest, hvkvm_synic):
            guest = micro_guest('''
                hyperv_on
                movl    $pages, %eax
                movl    $7, (%rax)
                movl    $1, 8(%rax)
                movl    $4, 12(%rax)
                movl    $0x11223344, 16(%rax)
                hypercall $0x5c, $pages
                result  %rax
            ''', hv="passthrough")
            heard = []
            guest.partition.connections.add_message(7, lambda m: heard.append(bytes(m.payload)[:4]) or 0)
            assert guest.run().results == (0,)
            assert heard == [bytes.fromhex("44332211")]
            assert guest.machine.hyperv.offered.synic == hvkvm_synic
        """
    )
    result = pytester.runpytest_subprocess("-rs", "-v")
    outcomes = result.parseoutcomes()
    assert outcomes.get("passed", 0) + outcomes.get("skipped", 0) == 2
    result.stdout.fnmatch_lines(["*test_post*synic=user* PASSED*"])


def test_a_kept_guest_is_named_and_ends_by_ctl(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_fails(micro_guest):
            micro_guest("1: jmp 1b").start()
            raise AssertionError("on purpose")
        """
    )
    refused = pytester.runpytest_subprocess("--hvkvm-keep", "-n", "2")
    refused.stderr.fnmatch_lines(["*--hvkvm-keep: one failed test holds the session up; leave -n out*"])
    command = [sys.executable, "-m", "pytest", "--hvkvm-keep"]
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kept = next(line for line in process.stdout if "runs on: hvkvm ctl" in line)
        name = kept.split("--vm ")[1].split()[0]
        ended = subprocess.run(
            [sys.executable, "-m", "hvkvm", "ctl", "--vm", name, "quit"], check=False, capture_output=True
        )
        rest = process.stdout.read()
    assert ended.returncode == 0, ended
    assert "on purpose" in rest
    assert "1 failed" in rest
    assert process.returncode == 1


def test_side_by_side_and_without_a_kernel(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of pytest-xdist share nothing but the cache; a kernel that is not there is an error."""
    monkeypatch.setenv("HVKVM_GUEST_KERNEL", str(pytester.path / "none"))
    monkeypatch.setenv("HVKVM_CACHE", str(pytester.path / "cache"))
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_many(micro_guest, number):
            assert micro_guest(f"exit {number % 2}").run().status == number % 2

        @pytest.mark.hvkvm(kernels="all")
        def test_linux(linux_guest):
            raise AssertionError("no kernel, and it ran")
        """
    )
    result = pytester.runpytest_subprocess("-k", "many", "-n", "2")
    result.assert_outcomes(passed=6)
    refused = pytester.runpytest_subprocess("-k", "linux")
    assert refused.ret != 0
    refused.stdout.fnmatch_lines(["*HVKVM_GUEST_KERNEL=*/none: no such file; check the path*"])
    wrong = pytester.runpytest_subprocess("--hvkvm-kernels", str(pytester.path), "-k", "linux")
    wrong.stderr.fnmatch_lines(["*--hvkvm-kernels *: no vmlinuz in this folder; name the kernel's file*"])


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_kernel_is_named_from_where_the_session_began(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A test that had gone elsewhere found none."""
    pytester.makepyfile(
        """
        from hvkvm.testing.kernels import busybox

        def test_it(request, tmp_path, monkeypatch):
            monkeypatch.chdir(tmp_path)
            kernel = request.getfixturevalue("hvkvm_kernel")
            assert kernel.image.read_text() == "a kernel"
            assert busybox().read_text() == "a busybox"
        """
    )
    (pytester.path / "vmlinuz-1").write_text("a kernel")
    (pytester.path / "bb").write_text("a busybox")
    monkeypatch.setenv("HVKVM_GUEST_BUSYBOX", "bb")
    monkeypatch.setenv("HVKVM_GUEST_KERNEL", "vmlinuz-1" if by == "environment" else "none")
    options = ("--hvkvm-kernels", "vmlinuz-1") if by == "option" else ()
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=1)


def test_a_session_that_requires_kvm_counts_what_its_fixtures_need(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test of it is marked: that its guests ran shows that KVM was there."""
    monkeypatch.setenv("HVKVM_REQUIRE", "kvm")
    pytester.makepyfile("def test_it(micro_guest): assert micro_guest('exit 3').run().status == 3")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["hvkvm tiers: anywhere 0 ran 0 skipped, kvm 1 ran 0 skipped, hyperv 0 ran*"])
    pytester.makepyfile("def test_it(disk): pass")
    result = pytester.runpytest_subprocess()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["hvkvm tiers: HVKVM_REQUIRE=kvm, but no test of it ran"])


def test_a_test_is_counted_where_it_needs_to_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_disk_anywhere(disk): ...
        def test_micro_kvm(micro_guest): ...
        def test_pair_kvm(vm_pair): ...
        def test_handle_kvm(kvm): ...
        def test_lab_hyperv(lab): ...
        @pytest.mark.hyperv
        def test_marked_hyperv(micro_guest): ...
        @pytest.mark.kvm
        def test_marked_kvm(): ...
        @pytest.mark.hvkvm(synic="kernel")
        def test_kernel_hyperv(micro_guest): ...
        @pytest.mark.kvm
        @pytest.mark.hvkvm(synic="kernel")
        def test_both_hyperv(micro_guest): ...
        @pytest.mark.hvkvm(synic="user")
        def test_user_kvm(linux_guest): ...
        """
    )
    items, _reports = pytester.inline_genitems()
    assert len(items) == 10
    for item in items:
        assert counted_tier(item) == item.name.partition("[")[0].rpartition("_")[2], item.name
    items[1].config.option.hvkvm_synic = "kernel"
    assert counted_tier(items[1]) == "hyperv"


def test_what_ran_with_hyperv_ran_with_kvm() -> None:
    report = TierReport(frozenset(("kvm", "hyperv")))
    report.ran["hyperv"] = 1
    assert report.empty_tiers() == []
    report.ran.clear()
    report.ran["kvm"] = 1
    assert report.empty_tiers() == ["hyperv"]


@pytest.mark.parametrize("option", ["--collect-only", "--setup-only", "--setup-plan"])
def test_a_session_that_shows_its_tests_alone_is_not_required_to_run_any(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv("HVKVM_REQUIRE", "kvm")
    pytester.makepyfile("def test_it(disk): pass")
    result = pytester.runpytest_subprocess(option)
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*no test of it ran*")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cpu=2", " takes cpus, kernels, seconds, synic only"),
        ("kernels='al'", "(kernels='al'): it takes \"all\""),
        ("seconds='60'", "(seconds='60'): it takes a number above 0"),
        ("seconds=0", "(seconds=0): it takes a number above 0"),
        ("cpus=range(1, 3)", "(cpus=range(1, 3)): it takes numbers, in a list or one"),
        ("cpus=[1, 0]", "(cpus=[1, 0]): it takes numbers, in a list or one"),
        ("synic=['kernl']", '(synic=[\'kernl\']): it takes "kernel" and "user"'),
    ],
)
def test_a_marker_with_a_typing_error_is_refused(pytester: pytest.Pytester, given: str, said: str) -> None:
    """One was as good as none: a kernel alone ran, and 30 seconds bounded the waits."""
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.hvkvm({given})
        def test_a(micro_guest): ...
        """
    )
    result = pytester.runpytest_inprocess("--collect-only")
    assert result.ret != 0
    assert f"mark.hvkvm{said}" in result.stdout.str()


@pytest.mark.parametrize("given", ["", "kvm"])
def test_the_environments_synic_is_checked_by_its_own_name(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("HVKVM_SYNIC", given)
    pytester.makepyfile(
        "def test_one(pytestconfig): assert pytestconfig.getoption('--hvkvm-synic') == 'auto'"
    )
    result = pytester.runpytest_subprocess()
    if given:
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: HVKVM_SYNIC=kvm: no such SynIC; choose auto, kernel, user"])
    else:
        result.assert_outcomes(passed=1)


def examples(word: str) -> list[str]:
    """The Python blocks of docs/testing.md that have `word` in them.

    Those of its worked examples are cut from files in tests/examples, which are tests themselves.
    """
    page, worked, _ = (
        (Path(__file__).parents[2] / "docs/testing.md").read_text().partition("## Worked examples")
    )
    assert worked
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    return [block for block in blocks if word in block]


def test_the_documented_micro_guests_pass(pytester: pytest.Pytester) -> None:
    found = examples("micro_guest(")
    assert len(found) == 2
    for number, text in enumerate(found):
        (pytester.path / f"test_{number}.py").write_text(text)
    result = pytester.runpytest_subprocess()
    assert result.parseoutcomes().get("failed", 0) == 0
    assert result.parseoutcomes()["passed"] >= 2


@pytest.mark.timeout(900)
@pytest.mark.hyperv
def test_the_documented_linux_guests_pass(pytester: pytest.Pytester) -> None:
    found = examples("linux_guest(")
    assert len(found) == 3
    for number, text in enumerate(found):
        (pytester.path / f"test_{number}.py").write_text(text)
    result = pytester.runpytest_subprocess("-v")
    result.assert_outcomes(passed=4)
