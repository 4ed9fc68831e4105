"""What a process and its children hold of a machine, and whether that grows over the steps of a run."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

SETTLED = 20
"""The step after which nothing may grow: caches are full and every path has run."""
WINDOW = 20
"""Over so many steps a median is taken, because single steps have longer or shorter responses than others."""
MOST_GROWTH = 0.02
"""Of each quantity, from the first window to the last. Of 100 open files it allows one: connections come and go."""


@dataclass(frozen=True)
class Holding:
    """What all processes of a run hold together, after one step."""

    step: int
    rss_bytes: int
    """Resident memory; pages that processes share count in each."""
    own_bytes: int
    """Memory that is no file's: anonymous pages and shared memory, a page that n processes share counted 1/n in each.
    What other programs of the machine do to the cache of files does not move it."""
    num_files: int
    num_threads: int
    num_processes: int


def holding_of(process: psutil.Process, *, step: int) -> Holding | None:
    """What ``process`` and all its descendants hold; None if it has ended. A child that ends meanwhile is left out."""
    rss = own = files = threads = processes = 0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                sizes = _sizes(one.pid)
                num_files, num_threads = one.num_fds(), one.num_threads()
                rss += sizes["Rss"]
                own += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
                files, threads, processes = files + num_files, threads + num_threads, processes + 1
    return Holding(step, rss, own, files, threads, processes) if processes else None


def _sizes(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}


def growth_of(holdings: Sequence[Holding]) -> dict[str, Any]:
    """How much each quantity grew from the first window after ``SETTLED`` steps to the last window.

    It is the median of the last window over that of the first, minus 1. ``is_steady`` says that each is less than
    ``MOST_GROWTH``.

    Raises:
        ValueError: there are too few steps for two windows.
    """
    first = [one for one in holdings if SETTLED < one.step <= SETTLED + WINDOW]
    last = [one for one in holdings if one.step > holdings[-1].step - WINDOW]
    if not first or holdings[-1].step - WINDOW < SETTLED + WINDOW:
        raise ValueError(f"expected more than {SETTLED + 2 * WINDOW} steps, got {holdings[-1].step if holdings else 0}")
    found: dict[str, Any] = {}
    for name in ("rss_bytes", "own_bytes", "num_files", "num_threads", "num_processes"):
        before, after = (statistics.median(getattr(one, name) for one in part) for part in (first, last))
        found[name] = {"first": before, "last": after, "growth": after / before - 1}
    found["is_steady"] = all(value["growth"] < MOST_GROWTH for value in found.values())
    return found


def thinned(holdings: Sequence[Holding], *, every: int) -> list[dict[str, int]]:
    """Every so many steps one, for the file of results."""
    return [asdict(one) for one in holdings if one.step % every == 0]
