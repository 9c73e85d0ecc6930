"""The file of a saved machine, tampered with: another manifest, with checksums that are right. Any thread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvkvm.state import file as state_file


def rewrite(file: Path, change: Any) -> None:
    """Change the manifest, with every checksum right again."""
    raw = bytearray(file.read_bytes())
    fields = list(state_file._header.unpack_from(raw))
    tree = json.loads(raw[fields[4] : fields[4] + fields[5]])
    change(tree)
    text = json.dumps(tree).encode()
    fields[5:8] = len(text), fields[4] + len(text), state_file.checksum(text)
    head = state_file._header.pack(*fields)
    with open(file, "r+b") as out:
        out.write(head + state_file.checksum(head))
        out.seek(fields[4])
        out.write(text)
        out.truncate()
