"""Module trees: order, built-ins, compression, and bytes that are no module."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.boot import kmod
from hvkvm.errors import BootError

MakeTree = Callable[..., kmod.ModuleTree]
MakeModule = Callable[..., bytes]


def names(modules: list[kmod.Module]) -> list[str]:
    return [m.name for m in modules]


def test_dependencies_load_first_and_once(make_tree: MakeTree) -> None:
    found = make_tree({"a": ["depends=b,c"], "b": ["depends=d"], "c": ["depends=d"], "d": ["depends="]})
    order = names(found.closure(["a", "c"]))
    assert sorted(order) == ["a", "b", "c", "d"]
    assert order.index("d") < order.index("b") < order.index("a")
    assert order.index("d") < order.index("c") < order.index("a")


def test_dash_and_underscore_are_one_name(make_tree: MakeTree) -> None:
    found = make_tree({"kvm-amd": ["depends=kvm"], "kvm": []})
    assert names(found.closure(["kvm_amd", "kvm-amd"])) == ["kvm", "kvm_amd"]


def test_builtin_is_left_out(make_tree: MakeTree) -> None:
    found = make_tree({"a": ["depends=b"]}, builtin="kernel/lib/b.ko\n")
    assert names(found.closure(["a", "b"])) == ["a"]
    assert "b" in found
    assert "b" in found


def test_missing_module_names_kernel_and_module(make_tree: MakeTree) -> None:
    found = make_tree({"a": ["depends=gone"]})
    with pytest.raises(BootError, match=r"6\.1\.0-test has no module gone"):
        found.closure(["a"])


def test_missing_optional_module_is_passed_over(make_tree: MakeTree) -> None:
    found = make_tree({"a": [], "o": []})
    assert names(found.closure(["a"], optional=["ccp", "o"])) == ["a", "o"]


def test_softdep_pre_comes_before_and_may_be_missing(make_tree: MakeTree) -> None:
    found = make_tree({"a": ["softdep=pre: s gone post: late"], "s": [], "late": []})
    assert names(found.closure(["a"])) == ["s", "a"]


def test_cycle_ends(make_tree: MakeTree) -> None:
    found = make_tree({"a": ["depends=b"], "b": ["depends=a"]})
    assert sorted(names(found.closure(["a"]))) == ["a", "b"]


def test_long_chain_needs_no_recursion(make_tree: MakeTree) -> None:
    count = 1500
    chain = {f"m{n}": [f"depends=m{n + 1}"] for n in range(count)} | {f"m{count}": []}
    assert names(make_tree(chain).closure(["m0"]))[0] == f"m{count}"


def test_tree_without_order_file_is_walked(make_tree: MakeTree) -> None:
    found = make_tree({"a": ["depends=b"], "b": []}, order=False)
    assert names(found.closure(["a"])) == ["b", "a"]


def test_xz_module_is_read_though_order_names_ko(tmp_path: Path, make_tree: MakeTree) -> None:
    found = make_tree({"a": []})
    plain = tmp_path / "lib/modules/6.1.0-test/kernel/drivers/a.ko"
    data = plain.read_bytes()
    plain.with_name("a.ko.xz").write_bytes(lzma.compress(data))
    plain.unlink()
    assert found.closure(["a"])[0].data == data


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd tool is not installed")
def test_zst_module_is_read_without_order_file(tmp_path: Path, make_module: MakeModule) -> None:
    path = tmp_path / "kernel/x.ko.zst"
    path.parent.mkdir()
    path.write_bytes(
        subprocess.run(["zstd", "-q"], input=make_module("depends="), stdout=-1, check=True).stdout
    )
    assert kmod.ModuleTree(tmp_path).closure(["x"])[0].data == make_module("depends=")


def test_broken_compression_is_a_boot_error(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/x.ko.xz").write_bytes(b"not xz")
    with pytest.raises(BootError, match="cannot be decompressed"):
        kmod.ModuleTree(tmp_path).closure(["x"])


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd tool is not installed")
def test_a_broken_zst_module_is_a_boot_error(tmp_path: Path) -> None:
    path = tmp_path / "x.ko.zst"
    path.write_bytes(b"not zstd")
    with pytest.raises(BootError, match="cannot be decompressed: it is cut short or damaged, or too large"):
        kmod.read_module(path)


@pytest.mark.parametrize("suffix", ["xz", "gz", "zst"])
def test_a_module_that_unpacks_without_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    tool = {"xz": "xz", "gz": "gzip", "zst": "zstd"}[suffix]
    if shutil.which(tool) is None:
        pytest.skip(f"the {tool} tool is not installed")
    path = tmp_path / f"x.ko.{suffix}"
    path.write_bytes(subprocess.run([tool, "-qc"], input=bytes(1 << 20), stdout=-1, check=True).stdout)
    assert kmod.read_module(path) == bytes(1 << 20)
    monkeypatch.setattr(kmod, "_MODULE_MAX", (1 << 20) - 1)
    with pytest.raises(BootError, match="too large for a module"):
        kmod.read_module(path)


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_a_module_that_is_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    packed = {"xz": lzma.compress, "gz": gzip.compress}[suffix](bytes(range(256)) * 64)
    path = tmp_path / f"x.ko.{suffix}"
    path.write_bytes(packed[:-4])
    with pytest.raises(BootError, match="cut short"):
        kmod.read_module(path)


def test_folder_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="holds no kernel modules"):
        kmod.ModuleTree(tmp_path)


def test_several_versions_are_refused(tmp_path: Path) -> None:
    for version in ("1", "2"):
        (tmp_path / "lib/modules" / version / "kernel").mkdir(parents=True)
    with pytest.raises(BootError, match="several kernel versions"):
        kmod.ModuleTree(tmp_path)


def test_modinfo_keeps_repeated_keys(make_module: MakeModule) -> None:
    assert kmod.modinfo(make_module("alias=x", "alias=y"))["alias"] == ["x", "y"]


@given(st.binary(max_size=400))
def test_random_bytes_are_no_module(data: bytes) -> None:
    with pytest.raises(BootError):
        kmod.modinfo(data)


@given(where=st.integers(0, 400), what=st.binary(min_size=1, max_size=8))
def test_damaged_modules_raise_nothing_else(where: int, what: bytes, make_module: MakeModule) -> None:
    good = make_module("depends=a,b", "softdep=pre: c")
    damaged = good[:where] + what + good[where + len(what) :]
    try:
        required, wished = kmod.dependencies(damaged)
    except BootError:
        return
    assert all(isinstance(name, str) for name in required + wished)


@given(length=st.integers(0, 400))
def test_cut_modules_raise_nothing_else(length: int, make_module: MakeModule) -> None:
    good = make_module("depends=a,b")
    if length < len(good):
        with pytest.raises(BootError):
            kmod.modinfo(good[:length])


def test_a_list_of_modules_that_is_none_is_named(tmp_path: Path, make_tree: MakeTree) -> None:
    root = make_tree({"a": []}).root
    (root / "modules.order").write_bytes(b"kernel/\xff.ko\n")
    with pytest.raises(BootError, match=r"^--modules-dir: .*/modules.order: is no UTF-8 text; name "):
        kmod.ModuleTree(root)
    (root / "modules.order").unlink()
    (root / "modules.order").mkdir()
    with pytest.raises(BootError, match=r"^--modules-dir: .*/modules.order: is not a regular file; name "):
        kmod.ModuleTree(root)


def test_a_listed_name_that_is_too_long_is_a_missing_module(tmp_path: Path, make_tree: MakeTree) -> None:
    name = "n" * 300
    root = make_tree({"a": [f"depends={name}"]}).root
    (root / "modules.order").write_text(f"kernel/drivers/a.ko\nkernel/{name}.ko\n")
    with pytest.raises(BootError, match="has no module n"):
        kmod.ModuleTree(root).closure(["a"])


def test_a_file_that_is_no_module_is_named_with_its_flag(make_tree: MakeTree) -> None:
    found = make_tree({"a": ["depends=b"], "b": []})
    path = found.root / "kernel/drivers/b.ko"
    path.write_text("no module")
    text = f"--module b: {path}: not a 64-bit ELF kernel module; check the folder of modules"
    with pytest.raises(BootError, match=f"^{re.escape(text)}$"):
        found.closure(["a"])
    path.with_name("b.ko.xz").write_text("no archive")
    path.unlink()
    with pytest.raises(BootError, match=f"^--module b: {re.escape(str(path))}.xz: cannot be decompressed"):
        found.closure(["a"])
