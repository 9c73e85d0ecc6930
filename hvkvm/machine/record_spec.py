"""`--record FILE,...`: what is recorded of a machine's bus, and where to.

No `from __future__ import annotations`: see `config_fields`.
"""

from pathlib import Path
from typing import Annotated, get_args

from hvkvm.machine.config_fields import Field
from hvkvm.machine.config_kinds import Choice, PathName
from hvkvm.record.recorder import Depth
from hvkvm.tuples import NamedTuple


class RecordSpec(NamedTuple):
    """A recording."""

    file: Annotated[Path, Field(PathName(), help="the pcapng file to write, or a pipe that is read")]
    depth: Annotated[
        Depth,
        Field(
            Choice(get_args(Depth)),
            "|".join(get_args(Depth)),
            "messages and channels alone, the beginnings of packets too, or all of them (packets)",
        ),
    ] = "packets"
