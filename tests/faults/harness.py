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

from tests.faults.invariants import check_nothing_left
from tests.faults.scenarios import AREAS
from tests.faults.world import SCRATCH, World
from tests.faults.zygote import SHARED_MEMORY
from tests.support.nodes import NoNodesError
from tests.support.paths import REPOSITORY


@dataclass
class Summary:
    """What was run."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By area and kind of fault: those that happened, and after which every invariant held."""
    missed: Counter[str] = field(default_factory=Counter)
    """By area: seeds whose command ended before its moment came, so that nothing happened to it."""
    left_out: dict[str, str] = field(default_factory=dict)
    """By area, or by part of a check: why this machine cannot have it."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Each with area, seed, what was broken, and the command that repeats it."""
    jobs: int = 1
    num_wanted: int = 0
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
            "jobs": self.jobs,
            "num_wanted": self.num_wanted,
            "num_seeds": self.num_faults + self.missed.total() + len(self.failures),
            "num_faults": self.num_faults,
            "num_failures": len(self.failures),
            "num_missed": self.missed.total(),
            "wall_seconds": round(self.wall_seconds),
            "counts": {area: dict(sorted(self.counts[area].items())) for area in AREAS if area in self.counts},
            "missed": dict(self.missed),
            "left_out": self.left_out,
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
    wanted = list(wanted)
    summary = Summary(jobs=jobs, num_wanted=len(wanted))
    started = time.monotonic()

    def run(one: tuple[str, int]) -> None:
        if time.monotonic() > started + 60 * minutes:
            return
        area, seed = one
        folder = world.folder / f"{area} {seed}".replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            fault = AREAS[area][0](world, random.Random(f"{area} {seed}"), folder)
            strays = world.zygote.strays()
            assert not strays, f"I4: still running: {strays}"
            check_nothing_left(folder / SCRATCH, folder / SHARED_MEMORY)
            if (folder / SCRATCH).exists() and not (folder / SHARED_MEMORY).exists():
                summary.left_out["what stays in shared memory"] = "nobody may mount here"
        except NoNodesError as error:
            summary.left_out[area] = str(error)
            return
        except Exception as error:
            text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            # What is stored names no directory of this machine.
            kept = text.replace(f"{world.folder}/", "").replace(f"{REPOSITORY}/", "")
            summary.failures.append({"area": area, "seed": seed, "text": kept, "command": reproduction(area, seed)})
            say(f"FAILED {area} {seed}: {text}\n  repeat: {reproduction(area, seed)}\n  files: {folder}")
            return
        if fault.has_fired:
            summary.counts.setdefault(area, Counter())[fault.kind] += 1
        else:
            summary.missed[area] += 1
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{area} {seed}: {fault.kind}{'' if fault.has_fired else ', whose moment never came'}")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run, wanted):
            pass
    summary.wall_seconds = time.monotonic() - started
    return summary
