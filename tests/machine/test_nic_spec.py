"""What `--net` takes, and the one line for what it does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hvkvm.errors import ConfigError, StateError
from hvkvm.machine.config import MachineConfig
from hvkvm.machine.config_fields import check_values
from hvkvm.machine.config_words import parse_words
from hvkvm.machine.nic_spec import NicSpec, forwards_of
from hvkvm.machine.nics import NicsState, SavedNic, specs_to_restore


def read(text):
    spec = parse_words(NicSpec, "--net", text)
    check_values(spec, "--net")
    spec.check("--net")
    return spec


@pytest.mark.parametrize(
    "text",
    [
        "user",
        "user,forward=2222-22,forward=udp:[::1]:53-53,mac=02:00:00:00:00:01,mtu=9000,queues=2",
        "create,name=tap7,bridge=br0,ip=192.0.2.1/24,ip=2001:db8::1/64,netns=blue",
        "tap=tap0,pcap=/tmp/a,,b.pcapng",
        "fd=7",
        "socket=/run/wire,loss=0.01,corrupt=0.5,duplicate=1.0,reorder=0.25,seed=9",
        "listen=/run/wire,delay=0.02s,jitter=0.0005s,flap=2s",
    ],
)
def test_words_become_a_spec_and_the_spec_the_same_words(text):
    spec = read(text)
    assert spec.text == text
    assert read(spec.text) == spec


def test_shares_and_times_have_units():
    spec = read("user,loss=1%,delay=20ms,jitter=300us,flap=2s")
    assert (spec.loss, spec.delay, spec.jitter, spec.flap) == (0.01, 0.02, 0.0003, 2.0)


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("2222-22", ("tcp", "127.0.0.1", 2222, 22)),
        (":2222-22", ("tcp", "", 2222, 22)),
        ("0.0.0.0:80-10.0.2.15:8080", ("tcp", "0.0.0.0", 80, 8080)),
        ("tcp:192.0.2.7:80-:8080", ("tcp", "192.0.2.7", 80, 8080)),
        ("udp:[::1]:53-53", ("udp", "::1", 53, 53)),
    ],
)
def test_a_forward_is_read(text, read_as):
    assert forwards_of(read(f"user,forward={text}")) == [read_as]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "wifi",
        "mac=02:00:00:00:00:01",
        "user,tap=tap0",
        "tap=tap0,fd=3",
        "tap=tap0,bridge=br0",
        "create,forward=22-22",
        "user,forward=22",
        "user,forward=0-22",
        "user,forward=70000-22",
        "user,forward=nowhere:22-22",
        "user,mac=02:00",
        "user,mac=01:00:00:00:00:01",
        "user,mtu=20",
        "user,mtu=70000",
        "user,queues=0",
        "user,loss=2",
        "user,loss=often",
        "user,delay=5",
        "user,ip=192.0.2.1/24",
        "create,ip=192.0.2.1",
        "create,ip=here/24",
    ],
)
def test_what_cannot_be_is_one_line_with_a_remedy(text):
    with pytest.raises(ConfigError, match=r"^--net[^\n]*; [^\n]+$"):
        read(text)


def test_it_needs_the_bus():
    with pytest.raises(ConfigError, match="--net user: needs the VMBus host that carries it; add --vmbus on"):
        MachineConfig(kernel=Path(__file__), nets=(NicSpec("user"),)).validate()


def test_toml_says_the_same(tmp_path):
    (tmp_path / "kernel").write_text("")
    file = tmp_path / "vm.toml"
    file.write_text(
        'kernel = "kernel"\nvmbus = "on"\nnets = ["user,mtu=9000", {socket = "wire", loss = 0.5}]\n'
    )
    config = MachineConfig.from_toml(file)
    assert config.nets == (NicSpec("user", mtu=9000), NicSpec(socket=tmp_path / "wire", loss=0.5))


@pytest.mark.parametrize(
    "names", [("net1", "net1"), ("net64",), ("net01",), ("net-1",), ("scsi0",), ("",), ("a\nb",)]
)
def test_names_that_no_saved_nics_had_are_refused(names):
    state = NicsState(tuple(SavedNic(name, "02:00:00:00:00:01", 1, "socket=/wire") for name in names))
    saved = SimpleNamespace(path="saved", parts={"network": {}}, state=lambda _kind, _part: state)
    with pytest.raises(StateError, match=r"^saved: '.*': no name of a NIC, or one of two$"):
        specs_to_restore(saved, ())
