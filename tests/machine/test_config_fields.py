"""The table of configuration fields: every row is whole, and the command line, TOML and the class agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvkvm.cli.run import config_from, parser
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import Field, check_values, fields_of
from hvkvm.machine.config_kinds import Choice, File, GuestFiles, Kind, Number, OnOff, Seconds, Size, Words

FIELDS = fields_of(MachineConfig)
TYPES: dict[type[Kind], type | tuple[type, ...]] = {
    Number: int,
    Size: int,
    OnOff: bool,
    Seconds: (float, type(None)),
    Words: tuple,
    GuestFiles: tuple,
    Choice: str,
    File: (Path, type(None)),
}


def test_every_field_is_a_row() -> None:
    assert tuple(FIELDS) == MachineConfig._fields
    assert all(isinstance(field, Field) for field in FIELDS.values())


@pytest.mark.parametrize("key", MachineConfig._field_defaults)
def test_a_default_is_of_its_kind_and_passes_its_check(key: str) -> None:
    field, default = FIELDS[key], MachineConfig._field_defaults[key]
    if expected := TYPES.get(type(field.kind)):
        assert isinstance(default, expected)
    field.kind.check(field.name(key), default)
    if field.check is not None:
        field.check(field.name(key), default)
    if field.kind.repeated:
        assert default == ()
    if field.kind.flag_value is not None:
        assert field.kind.flag_value is not default, "the flag would change nothing"


def test_flags_are_told_apart_and_explained() -> None:
    flags = [field.flag for field in FIELDS.values() if field.flag]
    assert len(set(flags)) == len(flags)
    assert all(field.help for field in FIELDS.values() if field.flag)
    shown = parser().format_help()
    assert all(field.option in shown for field in FIELDS.values())


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.in_saved and field.flag])
def test_what_a_saved_machine_has_is_not_asked_for(key: str, kernel: Path) -> None:
    field = FIELDS[key]
    given = [field.flag] if field.metavar is None else [field.flag, "1"]
    with pytest.raises(ConfigError, match=rf"--restore .*: the file decides {field.flag}; leave it out"):
        config_from(["--restore", str(kernel), *given])


def test_a_config_file_leaves_to_a_saved_machine_what_that_has(tmp_path: Path, kernel: Path) -> None:
    machine, saved, bare = tmp_path / "machine.toml", tmp_path / "saved.toml", tmp_path / "bare.toml"
    machine.write_text('kernel = "kernel"\nhpet = "on"\n')
    saved.write_text('restore = "kernel"\nacpi = false\n')
    bare.write_text('warm = "kernel"\nname = "x"\n')
    slow = tmp_path / "slow.toml"
    slow.write_text('restore = "kernel"\napic_bus_ns = 20\n')
    for words, said in (
        (["--config", str(machine), "--restore", str(kernel)], f"hpet; leave it out of --config {machine}"),
        (["--config", str(machine), "--from", str(kernel)], f"hpet; leave it out of --config {machine}"),
        (["--config", str(machine), "--restore", str(kernel), "--cpus", "2"], "--cpus; leave it out"),
        (["--config", str(saved)], f"acpi; leave it out of --config {saved}"),
        (["--config", str(bare), "--kernel", str(kernel)], "--kernel; leave it out"),
        (["--config", str(slow)], f"apic_bus_ns; leave it out of --config {slow}"),
    ):
        with pytest.raises(ConfigError) as caught:
            config_from(words)
        assert str(caught.value).endswith(f" {kernel}: the file decides {said}")
    with pytest.raises(ConfigError, match=f"^config key restore: {kernel}: the file decides acpi; leave it"):
        MachineConfig.from_toml(saved)
    machine.write_text('kernel = "kernel"\nname = "x"\n')
    wanted = MachineConfig(kernel, restore=kernel, name="x", control="auto")
    assert config_from(["--config", str(machine), "--restore", str(kernel)])[0] == wanted
    assert config_from(["--config", str(bare)])[0] == wanted._replace(restore=None, warm=kernel)
    assert MachineConfig.from_toml(bare) == MachineConfig(kernel, warm=kernel, name="x")


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.boot_only])
def test_what_only_a_boot_can_use_is_refused_by_name(key: str, kernel: Path) -> None:
    values = {"initrd": kernel, "cloud_init": kernel.parent, "files": (("/x", kernel),)}
    config = MachineConfig(kernel, restore=kernel)._replace(**{key: values.get(key, ("x",))})
    with pytest.raises(ConfigError, match=f"only a boot can use: {FIELDS[key].flag or '-- command'}$"):
        config.validate()


def test_a_file_and_the_command_line_make_the_same(tmp_path: Path, kernel: Path) -> None:
    toml = tmp_path / "vm.toml"
    toml.write_text(
        'kernel = "kernel"\ncpus = 2\nmemory = "64M"\ntimeout = 3\nacpi = false\n'
        'devices = ["hyperv-testdev"]\ncontrol = "auto"\n[files]\n"/x" = "kernel"\n'
    )
    words = ["--kernel", str(kernel), "--cpus", "2", "--memory", "64M", "--timeout", "3", "--no-acpi"]
    words += ["--device", "hyperv-testdev", "--file", f"/x={kernel}"]
    assert config_from(words)[0] == MachineConfig.from_toml(toml)


@pytest.mark.parametrize("path", ["x" * 5000, "kernel/x"])
def test_odd_paths_are_one_line(path: str, kernel: Path) -> None:
    remedy = "check the path|name the kernel's lib/modules/VERSION"
    for name in ("--kernel", "--initrd", "--modules-dir"):
        words = {"--kernel": str(kernel), name: str(kernel.parent / path)}
        with pytest.raises(ConfigError, match=rf"^{name} .*; ({remedy})$"):
            config_from([word for pair in words.items() for word in pair])


def test_checks_name_the_flag(kernel: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--cpus 0: "):
        check_values(MachineConfig(kernel, cpus=0))
