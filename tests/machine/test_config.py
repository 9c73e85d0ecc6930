"""MachineConfig: every bad value is answered by one line naming flag, reason and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvkvm.cli.run import config_from
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import fields_of
from hvkvm.machine.config_kinds import MIB, PathName, parse_size
from hvkvm.machine.disk_spec import DiskSpec
from hvkvm.machine.nic_spec import NicSpec


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB),
        ("512", 512 * MIB),
        ("1G", 1 << 30),
        ("1.5G", 3 << 29),
        ("300MiB", 300 * MIB),
        ("64MB", 64 * MIB),
        ("4096K", 4 * MIB),
        ("8388608B", 8 * MIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=12))
def test_a_size_is_a_number_or_one_clear_line(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ConfigError as error:
        assert str(error).startswith("--memory ")
        assert "not a size" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpus": 0}, ("--cpus 0", "1 to 254")),
        ({"cpus": 255}, ("--cpus 255", "1 to 254")),
        ({"cpu": "host,-cx61"}, ("--cpu host,-cx61", "cx16")),
        ({"memory": 1 * MIB}, ("--memory 1M", "at least 8M")),
        ({"memory": (16 * MIB) + 5}, ("--memory", "4 KiB")),
        ({"timeout": 0.0}, ("--timeout 0", "more than 0")),
        ({"timeout": float("nan")}, ("--timeout nan", "more than 0")),
        ({"synic": "magic"}, ("--synic magic", "auto, kernel, user")),
        ({"devices": ("floppy",)}, ("--device floppy", "hyperv-testdev")),
        ({"append": "a\nb"}, ("--append", "newline")),
        ({"initrd": Path("/nonexistent/initrd")}, ("--initrd /nonexistent/initrd", "no such file")),
        ({"kernel": Path("/")}, ("--kernel /", "directory")),
        ({"kernel": "vmlinuz"}, ("--kernel 'vmlinuz'", "str", "Path")),
        ({"memory": "512M"}, ("--memory '512M'", "str", "int")),
        ({"timeout": "5"}, ("--timeout '5'", "str", "int or float")),
        ({"name": None}, ("--name None", "NoneType", "str")),
        ({"command": "uname -a"}, ("config key command: 'uname -a'", "str", "tuple")),
        ({"devices": (1,)}, ("--device 1", "int", "str")),
        ({"files": {"/x": Path("/dev/null")}}, ("--file {", "dict", "tuple")),
        ({"nets": ("user",), "vmbus": "on"}, ("--net 'user'", "str", "NicSpec")),
        ({"disks": (DiskSpec(Path("/x")),), "vmbus": "on"}, ("--disk file=", "PosixPath", "str")),  # type: ignore[arg-type]
        ({"nets": (NicSpec("user", loss="1%"),), "vmbus": "on"}, ("--net loss=", "str", "float")),  # type: ignore[arg-type]
        ({"modules": ("hv_vmbus",)}, ("--module", "--modules-dir")),
        ({"vmbus_max_version": "7.1"}, ("--vmbus-max-version 7.1", "2.4", "6.0")),
        ({"command_io": "socket"}, ("command_io", "console, streams, terminal")),
        ({"vsock": Path("/tmp/guest.vsock")}, ("--vsock /tmp/guest.vsock", "--vmbus on")),
        ({"files": (("root/x", Path("/dev/null")),)}, ("--file root/x", "absolute")),
        ({"files": (("/a/../x", Path("/dev/null")),)}, ("--file /a/../x", "absolute")),
        (
            {"files": (("/root/x", Path("/nonexistent/x")),)},
            ("--file /root/x /nonexistent/x", "no such file"),
        ),
        (
            {"files": (("/root/x", Path("/dev/null")), ("/root//./x", Path("/dev/zero")))},
            ("--file /root//./x: given twice, as /dev/null and /dev/zero; leave one out",),
        ),
        (
            {"files": (("/x", Path("/dev/null")), ("/x", Path("/dev/null")))},
            ("--file /x: given twice, as /dev/null and /dev/null",),
        ),
    ],
)
def test_bad_values_name_flag_reason_and_remedy(
    kernel: Path, change: dict[str, object], words: tuple[str, ...]
) -> None:
    values: dict[str, object] = {"kernel": kernel, **change}
    with pytest.raises(ConfigError) as caught:
        MachineConfig(**values).validate()  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_toml_round_trip(tmp_path: Path, kernel: Path) -> None:
    toml = tmp_path / "guest.toml"
    toml.write_text(
        'kernel = "kernel"\ncpus = 4\nmemory = "1G"\nhv = "none"\ntimeout = 5\ncommand = ["uname", "-a"]\n'
        'cpu = "host,-cx16"\nvmbus = "on"\nvsock = "v.sock"\n[files]\n"/root/k" = "kernel"\n'
    )
    config = MachineConfig.from_toml(toml)
    assert config.kernel == kernel
    assert (config.cpus, config.memory, config.hv, config.timeout) == (4, 1 << 30, "none", 5.0)
    assert config.cpu == "host,-cx16"
    assert config.command == ("uname", "-a")
    assert config.vsock == tmp_path / "v.sock"
    assert config.files == (("/root/k", kernel),)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ('cpus = "two"', "wrong type"),
        ("cpus = true", "wrong type"),
        ("colour = 1", "unknown"),
        ("kernel = 3", "wrong type"),
        ("= 3", "--config"),
        ("command = [1]", "wrong type"),
        ("files = 3", "wrong type"),
        ("files = {a = 1}", "wrong type"),
        ('timeout = "x"', "wrong type"),
        ('vsock = ""', "config key vsock: empty; name a path"),
    ],
)
def test_bad_toml(tmp_path: Path, kernel: Path, body: str, word: str) -> None:
    toml = tmp_path / "guest.toml"
    toml.write_text(("" if body.startswith("kernel") else 'kernel = "kernel"\n') + body + "\n")
    with pytest.raises(ConfigError, match=word):
        MachineConfig.from_toml(toml)


@pytest.mark.parametrize(
    "flag", [one.flag for one in fields_of(MachineConfig).values() if isinstance(one.kind, PathName)]
)
def test_an_empty_path_is_refused_in_words(flag: str) -> None:
    """Path would take it for the folder that we are in."""
    with pytest.raises(ConfigError, match=f"^{flag}: empty; name a path"):
        config_from(["--kernel", "/dev/null", flag, ""])
