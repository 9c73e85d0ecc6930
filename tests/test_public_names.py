"""The names of `import hvkvm`, which are resolved when they are used."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import hvkvm

assert set(hvkvm.__all__) <= set(dir(hvkvm)), dir(hvkvm)
assert not [name for name in sys.modules if name.startswith("hvkvm.")]
for name in hvkvm.__all__:
    getattr(hvkvm, name)
"""


def test_all_names_are_listed_before_any_is_loaded() -> None:
    # A process of its own: in this one they may be loaded already.
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
