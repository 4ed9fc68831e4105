"""What one save of a training checkpoint costs: memory on host and device, and for how long the training waits.

    python benchmarks/checkpoint/run.py [--replicas 1,2,4] [--json] [--out FILE] [--before FILE]

A random model in bf16 under the distributed optimizer, tensor and pipeline size 1, on CPU; every replica is one rank.
Memory is bytes a parameter of the rank's model, of the rank that needs most: the peak of what ``Checkpoints.save``
allocates beside what training holds, until its files are written, and likewise of loading. Host and device are told
apart by the emulated border of the tests (``tests/support/device_border.py``), which knows where each tensor would lie
on a GPU machine. Seconds are those of the slowest rank, without the border, the least of some repeats: all ranks share
this machine's cores and disk, so they say little beside those of another commit on the same machine. ``--before``
takes such a file, and the table then ends in ratios to it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import say, write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from megatron_ktr.distributed.platform import start  # noqa: E402
from megatron_ktr.errors import run_cli  # noqa: E402
from tests.support.ranks import RankPool  # noqa: E402
from tests.support.save_peaks import measure_peaks, measure_stall  # noqa: E402
from tests.support.tiny import save_tiny_hf  # noqa: E402

MODEL = dict(num_layers=4, hidden_size=256, ffn_size=768, vocab_size=8209, vision_depth=2)
LARGER = dict(num_layers=8, hidden_size=512, ffn_size=1536, vocab_size=16411, vision_depth=2)
"""For seconds: with the smaller one they are those of planning."""


def measure(pool: RankPool, replicas: int, *, folder: Path, repeats: int) -> dict[str, Any]:
    common = dict(world_size=replicas, values={})
    peaks = pool(measure_peaks, hf_dir=folder / "small", run_dir=folder / f"peaks{replicas}", **common)
    parameters = peaks[0]["parameters"]
    per_parameter = {
        f"{what}_{side}_bytes_per_parameter": round(max(rank[what][side] for rank in peaks) / parameters, 3)
        for what in ("save", "load")
        for side in ("host", "device")
    }
    stalls = pool(
        measure_stall, hf_dir=folder / "large", run_dir=folder / f"stall{replicas}", repeats=repeats, **common
    )
    seconds = {
        name: min(max(values) for values in zip(*(rank[name] for rank in stalls), strict=True))
        for name in ("stall_seconds", "complete_seconds")
    }
    say(f"{replicas} replicas: {per_parameter} {seconds}")
    return {"replicas": replicas, **per_parameter, **seconds}


def ratios(results: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each number to the one before, by number of replicas; none where that was zero."""
    known = {entry["replicas"]: entry for entry in before}
    return [
        {"replicas": entry["replicas"]}
        | {
            name: value / known[entry["replicas"]][name]
            for name, value in entry.items()
            if name != "replicas" and known[entry["replicas"]][name]
        }
        for entry in results
        if entry["replicas"] in known
    ]


def table(report: dict[str, Any]) -> str:
    names = [name for name in report["results"][0] if name != "replicas"]
    lines = []
    for title, entries in (("", report["results"]), (" to before", report.get("ratios", []))):
        for name in names if entries else ():
            numbers = " ".join(f"{entry.get(name, float('nan')):>8.3f}" for entry in entries)
            lines.append(f"{name + title:<44} {numbers}")
    replicas = " ".join(f"{entry['replicas']:>8}" for entry in report["results"])
    return "\n".join([f"{'replicas':<44} {replicas}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="1,2,4", help="of the model, one rank each; with commas")
    parser.add_argument("--repeats", type=int, default=5, help="saves whose seconds are taken, least of")
    parser.add_argument("--before", type=Path, help="a file of another commit to compare with")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.replicas.split(",")]
    pool = RankPool(max(counts))
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_tiny_hf(folder / "small", **MODEL)
            save_tiny_hf(folder / "large", **LARGER)
            results = [measure(pool, count, folder=folder, repeats=arguments.repeats) for count in counts]
    finally:
        pool.close()
    report: dict[str, Any] = {
        "machine": {**about_machine(start("cpu")), "cores": os.cpu_count()},
        "settings": {"model": MODEL, "model_of_seconds": LARGER, "params_dtype": "bf16", "repeats": arguments.repeats},
        "results": results,
    }
    if arguments.before:
        report["ratios"] = ratios(results, json.loads(arguments.before.read_text())["results"])
    text = write_report(report, out=arguments.out, figure=None, draw=str)
    print(text if arguments.json else table(report))


if __name__ == "__main__":
    run_cli(main)
