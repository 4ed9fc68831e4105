"""What processes of ``data/prepare/task_pool.py`` do in tests. A module of its own, so that they import little."""

from __future__ import annotations

import os
import signal
import time


def behave(how: str) -> str:
    if how == "hang":
        time.sleep(3600)
    elif how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "explode":
        return str(len(bytearray(8 << 30)))
    elif how == "raise":
        raise KeyError("no such thing")
    return f"did {how}"
