"""How long training waits for a checkpoint, and what loading costs in another layout than that of saving.

    python benchmarks/checkpoint/stall.py [--repeats 3] [--json] [--out FILE]

Saving: asynchronous (``save``, and the files are written and read again beside the training) against synchronous
(``save`` and ``close``: the caller waits for everything), of one rank, relative to a step. The step here is a forward
pass of one group without gradient and an optimizer step; a real step has a backward pass and rollouts beside it, so the
ratio to it is smaller. Memory: the most that lies on the host for a save, relative to the rank's weights.

Loading: a checkpoint of two data-parallel, two tensor-parallel or one rank, loaded by each of several layouts,
relative to the layout that saved it.

Every ratio is of numbers of one run. Seconds are of CPU: the main thread's for a stall, all threads' for the rest, the
rank that needs most, the least of some repeats. On a machine that others use, wall time would measure them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `python benchmarks/X/stall.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import say, write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from megatron_ktr.distributed.platform import start  # noqa: E402
from megatron_ktr.errors import run_cli  # noqa: E402
from tests.support.ranks import RankPool  # noqa: E402
from tests.support.save_peaks import measure_loads, measure_peaks, measure_waits  # noqa: E402
from tests.support.tiny import save_tiny_hf  # noqa: E402

MODEL = dict(num_layers=8, hidden_size=512, ffn_size=1536, vocab_size=16411, vision_depth=2)
"""Smaller ones would measure how long planning takes."""
TENSOR, PIPELINE = dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1 rank": (1, {}),
    "2 replicas": (2, {}),
    "tensor 2": (2, TENSOR),
    "pipeline 2": (2, PIPELINE),
}
LOADS = {"2 replicas": ("1 rank",), "1 rank": ("2 replicas",), "tensor 2": ("pipeline 2",)}
"""By the layout that saves: the others that load; itself is what they are compared with."""


def least_of_slowest(ranks: list[dict[str, list[float]]], name: str) -> float:
    return min(max(values) for values in zip(*(rank[name] for rank in ranks), strict=True))


def measure_saving(pool: RankPool, folder: Path, *, repeats: int) -> dict[str, float]:
    common = dict(world_size=1, hf_dir=folder / "model", values={})
    waits = pool(measure_waits, run_dir=folder / "waits", repeats=repeats, **common)
    (peaks,) = pool(measure_peaks, run_dir=folder / "peaks", **common)
    seconds = {name: least_of_slowest(waits, name) for name in ("step", "asynchronous", "synchronous")}
    weights = peaks["parameters"] * 2  # bf16
    found = {f"{name}_cpu_seconds": value for name, value in seconds.items()}
    found |= {f"{name}_per_step": seconds[name] / seconds["step"] for name in ("asynchronous", "synchronous")}
    found["asynchronous_per_synchronous"] = seconds["asynchronous"] / seconds["synchronous"]
    found["peak_host_per_weights"] = peaks["save"]["host"] / weights
    say(f"saving: {found}")
    return found


def measure_loading(pool: RankPool, folder: Path, *, repeats: int) -> list[dict[str, Any]]:
    found = []
    for saved_by, others in LOADS.items():
        run_dir = folder / saved_by.replace(" ", "_")

        def seconds(layout: str, run_dir: Path = run_dir) -> float:
            size, values = LAYOUTS[layout]
            loaded = pool(
                measure_loads,
                world_size=size,
                hf_dir=folder / "model",
                run_dir=run_dir,
                values=values,
                repeats=repeats,
            )
            return least_of_slowest(loaded, "load")

        own = seconds(saved_by)  # the first call saves
        for other in others:
            one = seconds(other)
            found.append({"saved_by": saved_by, "loaded_by": other, "cpu_seconds": one, "per_same_layout": one / own})
            say(f"loading: {found[-1]}")
    return found


def table(report: dict[str, Any]) -> str:
    lines = [f"{name:<34} {value:>9.3f}" for name, value in report["saving"].items()]
    for one in report["loading"]:
        lines.append(f"{one['saved_by'] + ' -> ' + one['loaded_by']:<34} {one['per_same_layout']:>9.3f} of the same")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of what seconds are taken of; the least counts")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    pool = RankPool(2)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_tiny_hf(folder / "model", **MODEL)
            saving = measure_saving(pool, folder, repeats=arguments.repeats)
            loading = measure_loading(pool, folder, repeats=arguments.repeats)
    finally:
        pool.close()
    report: dict[str, Any] = {
        "machine": {
            **about_machine(start("cpu")),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "clock": "CPU seconds, because the machine was shared",
            "time": time.strftime("%Y-%m-%d"),
        },
        "settings": {"model": MODEL, "params_dtype": "bf16", "repeats": arguments.repeats},
        "saving": saving,
        "loading": loading,
    }
    draw: Callable[..., str] = str
    text = write_report(report, out=arguments.out, figure=None, draw=draw)
    print(text if arguments.json else table(report))


if __name__ == "__main__":
    run_cli(main)
