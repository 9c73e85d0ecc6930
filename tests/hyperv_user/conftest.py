"""Fixtures for the SynIC in user space without KVM."""

from __future__ import annotations

import sys
from pathlib import Path

# The stand-in for a host is a module for tests, not part of the package.
sys.path.insert(0, str(Path(__file__).parent))
