"""Fixtures for SCSI units."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scsi_asker import Scsi


@pytest.fixture
def ask() -> Iterator[Scsi]:
    scsi = Scsi()
    yield scsi
    scsi.close()
