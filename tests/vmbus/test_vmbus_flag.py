"""`--vmbus`: what it takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hvkvm.cli.run import config_from
from hvkvm.errors import ConfigError
from hvkvm.machine.config import MachineConfig


def test_the_bus_is_off_unless_asked_for() -> None:
    kernel = Path(sys.executable)
    assert MachineConfig(kernel=kernel).validate().vmbus == "off"
    config, _options = config_from(["--kernel", str(kernel), "--vmbus", "on"])
    assert config.vmbus == "on"


def test_another_word_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="--vmbus maybe: unknown; choose on, off"):
        config_from(["--kernel", sys.executable, "--vmbus", "maybe"])
