"""Everything there is to ask of one GPU, in one command of at most fifteen minutes, into one JSON file.

    python benchmarks/gpu_suite/run.py --out gpu.json
    python benchmarks/gpu_suite/run.py --out gpu.json --only smoke parity
    python benchmarks/gpu_suite/run.py --out dry.json --tiny --device cpu   # tiny sizes: does the script itself work?

Parts, in order, each in a process of its own with its share of ``--seconds``:

    smoke      each piece by itself: matrix product, process group, compiled fusion, packed attention and vocabulary
               head of every implementation, Transformer Engine's linear layer by FP8 recipe
    parity     log-probs, loss and gradients of one update against the host's fp32 numbers, every implementation
    positions  log-probs of one response of 6,000 tokens against Hugging Face's model in fp32, by quarter
    save       one checkpoint: memory of device and host, seconds that training waits, weights back to the bit
    step       passes of an update at 3B and 7B sizes, TFLOP/s, MFU and memory; a whole step against the baseline
    training   ten steps of a 3B-shaped model
    kernels    the vocabulary head and one attention layer at 7B sizes

The file is written again after every part. An entry that fails has its error line and the rest goes on; what cannot run
here is skipped with its reason. Exit code 1 if anything failed. Inputs are random numbers, never zeros; times are
medians of device events after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ktr.files.atomic import write_atomically  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402

SHARES = {
    "smoke": 0.1,
    "parity": 0.22,
    "positions": 0.08,
    "save": 0.08,
    "step": 0.2,
    "training": 0.1,
    "kernels": 0.22,
}
"""Of the seconds. The kernels come last: they alone are tuned, which takes most of theirs."""


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.reference is not None:
        return _write_reference(options)
    if options.part is not None:
        return _run_part(options)
    report: dict[str, Any] = {"device": options.device, "is_tiny": options.tiny, "parts": {}, "failures": []}
    shares = {name: share for name, share in SHARES.items() if name in (options.only or SHARES)}
    for name, share in shares.items():
        seconds = options.seconds * share / sum(shares.values())
        report["parts"][name] = part = run_in_own_process(name, options, seconds=seconds)
        failed = [f"{name}: {entry['name']}: {entry['error']}" for entry in part["entries"] if "error" in entry]
        report["failures"] += failed + ([f"{name}: {part['error']}"] if part["error"] else [])
        _write(options.out, report)
        _say(name, part)
    return 1 if report["failures"] else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="parts to run (all)")
    parser.add_argument("--seconds", type=float, default=900.0, help="for all parts that run, shared out (900)")
    parser.add_argument("--device", default="auto", help="auto, cpu, or what --platform of the trainer takes (auto)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; numbers mean nothing")
    for name, kind in (("--part", str), ("--results", Path), ("--reference", Path), ("--models", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.out is None and options.part is None and options.reference is None:
        parser.error("--out is needed")
    return options


def run_in_own_process(name: str, options: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """``{"entries": [...], "error": why the process ended early or None, "seconds": wall}``."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results.jsonl"
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--results", str(results)]
        command += ["--device", options.device, "--seconds", str(seconds), *["--tiny"] * options.tiny]
        # A session of its own: what the part started ends with it.
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        error = None
        try:
            _, messages = process.communicate(timeout=seconds + 10)
            if process.returncode:
                last = [line for line in messages.splitlines() if line.strip()][-1:]
                error = f"exit status {process.returncode}: {''.join(last)[:400]}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            error = f"not finished after {seconds:.0f} s"
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    entries = [json.loads(line) for line in lines]
    return {"entries": entries, "error": error, "seconds": round(time.monotonic() - begin, 1)}


def _run_part(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.seconds
    from megatron_ktr.distributed.platform import start

    # Before anything imports megatron-core: on CPU it must not find Transformer Engine.
    platform = start(options.device)
    platform.seed(0)
    from benchmarks.gpu_suite.common import Part

    _find(options.part)(Part(platform, options.tiny, options.results, deadline))
    return 0


def _find(name: str) -> Callable[[Any], None]:
    """Imported here: a part that cannot be imported leaves the others their turn."""
    if name == "parity":
        from benchmarks.gpu_suite.parity import run_parity

        return run_parity
    if name == "positions":
        from benchmarks.gpu_suite.positions import run_positions

        return run_positions
    if name == "save":
        from benchmarks.gpu_suite.save import run_save

        return run_save
    if name in ("smoke", "kernels"):
        from benchmarks.gpu_suite.smoke import measure_kernels, run_smoke

        return run_smoke if name == "smoke" else measure_kernels
    from benchmarks.gpu_suite.step import measure_steps, run_training

    return measure_steps if name == "step" else run_training


def _write_reference(options: argparse.Namespace) -> int:
    from megatron_ktr.distributed.platform import start

    platform = start("cpu")  # first, as above
    from benchmarks.gpu_suite.parity import write_reference

    write_reference(options.reference, options.models, platform=platform, is_tiny=options.tiny)
    return 0


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(report, indent=1) + "\n")


def _say(name: str, part: dict[str, Any]) -> None:
    print(f"{name}: {part['seconds']} s" + (f", {part['error']}" if part["error"] else ""), flush=True)
    for entry in part["entries"]:
        state = next((f"{word}: {entry[word]}" for word in ("error", "skipped") if word in entry), "ran")
        print(f"  {entry['name']:<40} {entry['seconds']:>7.1f} s  {state}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from megatron_ktr.errors import run_cli

    run_cli(main)
