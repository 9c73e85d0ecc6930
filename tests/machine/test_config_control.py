"""The configuration's control socket and name: what is refused, and that the command has it on by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvkvm.cli.run import config_from
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_checks import MAX_NAME


@pytest.mark.parametrize(
    "name",
    ["a/b", ".", "..", ".a", "-a", "a b", "ä", "a\n", "\0", "a" * (MAX_NAME + 1), "_", "a:b", "\u0661"],
)
def test_names_that_make_no_file_are_refused(kernel: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--name .* not a name; use up to|--name: cannot hold NUL"):
        MachineConfig(kernel=kernel, name=name).validate()


@pytest.mark.parametrize("name", ["", "a", "7", "a.b-c_d", "A" * MAX_NAME])
def test_names(kernel: Path, name: str) -> None:
    assert MachineConfig(kernel=kernel, name=name).validate().name == name


@pytest.mark.parametrize("control", ["", "a\0b"])
def test_control_paths_that_cannot_be(kernel: Path, control: str) -> None:
    with pytest.raises(ConfigError, match=r"^--control"):
        MachineConfig(kernel=kernel, control=control).validate()


def test_the_library_has_none_and_the_command_has_one(kernel: Path, tmp_path: Path) -> None:
    assert MachineConfig(kernel=kernel).control == "off"
    assert config_from(["--kernel", str(kernel)])[0].control == "auto"
    given = config_from(["--kernel", str(kernel), "--control", "off", "--name", "x"])[0]
    assert (given.control, given.name) == ("off", "x")
    toml = tmp_path / "vm.toml"
    toml.write_text('kernel = "kernel"\n')
    assert config_from(["--config", str(toml)])[0].control == "auto"
    toml.write_text('kernel = "kernel"\ncontrol = "off"\nname = "y"\n')
    assert config_from(["--config", str(toml)])[0].control == "off"
    assert config_from(["--config", str(toml), "--control", "/tmp/x"])[0].control == "/tmp/x"
    assert MachineConfig.from_toml(toml).name == "y"


def test_in_a_file_its_path_starts_at_that_file(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As every other path there does, `kvm_path` too; on the command line it is as it was typed."""
    monkeypatch.chdir("/")
    folder = kernel.parent
    toml = folder / "m.toml"
    toml.write_text(f'kernel = "{kernel.name}"\ncontrol = "vm.sock"\nkvm_path = "kvm"\n')
    config = config_from(["--config", str(toml)])[0]
    assert (config.control, config.kvm_path) == (str(folder / "vm.sock"), str(folder / "kvm"))
    typed = config_from(["--config", str(toml), "--control", "vm.sock", "--kvm", "kvm"])[0]
    assert (typed.control, typed.kvm_path) == ("vm.sock", "kvm")
    for word in ("auto", "off"):
        toml.write_text(f'kernel = "{kernel.name}"\ncontrol = "{word}"\n')
        assert MachineConfig.from_toml(toml).control == word
    toml.write_text(f'kernel = "{kernel.name}"\ncontrol = ""\n')
    with pytest.raises(ConfigError, match="--control: empty"):
        MachineConfig.from_toml(toml)
