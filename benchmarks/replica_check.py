"""What a comparison of the weights that ranks hold alike costs, as a share of a training step.

    torchrun --nproc-per-node 2 benchmarks/replica_check.py [--out FILE]

Two data-parallel replicas of a random model (4 layers of 256, vocabulary 32,000), a video question of 256 visual tokens
and 8 responses of 64 tokens each, everything trained. CPU seconds of rank 0's process, which do not count the waiting
for a busy machine; medians over the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import about_machine
from benchmarks.step.ours import OurStep, save_random_model, token_ids_of
from megatron_ktr.data.random_groups import SyntheticSizes, synthetic_group
from megatron_ktr.distributed import platform as platforms
from megatron_ktr.distributed.collectives import barrier, broadcast_object
from megatron_ktr.distributed.groups import ParallelSizes, destroy_parallel, init_parallel
from megatron_ktr.errors import Parser, run_cli, whole
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import to_json
from megatron_ktr.policy.replicated import replicated_tensors
from megatron_ktr.run.replica_check import differences_of


def measure(repeats: int) -> dict[str, Any]:
    """The report; collective."""
    platform = platforms.start("auto")
    ranks = init_parallel(ParallelSizes(), platform=platform)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(broadcast_object(folder, group=ranks.world, source=0))
        if ranks.rank == 0:
            save_random_model(directory, vocab_size=32_000, num_layers=4, seed=0)
        barrier()
        ours = OurStep(
            directory, directory, ranks=ranks, platform=platform, options={"prompts_per_step": ranks.data_size}
        )
        sizes = SyntheticSizes(8, 224, 224, text_length=200, response_lengths=(64,) * 8)
        group = synthetic_group(sizes, tokens=token_ids_of(directory), seed=ranks.rank)
        barrier()
    policy = ours.trainer.policy
    ours.step(group, 1)
    assert differences_of(policy) == []
    steps, checks = [], []
    for turn in range(repeats):
        steps.append(_cpu_seconds(lambda turn=turn: ours.step(group, 2 + turn)))
        checks.append(_cpu_seconds(lambda: differences_of(policy)))
    compared = [copy.tensor for copy in replicated_tensors(policy) if copy.group.size() > 1]
    step, check = statistics.median(steps), statistics.median(checks)
    return {
        "machine": {**about_machine(platform), "load": os.getloadavg()[0]},
        "ranks": ranks.world_size,
        "tensors": len(compared),
        "bytes_compared": sum(tensor.nbytes for tensor in compared),
        "bytes_sent_by_a_rank": 8 * len(compared),
        "cpu_seconds_of_a_step": step,
        "cpu_seconds_of_a_check": check,
        "share_of_a_step": check / step,
        "all_steps": steps,
        "all_checks": checks,
    }


def _cpu_seconds(action: Callable[[], Any]) -> float:
    barrier()
    started = time.process_time()
    action()
    return time.process_time() - started


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--repeats", type=whole(), default=5, help="turns of a step and a check (5)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = measure(options.repeats)
    if int(os.environ.get("RANK", "0")) == 0:
        if options.out:
            write_atomically(options.out, to_json(report, indent=1) + "\n")
        print(to_json(report), flush=True)
    destroy_parallel()


if __name__ == "__main__":
    run_cli(main)
