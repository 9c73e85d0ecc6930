"""The guest's first file system: what is in it, and that its shell script is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.abi import guest_command
from hvkvm.abi.board import GUEST_EXIT_PORT
from hvkvm.boot import command_files, guest_exit, guest_orders, guest_scripts, guest_vsock, initramfs
from hvkvm.boot.kmod import ModuleTree
from hvkvm.errors import BootError

STATIC = guest_exit.program()
needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="the cpio tool is not installed")


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    path = tmp_path / "busybox"
    path.write_bytes(STATIC)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVKVM_CACHE", str(tmp_path / "cache"))


def unpack(image: bytes, folder: Path) -> Path:
    """Unpack all the joined archives, as the kernel does."""
    folder.mkdir()
    mark = b"TRAILER!!!" + bytes(4)
    for piece in image.split(mark)[:-1]:
        # Device nodes need root, and what they are is tested elsewhere.
        subprocess.run(["cpio", "-idm", "--quiet", "-f", "dev/*"], input=piece + mark, cwd=folder, check=True)
    return folder


@needs_cpio
def test_command_is_quoted_for_the_shell(tmp_path: Path, busybox: Path) -> None:
    root = unpack(initramfs.build(["echo", "a  b", "$HOME;", "it's"], busybox=busybox), tmp_path / "root")
    done = subprocess.run(["sh", root / "command"], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"a  b $HOME; it's\n"


@needs_cpio
def test_without_a_command_there_is_a_shell(tmp_path: Path, busybox: Path) -> None:
    root = unpack(initramfs.build(None, busybox=busybox), tmp_path / "root")
    assert (root / "command").read_text().endswith("exec sh\n")


@needs_cpio
def test_programs_are_there_and_executable(tmp_path: Path, busybox: Path) -> None:
    root = unpack(initramfs.build(["true"], busybox=busybox), tmp_path / "root")
    for name in ("init", "bin/busybox", "bin/guest-exit"):
        assert (root / name).stat().st_mode & 0o111
    assert (root / "bin/sh").readlink() == Path("busybox")
    for folder in ("proc", "sys", "dev", "tmp", "root"):
        assert (root / folder).is_dir()


@needs_cpio
def test_modules_are_numbered_in_load_order(
    tmp_path: Path, busybox: Path, make_tree: Callable[..., ModuleTree]
) -> None:
    root = make_tree({"a": ["depends=b"], "b": []}).root
    image = initramfs.build(["true"], busybox=busybox, modules=["a"], kernel_modules_dir=root)
    found = unpack(image, tmp_path / "root")
    assert sorted(path.name for path in (found / "modules").iterdir()) == ["000-b.ko", "001-a.ko"]


def test_modules_are_read_once(
    busybox: Path, monkeypatch: pytest.MonkeyPatch, make_tree: Callable[..., ModuleTree]
) -> None:
    root = make_tree({"a": ["depends=b"], "b": []}).root
    first = initramfs.build(["true"], busybox=busybox, modules=["a"], kernel_modules_dir=root)
    monkeypatch.setattr(initramfs, "ModuleTree", lambda folder: pytest.fail("read again"))
    assert initramfs.build(["true"], busybox=busybox, modules=["a"], kernel_modules_dir=root) == first


def test_changed_module_is_read_again(
    busybox: Path, make_tree: Callable[..., ModuleTree], make_module: Callable[..., bytes]
) -> None:
    root = make_tree({"a": ["depends=b"], "b": []}).root
    initramfs.build(["true"], busybox=busybox, modules=["a"], kernel_modules_dir=root)
    changed = make_module("name=b", "description=changed")
    (root / "kernel/drivers/b.ko").write_bytes(changed)
    assert changed in initramfs.build(["true"], busybox=busybox, modules=["a"], kernel_modules_dir=root)


@given(st.binary(max_size=60))
def test_damaged_module_cache_is_not_believed(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    kept = tmp_path_factory.mktemp("cache") / "kept"
    kept.write_bytes(b"hvkvm modules 1\n" + junk)
    found = initramfs._cached_modules(kept)
    assert found is None or junk.startswith((b"[]", b"{}", b'""', b" "))


@pytest.mark.parametrize("marks", [b"[" * 100_000, b"[{}]", b"[" + b"1" * 5000 + b"]"])
def test_a_module_cache_of_other_json_is_not_believed(tmp_path: Path, marks: bytes) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"hvkvm modules 1\n" + marks + b"\n")
    assert initramfs._cached_modules(kept) is None


def test_modules_without_a_folder_are_refused(busybox: Path) -> None:
    with pytest.raises(BootError, match="lib/modules/VERSION"):
        initramfs.build(["true"], busybox=busybox, modules=["hv_vmbus"])


@needs_cpio
def test_extra_files_keep_their_mode(tmp_path: Path, busybox: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o750)
    image = initramfs.build(["true"], busybox=busybox, files={"/opt/x/tool": tool, "/etc/motd": b"hello"})
    root = unpack(image, tmp_path / "root")
    assert (root / "opt/x/tool").stat().st_mode & 0o777 == 0o750
    assert (root / "etc/motd").read_bytes() == b"hello"


@pytest.mark.parametrize("name", ["/init", "/command", "//session", "/bin/../launch"])
def test_no_file_takes_the_place_of_our_own_programs(tmp_path: Path, busybox: Path, name: str) -> None:
    """The archive's last entry of a name wins: the command would not run, and nothing would say so."""
    with pytest.raises(BootError, match=f"--file {name}: hvkvm's own"):
        initramfs.build(["true"], busybox=busybox, files={name: b"mine"})
    with pytest.raises(BootError, match=f"--file {name}: hvkvm's own"):
        command_files.orders(["true"], files={name: b"mine"})
    assert b"mine" in command_files.pack_files({name: b"mine"})  # behind an initrd with an init of its own
    for other in ("/etc/init", "/bin/guest-exit"):
        assert b"mine" in initramfs.build(["true"], busybox=busybox, files={other: b"mine"})


def test_unreadable_file_is_a_boot_error(tmp_path: Path, busybox: Path) -> None:
    with pytest.raises(BootError, match="No such file"):
        initramfs.build(["true"], busybox=busybox, files={"/x": tmp_path / "gone"})


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n" * 99, STATIC[:70]])
def test_busybox_that_is_no_static_program_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "busybox"
    path.write_bytes(data)
    with pytest.raises(BootError, match="busybox-static"):
        initramfs.build(["true"], busybox=path)


def test_dynamic_program_is_not_static() -> None:
    dynamic = bytearray(STATIC)
    dynamic[64] = 3  # PT_INTERP
    assert initramfs.is_static_elf(STATIC)
    assert not initramfs.is_static_elf(bytes(dynamic))


@given(st.binary(max_size=200))
def test_elf_check_survives_anything(data: bytes) -> None:
    assert initramfs.is_static_elf(b"\x7fELF\x02\x01" + data) in (True, False)


SCRIPTS = {name: text for name, text in vars(guest_scripts).items() if name.isupper() and name[0] != "_"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_one(name: str) -> None:
    subprocess.run(["sh", "-n"], input=SCRIPTS[name], text=True, check=True)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.endswith("INIT")])
def test_every_init_says_the_marker_first(name: str) -> None:
    said = [line for line in SCRIPTS[name].splitlines() if "echo" in line]
    assert said[0] == 'echo "hvkvm: init $up"'


@needs_cpio
@pytest.mark.parametrize("command_io", ["streams", "terminal"])
def test_a_command_with_streams_brings_the_scripts_for_them(
    tmp_path: Path, busybox: Path, command_io: initramfs.CommandIo
) -> None:
    image = initramfs.build(["true"], busybox=busybox, command_io=command_io, terminal_type="screen")
    root = unpack(image, tmp_path / "root")
    named = {"streams": ("init", "session", "launch"), "terminal": ("init", "session", "terminal")}[
        command_io
    ]
    assert all(os.access(root / name, os.X_OK) for name in (*named, "bin/guest-vsock"))
    assert ("export TERM=screen" in (root / "command").read_text()) is (command_io == "terminal")
    assert "vsock" not in (root / "init").read_text().replace("neither vsock", "")


@needs_cpio
@pytest.mark.parametrize(("modules", "taken"), [({"a": []}, []), ({"hv_sock": []}, ["000-hv_sock.ko"])])
def test_vsock_is_tried_where_the_host_listens_and_its_module_taken_along_if_there_is_one(
    tmp_path: Path,
    busybox: Path,
    make_tree: Callable[..., ModuleTree],
    modules: dict[str, list[str]],
    taken: list[str],
) -> None:
    image = initramfs.build(
        ["true"],
        busybox=busybox,
        kernel_modules_dir=make_tree(modules).root,
        command_io="streams",
        vsock=True,
    )
    root = unpack(image, tmp_path / "root")
    assert f"guest-vsock {guest_command.VSOCK_CONTROL} 3" in (root / "init").read_text()
    assert [path.name for path in root.glob("modules/*")] == taken


@pytest.mark.skipif(shutil.which("as") is None, reason="the GNU assembler is not installed")
def test_guest_exit_is_what_its_source_says(tmp_path: Path) -> None:
    text = ".intel_syntax noprefix\n.code64\n" + guest_exit.SOURCE.format(port=GUEST_EXIT_PORT)
    subprocess.run(["as", "-o", tmp_path / "x.o", "-"], input=text, text=True, check=True)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", tmp_path / "x.o", tmp_path / "x.bin"], check=True
    )
    assert (tmp_path / "x.bin").read_bytes() == guest_exit.code()


@pytest.mark.skipif(shutil.which("as") is None, reason="the GNU assembler is not installed")
def test_guest_vsock_is_what_its_source_says(tmp_path: Path) -> None:
    text = ".intel_syntax noprefix\n.code64\n" + guest_vsock.SOURCE
    subprocess.run(["as", "-o", tmp_path / "x.o", "-"], input=text, text=True, check=True)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", tmp_path / "x.o", tmp_path / "x.bin"], check=True
    )
    assert (tmp_path / "x.bin").read_bytes() == guest_vsock.code()


@pytest.mark.skipif(shutil.which("as") is None, reason="the GNU assembler is not installed")
def test_guest_orders_is_what_its_source_says(tmp_path: Path) -> None:
    text = ".intel_syntax noprefix\n.code64\n" + guest_orders.source()
    subprocess.run(["as", "-o", tmp_path / "x.o", "-"], input=text, text=True, check=True)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", tmp_path / "x.o", tmp_path / "x.bin"], check=True
    )
    assert (tmp_path / "x.bin").read_bytes() == guest_orders.code()


@needs_cpio
def test_an_init_that_waits_has_no_command_and_finds_it_in_its_orders(busybox: Path, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_bytes(b"tool")
    waits = unpack(initramfs.build(None, busybox=busybox, awaits=True), tmp_path / "waits")
    assert (waits / "init").read_text().endswith(". /begin\n")
    assert (waits / "bin/guest-orders").read_bytes() == guest_orders.program()
    assert not (waits / "command").exists()
    orders = command_files.orders(["a b", "c"], files={"/opt/x": tool}, command_io="streams")
    handed = unpack(orders, tmp_path / "handed")
    whole = unpack(initramfs.build(["a b", "c"], busybox=busybox, command_io="streams"), tmp_path / "whole")
    assert sorted(path.name for path in handed.iterdir()) == ["begin", "command", "launch", "opt", "session"]
    for name in ("command", "launch", "session"):
        assert (handed / name).read_bytes() == (whole / name).read_bytes()
    assert (handed / "opt/x").read_bytes() == b"tool"
    assert (whole / "init").read_text().endswith((handed / "begin").read_text())


def test_guest_vsock_says_when_it_cannot_connect(tmp_path: Path) -> None:
    """A host has nobody at this port of its own hypervisor, if it has one."""
    program = tmp_path / "guest-vsock"
    program.write_bytes(guest_vsock.program())
    program.chmod(0o755)
    done = subprocess.run([program, "1752591103", "1", "/bin/true"], timeout=60, check=False)
    assert done.returncode == guest_vsock.CANNOT_CONNECT
