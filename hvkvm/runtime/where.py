"""Where threads of this process are in Python's code: what a dump says of one that stands still.

Any thread may ask of any other; what it hears is true of the moment of asking.
"""

from __future__ import annotations

import sys
import threading

FRAMES = 3


def where(thread: threading.Thread) -> str:
    """The innermost calls of `thread` outside Python's own library; "" for one that does not run.

    Like "commit (state/file.py:126) of _write (machine/saving.py:258)".
    """
    frame = sys._current_frames().get(thread.ident or 0)
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        code, module = frame.f_code, str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in sys.stdlib_module_names:
            found.append(f"{code.co_name} ({'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno})")
        frame = frame.f_back
    return " of ".join(found)
