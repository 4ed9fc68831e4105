"""Counts the processor cores that this process may use."""

from __future__ import annotations

import os


def num_cores() -> int:
    """The cores that this process may run on. Systems without such limits (macOS) say how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
