"""SHA-1 and SHA-256 for keys and for names that are the same in each run, without OpenSSL.

Why: hashlib loads OpenSSL, which costs each start ten times what is needed of it. Python has both as modules
of their own, of which one changed its name, and may have been built without. Pure; any thread.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = ["sha1", "sha256"]

if TYPE_CHECKING:
    from hashlib import sha1, sha256
else:
    try:
        from _sha1 import sha1

        if sys.version_info >= (3, 12):
            from _sha2 import sha256
        else:
            from _sha256 import sha256
    except ImportError:
        from hashlib import sha1, sha256
