"""Tokens per second of both rollout engines on CPU, and what new weights cost.

    .venv-vllm/bin/python benchmarks/rollout/run.py                 the table
    .venv-vllm/bin/python benchmarks/rollout/run.py --json          the same as JSON on stdout
    .venv-vllm/bin/python benchmarks/rollout/run.py --out F.json

A tiny model in fp32 answers 16 prompts, each with a video of 288 visual tokens, 8 times: transformers' ``generate`` in
one batch with its key-value cache, and vLLM inside the process. Both produce responses of the same natural lengths
(lognormal, 16 to 256 tokens, mean 64; ``parts.py``). A turn is a weight update from the trainer's Megatron
model, then generation, media included; engines take turns, the first ``--warm-up`` of which are not counted; medians.
The ratio is the median of what neighbouring turns give: a machine that is busy for a while is so for both.
The trainer scores the last turn's responses: the mean |difference| of its log-probs and the engine's is the gap.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from benchmarks.machine import about_machine  # noqa: E402
from benchmarks.rollout.parts import Lengths, Turn, Workload  # noqa: E402
from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel  # noqa: E402
from megatron_ktr.distributed.platform import Platform, start  # noqa: E402
from megatron_ktr.errors import run_cli  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402


def run_benchmark(arguments: argparse.Namespace, platform: Platform, folder: Path) -> dict[str, Any]:
    load_before = os.getloadavg()[0]
    work = Workload(
        folder,
        num_prompts=arguments.prompts,
        num_samples=arguments.samples,
        lengths=Lengths(arguments.least, arguments.most, arguments.mean),
        ranks=init_parallel(ParallelSizes(), platform=platform),
        platform=platform,
    )
    engines = work.engines()
    torch.set_num_threads(arguments.threads)
    turns: dict[str, list[Turn]] = {name: [] for name in engines}
    gaps = {}
    for step in range(-arguments.warm_up, arguments.repeats):
        for name, engine in engines.items():
            turn, groups = work.take_turn(engine, step=step + arguments.warm_up)
            _say(
                f"{name}: {turn.num_tokens} tokens in {turn.seconds:.2f} s ({turn.cpu_seconds:.2f} s of CPU), "
                f"new weights in {turn.update_seconds:.3f} s"
            )
            if step >= 0:
                turns[name].append(turn)
            if step == arguments.repeats - 1:
                gaps[name] = work.gaps(groups)
    load_after = os.getloadavg()[0]
    results = [
        {
            "engine": name,
            "tokens_per_second": statistics.median(turn.tokens_per_second for turn in found),
            "all_seconds": [turn.seconds for turn in found],
            "all_cpu_seconds": [turn.cpu_seconds for turn in found],
            "num_tokens": [turn.num_tokens for turn in found],
            "weight_update_seconds": statistics.median(turn.update_seconds for turn in found),
            "weight_update_bytes": found[0].update_bytes,
            "logprob_gap_mean": float(gaps[name].mean()),
            "logprob_gap_max": float(gaps[name].max()),
        }
        for name, found in turns.items()
    ]
    for engine in engines.values():
        engine.close()
    return {
        "machine": {**about_machine(platform), "load_before": load_before, "load_after": load_after},
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "visual_tokens": work.num_visual_tokens,
        "repeats": arguments.repeats,
        "results": results,
        "summary": summarise(results),
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, float]:
    """vLLM's tokens per second over transformers'; seconds of a weight update of vLLM, and its gap in nats."""
    found = {entry["engine"]: entry for entry in results}
    # Both engines generate the same numbers of tokens in each turn.
    turns = zip(found["hf"]["all_seconds"], found["vllm"]["all_seconds"], strict=True)
    return {
        "vllm_over_hf": statistics.median(hf_seconds / vllm_seconds for hf_seconds, vllm_seconds in turns),
        "weight_update_seconds": found["vllm"]["weight_update_seconds"],
        "logprob_gap_mean": found["vllm"]["logprob_gap_mean"],
    }


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'engine':<8} {'tokens/s':>9} {'new weights':>12} {'bytes':>10} {'gap, nats':>10} {'largest':>9}"]
    for entry in report["results"]:
        lines.append(
            f"{entry['engine']:<8} {entry['tokens_per_second']:>9.0f} {entry['weight_update_seconds']:>10.3f} s "
            f"{entry['weight_update_bytes']:>10} {entry['logprob_gap_mean']:>10.1e} {entry['logprob_gap_max']:>9.1e}"
        )
    lines += [f"{name} {value:.3g}" for name, value in report["summary"].items()]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="responses per prompt")
    parser.add_argument("--least", type=int, default=16, help="tokens of the shortest response")
    parser.add_argument("--most", type=int, default=256, help="tokens of the longest response")
    parser.add_argument("--mean", type=int, default=64, help="mean tokens of a response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=1, help="turns of each engine before those that count")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each engine that count")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        report = run_benchmark(arguments, start("cpu"), Path(folder))
    destroy_parallel()
    text = to_json(report, indent=1)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else _table(report))


if __name__ == "__main__":
    run_cli(_main)
