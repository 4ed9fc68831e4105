"""The fault harness by hand and at night.

python -m tests.faults                                  the seeds of CI
python -m tests.faults --seeds 5000 --json out.json     that many, spread over the areas as in CI
python -m tests.faults --area "checkpoint writing" --seed 17      one of them again
python -m tests.faults --store                          the seeds of CI; keeps summary and table in the repository
python -m tests.faults --markdown                       that table, from the stored summary
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.harness import run_seeds
from tests.faults.scenarios import AREAS
from tests.faults.world import World
from tests.support.paths import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results" / "faults_cpu.json"
DOCUMENT = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- faults:begin -->\n", "<!-- faults:end -->"
"""The table stands between these lines of the document."""


def wanted_seeds(number: int | None) -> list[tuple[str, int]]:
    """(area, seed) in turn: ``number`` of them in all, or the quota of CI."""
    total = sum(quota for _, quota in AREAS.values())
    factor = 1.0 if number is None else number / total
    # Those of every area are spread evenly, so that a night that is cut short has something of each.
    found = [
        (seed / (quota * factor), name, seed)
        for name, (_, quota) in AREAS.items()
        for seed in range(max(1, round(quota * factor)))
    ]
    return [(name, seed) for _, name, seed in sorted(found)]


def table(results: Mapping[str, Any]) -> str:
    """Faults by area and kind, as Markdown."""
    lines = ["| area | kind of fault | faults |", "|---|---|---:|"]
    for area, kinds in results["counts"].items():
        lines += [f"| {area} | {kind} | {number} |" for kind, number in kinds.items()]
    lines.append(f"| all | | {results['num_faults']} |")
    lines += ["", " ".join(_sentences(results))]
    return "\n".join(lines) + "\n"


def _sentences(results: Mapping[str, Any]) -> list[str]:
    failed, missed = results["num_failures"], results["num_missed"]
    said = [f"Seeds after which a check failed: {failed}."]
    if failed:
        said.append(f"`benchmarks/results/{RESULTS.name}` has what was broken, and the commands that repeat them.")
    said.append(f"Seeds whose command ended before the moment of its fault: {missed}; they are not in the table.")
    said += [f"Left out on this machine: {area} ({why})." for area, why in results["left_out"].items()]
    seeds = f"{results['num_seeds']} of {results['num_wanted']} seeds"
    said.append(f"{seeds} were run in {results['wall_seconds']} s, {results['jobs']} at a time.")
    return [*said, f"Machine: {results['machine']}."]


def store(results: Mapping[str, Any]) -> None:
    """Keeps the summary, and writes its table into the documentation."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    head, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin and end, f"{DOCUMENT} has no place for the table"
    DOCUMENT.write_text(head + begin + table(results) + end + tail, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", choices=AREAS, action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, help="only this one; needs one --area")
    parser.add_argument("--seeds", type=int, help="in all, instead of CI's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after these no further seed begins")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (2)")
    parser.add_argument("--json", type=Path, help="where the summary is written")
    parser.add_argument(
        "--store", action="store_true", help="keep summary and table in the repository; CI's seeds only"
    )
    parser.add_argument("--folder", type=Path, help="for scratch files; those of failures stay")
    parser.add_argument("--markdown", action="store_true", help="print the table of the stored results")
    options = parser.parse_args()
    if options.markdown:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))), end="")
        return 0
    if options.seed is not None and len(options.area or ()) != 1:
        parser.error("--seed needs one --area")
    if options.store and (options.area or options.seeds is not None):
        parser.error("--store is for the seeds of CI")
    wanted = wanted_seeds(options.seeds)
    if options.area:
        wanted = [one for one in wanted if one[0] in options.area]
    if options.seed is not None:
        wanted = [(options.area[0], options.seed)]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder)
    try:
        summary = run_seeds(world, wanted, jobs=options.jobs, say=partial(print, flush=True), minutes=options.minutes)
    finally:
        world.close()
    if options.json:
        options.json.write_text(json.dumps(summary.as_json(), indent=1) + "\n", encoding="utf-8")
    if options.store:
        store(summary.as_json())
    print(f"{summary.num_faults} faults, {summary.missed.total()} that never came, {len(summary.failures)} failures")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
