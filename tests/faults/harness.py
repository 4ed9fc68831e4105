"""Runs seeds of the areas side by side and counts faults by kind."""

from __future__ import annotations

import math
import os
import platform
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.faults.scenarios import AREAS
from tests.faults.world import World


@dataclass
class Summary:
    """What was run."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By area and kind of fault."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Each with area, seed, what was broken, and the command that repeats it."""
    wall_seconds: float = 0.0

    @property
    def num_faults(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.counts.values())

    def as_json(self) -> dict[str, Any]:
        machine = (
            f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
        )
        return {
            "machine": machine,
            "num_faults": self.num_faults,
            "num_failures": len(self.failures),
            "wall_seconds": round(self.wall_seconds),
            "counts": {area: dict(sorted(kinds.items())) for area, kinds in self.counts.items()},
            "failures": self.failures,
        }


def reproduction(area: str, seed: int) -> str:
    return f"python -m tests.faults --area '{area}' --seed {seed}"


def run_seeds(
    world: World,
    wanted: Iterable[tuple[str, int]],
    *,
    jobs: int = 2,
    say: Callable[[str], None] = lambda line: None,
    minutes: float = math.inf,
) -> Summary:
    """Every (area, seed), ``jobs`` of them at a time. Broken invariants are collected, with the folder kept. After
    ``minutes`` no further seed begins."""
    summary = Summary()
    started = time.monotonic()

    def run(one: tuple[str, int]) -> None:
        if time.monotonic() > started + 60 * minutes:
            return
        area, seed = one
        folder = world.folder / f"{area} {seed}".replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            kind = AREAS[area][0](world, random.Random(f"{area} {seed}"), folder)
        except Exception as error:
            text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            summary.failures.append({"area": area, "seed": seed, "text": text, "command": reproduction(area, seed)})
            say(f"FAILED {area} {seed}: {text}\n  repeat: {reproduction(area, seed)}\n  files: {folder}")
            return
        summary.counts.setdefault(area, Counter())[kind] += 1
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{area} {seed}: {kind}")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run, wanted):
            pass
    summary.wall_seconds = time.monotonic() - started
    return summary
