"""How tests wait: for the event itself, with a limit that only ends a hang.

What a test waits for takes seconds on an idle machine. On a busy one everything may take a hundred times as long, and
no test may fail for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 1800.0


def wait_until(condition: Callable[[], bool], *, pause_seconds: float = 0.005) -> None:
    """Returns once ``condition()`` is true; what raises in it ends the wait."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {PATIENCE_SECONDS:g} s"
        time.sleep(pause_seconds)
