"""Whether this process was asked to leave (``run/interruption.py``), for waits that would delay it.

A run that gets SIGTERM finishes its step. A step that waits for a server that does not answer may take as long as the
retries do; such a wait is given up instead: ``raise_if_asked`` raises ``StepAbandoned``, the state before the step is
saved, and a resumed run does the step again.
"""

from __future__ import annotations

import asyncio
import time

from megatron_ktr.errors import StepAbandoned

_SLICE_SECONDS = 0.2
# A plain value: a signal handler sets it, which may interrupt the main thread anywhere, also while it holds a lock.
_asked_by: list[str] = []


def ask_to_leave(name: str) -> None:
    """Called by a signal handler, with the name of the signal."""
    if not _asked_by:
        _asked_by.append(name)


def forget() -> None:
    """The request is over: the run that was asked has ended."""
    _asked_by.clear()


def raise_if_asked(waiting_for: str) -> None:
    """Raises ``StepAbandoned`` if this process was asked to leave."""
    if _asked_by:
        raise StepAbandoned(f"{_asked_by[0]} while waiting: {waiting_for}", asked_by=_asked_by[0])


async def pause(seconds: float, *, waiting_for: str) -> None:
    """Sleeps, unless this process is or was asked to leave.

    Raises:
        StepAbandoned: it was.
    """
    deadline = time.monotonic() + seconds
    while True:
        raise_if_asked(waiting_for)
        left = deadline - time.monotonic()
        if left <= 0:
            return
        await asyncio.sleep(min(left, _SLICE_SECONDS))
