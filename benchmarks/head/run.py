"""Time and peak memory of key-token log-probs, forward and backward, against what else a user could pick.

    python benchmarks/head/run.py                    the table
    python benchmarks/head/run.py --json             the same as JSON on stdout
    python benchmarks/head/run.py --out F.json --figure F.svg

One point is rows x hidden x vocabulary x tensor-parallel size x share of key rows (rows with a gradient, at random).
A tensor-parallel size stands for one rank's shard, measured alone.

Time: all methods and shares of a point take turns in one process, ``--repeats`` times after a warm-up; medians. Memory:
each method in a process of its own; the allocator's peak on a GPU, the peak of resident memory on CPU, minus what the
inputs and the process held before. ``extra_bytes`` is all of that, gradients included; ``working_bytes`` is without the
two gradients, the results everybody has to hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from benchmarks.harness import extra_peak_bytes, in_fresh_process, say, write_report  # noqa: E402
from benchmarks.head.figure import draw  # noqa: E402
from benchmarks.head.methods import METHODS, why_not  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from megatron_ktr.distributed.groups import ParallelSizes, init_parallel  # noqa: E402
from megatron_ktr.distributed.platform import Platform, start  # noqa: E402
from megatron_ktr.errors import run_cli  # noqa: E402

SUMMARY_POINT = (4096, 512, 152_064, 1)
"""Rows, hidden size, vocabulary and tensor-parallel size of the summary on CPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Point:
    rows: int
    hidden: int
    vocabulary: int
    tensor_parallel: int
    dtype: str

    @property
    def shard(self) -> int:
        return -(-self.vocabulary // self.tensor_parallel)


def measure_time(point: Point, methods: list[str], shares: list[float], *, repeats: int, platform: Platform) -> list:
    """Median seconds of every method and share, in turns."""
    inputs = _inputs(point, platform)
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in itertools.product(methods, shares)}
    for name in methods:  # maps memory and tunes kernels
        _forward_and_backward(name, shares[-1], *inputs)
    for _ in range(repeats):
        for name, share in seconds:
            platform.synchronize()
            begin = time.perf_counter()
            _forward_and_backward(name, share, *inputs)
            platform.synchronize()
            seconds[name, share].append(time.perf_counter() - begin)
    return [
        {"method": name, "share": share, "seconds": statistics.median(values), "all_seconds": values}
        for (name, share), values in seconds.items()
    ]


def measure_memory(point: Point, method: str, share: float, *, platform: Platform) -> dict[str, Any]:
    """Peak bytes of one forward and backward pass beside what was there before. For a fresh process."""
    small = dataclasses.replace(point, rows=8, vocabulary=256, tensor_parallel=1)
    _forward_and_backward(method, share, *_inputs(small, platform))  # libraries allocate their own on first use
    inputs = _inputs(point, platform)
    extra = extra_peak_bytes(lambda: _forward_and_backward(method, share, *inputs), platform=platform)
    gradients = sum(tensor.nbytes for tensor in inputs[:2])
    return {"extra_bytes": extra, "working_bytes": extra - gradients}


def _inputs(point: Point, platform: Platform) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype, device = DTYPES[point.dtype], platform.device
    hidden_RD = torch.randn(point.rows, point.hidden, generator=generator).to(device, dtype).requires_grad_()
    weight_VD = torch.randn(point.shard, point.hidden, generator=generator).mul_(point.hidden**-0.5)
    target_R = torch.randint(0, point.shard, (point.rows,), generator=generator).to(device)
    return hidden_RD, weight_VD.to(device, dtype).requires_grad_(), target_R


def _forward_and_backward(name: str, share: float, hidden_RD, weight_VD, target_R) -> None:
    generator = torch.Generator().manual_seed(1)
    is_key_R = torch.zeros(len(target_R))
    is_key_R[torch.randperm(len(target_R), generator=generator)[: round(share * len(target_R))]] = 1.0
    hidden_RD.grad = weight_VD.grad = None
    logprob_R, entropy_R = METHODS[name].run(hidden_RD, weight_VD, target_R)
    (logprob_R * is_key_R.to(logprob_R)).sum().backward()
    del entropy_R


def _run_job(job: dict[str, Any], platform: Platform) -> Any:
    init_parallel(ParallelSizes(), platform=platform)  # Megatron's cross entropy asks for its group
    point = Point(**job["point"])
    if job["kind"] == "time":
        return measure_time(point, job["methods"], job["shares"], repeats=job["repeats"], platform=platform)
    return measure_memory(point, job["method"], job["share"], platform=platform)


def run_benchmark(arguments: argparse.Namespace, platform: Platform) -> dict[str, Any]:
    is_gpu = platform.name != "cpu"
    not_run = {name: reason for name in METHODS if (reason := why_not(name, is_gpu=is_gpu))}
    methods = [name for name in arguments.methods if name not in not_run]
    sizes = (arguments.rows, arguments.hidden, arguments.vocabulary, arguments.tensor_parallel)
    points = [Point(*values, dtype=arguments.dtype) for values in itertools.product(*sizes)]
    results, load_before = [], os.getloadavg()[0]
    for point in points:
        about = dataclasses.asdict(point)
        say(f"{point} ...")
        job = {"point": about, "methods": methods, "shares": arguments.share, "repeats": arguments.repeats}
        timed = in_fresh_process(__file__, {"kind": "time", **job})
        for entry in timed:
            memory = in_fresh_process(
                __file__, {"kind": "memory", "point": about, "method": entry["method"], "share": entry["share"]}
            )
            results.append({**about, **entry, **memory})
    return {
        "machine": {**about_machine(platform), "load_before": load_before, "load_after": os.getloadavg()[0]},
        "repeats": arguments.repeats,
        "memory": "allocator peak" if is_gpu else "peak resident memory of a fresh process, minus inputs",
        "not_run": not_run,
        "results": results,
        "summary": summarise(results, ours="triton" if is_gpu else "chunked"),
    }


def summarise(results: list[dict[str, Any]], *, ours: str) -> dict[str, float]:
    """Ours / naive at the summary point: time with all and with 40% key rows, extra memory with all rows."""
    rows, hidden, vocabulary, tensor_parallel = SUMMARY_POINT
    at = {"rows": rows, "hidden": hidden, "vocabulary": vocabulary, "tensor_parallel": tensor_parallel}
    here = {
        (entry["method"], entry["share"]): entry
        for entry in results
        if all(entry[name] == value for name, value in at.items())
    }

    def ratio(share: float, quantity: str) -> float:
        return here[ours, share][quantity] / here["naive", share][quantity]

    if not all((name, share) in here for name in (ours, "naive") for share in (1.0, 0.4)):
        return {}
    return {
        "time_ratio_all_rows": ratio(1.0, "seconds"),
        "time_ratio_40pct_rows": ratio(0.4, "seconds"),
        "memory_ratio": ratio(1.0, "extra_bytes"),
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{'rows':>6} {'hidden':>6} {'shard':>7} {'key':>5}  {'method':<34} {'s':>8} {'extra MB':>9} {'work MB':>8}"
    ]
    for entry in report["results"]:
        shard = -(-entry["vocabulary"] // entry["tensor_parallel"])
        lines.append(
            f"{entry['rows']:>6} {entry['hidden']:>6} {shard:>7} {entry['share']:>5.0%}  "
            f"{METHODS[entry['method']].label:<34} {entry['seconds']:>8.3f} {entry['extra_bytes'] / 1e6:>9.0f} "
            f"{entry['working_bytes'] / 1e6:>8.0f}"
        )
    lines += [f"not run: {METHODS[name].label}: {reason}" for name, reason in report["not_run"].items()]
    lines += [f"{name} {value:.3f}" for name, value in report["summary"].items()]
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[152_064])
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--share", type=float, nargs="+", default=[1.0, 0.4], help="share of rows with a gradient")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--figure", type=Path, help="also draw the results as SVG into this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    platform = start("auto")
    if arguments.job:
        print(json.dumps(_run_job(json.loads(arguments.job), platform)))
        return
    report = run_benchmark(arguments, platform)
    text = write_report(report, out=arguments.out, figure=arguments.figure, draw=draw)
    print(text if arguments.json else _table(report))


if __name__ == "__main__":
    run_cli(_main)
