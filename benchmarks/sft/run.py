"""Tokens per second of supervised fine-tuning, packed by tokens against one record a micro-batch, on one CPU thread.

    python benchmarks/sft/run.py                     the table
    python benchmarks/sft/run.py --json --out F.json

A step is ``RECORDS`` records of random tokens whose lengths are spread like those of conversations (log-normal), once
of text alone and once with a small video in every second record: packing, all passes, backward, AdamW, in fp32, by the
product's Trainer and Policy. Sides, in turns on the same records: ``off`` (one record a micro-batch) and bounds on the
tokens of a micro-batch. All sides must have the same loss and gradient norm, or the benchmark stops. CPU seconds of one
thread, medians over the turns; ratios are of tokens per second to ``off``.

``padding`` is arithmetic on the same lengths: the share of a batch of 8 that would be padding if it were filled up to
its longest record, in a shuffled order and in one of length buckets. Packed sequences have none in any order.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# `python benchmarks/X/run.py` puts the script's own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.harness import say, write_report  # noqa: E402
from benchmarks.machine import about_machine  # noqa: E402
from benchmarks.step.ours import save_random_model, token_ids_of  # noqa: E402
from megatron_ktr.config import config_from_values  # noqa: E402
from megatron_ktr.config.part_options import PolicyOptions, StepOptions  # noqa: E402
from megatron_ktr.data.media.preprocess import PreprocessSettings  # noqa: E402
from megatron_ktr.data.order import BucketedOrder, EpochOrder, LengthBuckets  # noqa: E402
from megatron_ktr.data.random_groups import FixedSource, SyntheticSizes, TokenIds, synthetic_group  # noqa: E402
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes, init_parallel  # noqa: E402
from megatron_ktr.distributed.platform import Platform, start  # noqa: E402
from megatron_ktr.errors import UserError, run_cli  # noqa: E402
from megatron_ktr.objectives import build_objective  # noqa: E402
from megatron_ktr.policy.policy import Policy  # noqa: E402
from megatron_ktr.trainer import Trainer  # noqa: E402
from megatron_ktr.types import Prompt, RolloutGroup  # noqa: E402
from models.qwen2_5_vl.config import Qwen2_5_VLConfig  # noqa: E402
from models.qwen2_5_vl.media import media_spec  # noqa: E402

RECORDS = 24
BOUNDS = (1024, 4096)
KINDS = ("text", "video")
TOLERANCE = 1e-4
"""Relative, of loss and gradient norm."""
LONGEST = 512
BATCH = 8


def record_lengths(number: int, *, seed: int) -> list[tuple[int, int]]:
    """(prompt, response) in tokens: log-normal with medians of 60 and 120, at most ``LONGEST``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(number, 2, generator=generator).mul(0.8).add(torch.tensor([60.0, 120.0]).log()).exp()
    return [(prompt, response) for prompt, response in drawn.round().clamp(8, LONGEST).int().tolist()]


def make_groups(kind: str, *, number: int, tokens: TokenIds, seed: int) -> list[RolloutGroup]:
    groups = []
    for index, (prompt, response) in enumerate(record_lengths(number, seed=seed)):
        sizes = SyntheticSizes(4, 56, 112, prompt, (response,))
        group = synthetic_group(sizes, tokens=tokens, seed=seed * RECORDS + index)
        if kind == "text" or index % 2:
            words = [token for token in group.prompt.token_ids if token < tokens.vision_start]
            group = RolloutGroup(Prompt(group.prompt.problem_id, tuple(words)), group.rollouts)
        groups.append(group)
    return groups


def build_trainer(
    model: Path, *, bound: int | None, records: int, ranks: ParallelGroups, platform: Platform
) -> Trainer:
    config = config_from_values(
        {
            "model": str(model),
            "platform": platform.name,
            "objective": "sft",
            "loss_aggregation": "token",
            "kl_beta": 0.0,
            "length_bonus": 0.0,
            "prompts_per_step": records,
            "max_tokens_per_microbatch": bound,
            "lr_decay_style": "constant",
        }
    )
    policy = Policy(model, options=PolicyOptions.of(config), ranks=ranks, platform=platform, num_steps=1000)
    return Trainer(
        options=StepOptions.of(config),
        policy=policy,
        source=FixedSource([]),
        objective=build_objective(config.objective, reward=config.reward),
        media=media_spec(Qwen2_5_VLConfig.from_hf(model), patchify=PreprocessSettings().patchify),
    )


def measure(
    kind: str, model: Path, *, records: int, repeats: int, ranks: ParallelGroups, platform: Platform
) -> list[dict[str, Any]]:
    """CPU seconds of every side, in turns."""
    sides = {"off": None, **{f"packed {bound}": bound for bound in BOUNDS}}
    trainers = {
        side: build_trainer(model, bound=bound, records=records, ranks=ranks, platform=platform)
        for side, bound in sides.items()
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, dict[str, float]] = {}
    num_tokens = 0
    for turn in range(repeats + 1):
        groups = make_groups(kind, number=records, tokens=token_ids_of(model), seed=turn)
        num_tokens = sum(group.num_tokens for group in groups)
        for side, trainer in trainers.items():
            assert isinstance(trainer.source, FixedSource)
            trainer.source.groups = list(groups)
            begin = time.process_time()
            values = trainer.train_step(turn + 1).values
            if turn:  # the first is the warm-up
                seconds[side].append((time.process_time() - begin) / num_tokens)
            found[side] = values
            for name in ("loss", "grad_norm"):
                if not math.isclose(values[name], found["off"][name], rel_tol=TOLERANCE):
                    raise UserError(f"{side} is not the same step: {name} {values[name]}, without {found['off'][name]}")
    rates = {side: 1 / statistics.median(values) for side, values in seconds.items()}
    return [
        {
            "records": kind,
            "side": side,
            "tokens_per_cpu_second": rates[side],
            "ratio": rates[side] / rates["off"],
            "all_seconds_per_token": seconds[side],
            "micro_batches": found[side].get("num_micro_batches", float(records)),
            "fewest_possible": float(records if bound is None else math.ceil(num_tokens / bound)),
        }
        for side, bound in sides.items()
    ]


def padding_shares(*, seed: int) -> dict[str, float]:
    """The share of padding in batches of ``BATCH`` that are filled up to their longest record."""
    lengths = np.array([sum(pair) for pair in record_lengths(4096, seed=seed)])
    is_left_out = np.zeros(len(lengths), dtype=bool)
    buckets = LengthBuckets(lengths, is_left_out, num_buckets=16, step_size=RECORDS)
    shares = {}
    shuffled, bucketed = EpochOrder(len(lengths), seed=seed, shuffle=True), BucketedOrder(buckets, seed=seed)
    for name, order in (("shuffled", shuffled), ("16 buckets", bucketed)):
        batches = lengths[[order.place_of(element) for element in range(len(lengths))]].reshape(-1, BATCH)
        shares[name] = float(1 - lengths.sum() / (batches.max(axis=1).sum() * BATCH))
    return shares


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'records':8} {'side':12} {'tokens/s':>9} {'ratio':>6} {'micro-batches':>14}"]
    for entry in report["results"]:
        lines.append(
            f"{entry['records']:8} {entry['side']:12} {entry['tokens_per_cpu_second']:9.0f} {entry['ratio']:6.2f} "
            f"{entry['micro_batches']:7.0f} of {entry['fewest_possible']:.0f}"
        )
    padding = ", ".join(f"{name} {share:.1%}" for name, share in report["padding"].items())
    return "\n".join([*lines, f"padding, if batches of {BATCH} were padded: {padding}; packed 0%"])


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=RECORDS, help="records of a step")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every side")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.records, arguments.layers) < 1:
        raise UserError("--repeats, --records and --layers must be at least 1")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    platform = start("cpu")
    ranks = init_parallel(ParallelSizes(), platform=platform)
    results: list[dict[str, Any]] = []
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        save_random_model(model, vocab_size=3_200, num_layers=arguments.layers, seed=0)
        for kind in KINDS:
            say(f"{kind} ...")
            sizes = {"records": arguments.records, "repeats": arguments.repeats}
            results += measure(kind, model, **sizes, ranks=ranks, platform=platform)
    report = {
        "machine": about_machine(platform),
        "load": [*load, os.getloadavg()[0]],
        "time": "CPU seconds of one thread, median",
        "settings": {"records": arguments.records, "repeats": arguments.repeats, "layers": arguments.layers},
        "results": results,
        "padding": padding_shares(seed=0),
    }
    text = write_report(report, out=arguments.out, figure=None, draw=str)
    print(text if arguments.json else _table(json.loads(text)))


if __name__ == "__main__":
    run_cli(_main)
