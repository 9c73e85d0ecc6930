"""What a warm guest is handed when a copy of it begins: a page that says what, and an archive behind it.

Why: a guest that waits for a command was saved before anybody knew which one. Its
host shows it this memory at `board.ORDERS_ADDRESS`, which is neither RAM nor told to
the kernel, and `boot.guest_orders` reads it there. Layout only; anyone may import it.

    0     magic, u64
    8     bytes of the archive (a cpio of the newc kind), u64; 0 while there is nothing to run
    16    the host's time when the guest asked for it: seconds and nanoseconds, u64 each
    32    struct rand_pool_info: bits and bytes of what follows, u32 each, then SEED_SIZE random bytes
    4096  the archive
"""

from __future__ import annotations

import struct

MAGIC = int.from_bytes(b"hvkvm ->", "little")
SEED_SIZE = 32
ARCHIVE_OFFSET = 4096
_HEAD = struct.Struct(f"<QQQQII{SEED_SIZE}s")


def head(archive_size: int = 0, nanoseconds: int = 0, seed: bytes = bytes(SEED_SIZE)) -> bytes:
    """The first bytes of the page. `nanoseconds` since the epoch; `seed` is SEED_SIZE random bytes."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return _HEAD.pack(MAGIC, archive_size, seconds, rest, 8 * SEED_SIZE, SEED_SIZE, seed)
