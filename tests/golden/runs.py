"""Short seeded runs whose losses, gradient norms and key-token ratios are kept in ``losses.json``.

They are what a change that claims no numerical effect is held against: ``make golden-check`` compares to the last bit,
``test_golden.py`` to a tolerance that other processors' kernels stay within. ``make golden`` writes the file anew; the
commit that does so says why the numbers moved.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ktr.distributed.groups import ParallelSizes
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import example_groups, run_steps
from tests.support.tiny import save_tiny_hf

GOLDEN_FILE = Path(__file__).with_name("losses.json")
NUM_STEPS = 3
GROUPS = ("mixed", "text", "long video", "image")
KEPT = ("loss", "grad_norm", "key_token_ratio", "entropy", "kl", "reward", "learning_rate")
"""Metrics by name or by what stands before a slash, e.g. ``key_token_ratio/visual``."""

ADAM: dict[str, Any] = dict(
    optimizer="adam", use_distributed_optimizer=True, lr=1e-3, lr_decay_style="cosine", clip_grad=1.0, weight_decay=0.01
)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "video_ktr": {},
    "grpo": dict(objective="grpo"),
    "tw_grpo": dict(objective="tw_grpo", loss_aggregation="token"),
    "sft": dict(objective="sft", kl_beta=0.0),
}
LAYOUTS: dict[str, ParallelSizes] = {
    "one rank": ParallelSizes(),
    "TP2 x PP2": ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True),
}

Losses = dict[str, list[dict[str, float]]]
"""By "objective, layout": the kept metrics of each step."""


def losses_on_this_rank(context: RankContext, *, layout: str, hf_dir: Path) -> Losses:
    """Of every objective in one layout, as rank 0 reports them."""
    found = {}
    for name, values in OBJECTIVES.items():
        records = run_steps(
            context.init(LAYOUTS[layout]),
            hf_dir=hf_dir,
            rollout_groups=example_groups(*GROUPS),
            values={**ADAM, **values},
            num_steps=NUM_STEPS,
        )
        found[f"{name}, {layout}"] = [kept(record.values) for record in records]
    return found


def kept(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.split("/")[0] in KEPT}


def golden_losses(ranks: RankPool, layouts: Iterable[str] = tuple(LAYOUTS)) -> Losses:
    """All runs in these layouts, anew."""
    found: Losses = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        save_tiny_hf(Path(folder))
        for layout in layouts:
            world_size = LAYOUTS[layout].tensor * LAYOUTS[layout].pipeline
            found |= ranks(losses_on_this_rank, world_size, layout=layout, hf_dir=Path(folder))[0]
    return found


def read_golden() -> Losses:
    return json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))


def differences(ours: Losses, golden: Losses) -> dict[str, float]:
    """``run, step, metric`` -> relative difference, of every number that is not equal to the bit; what only one of
    them has differs without bound."""
    one, other = _flat(ours), _flat(golden)
    found = {name: float("inf") for name in one.keys() ^ other.keys()}
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            found[name] = abs(one[name] - other[name]) / max(abs(other[name]), 1e-3)
    return dict(sorted(found.items()))


def _flat(losses: Losses) -> dict[str, float]:
    return {
        f"{run}, step {step}, {metric}": value
        for run, steps in losses.items()
        for step, values in enumerate(steps, start=1)
        for metric, value in values.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes tests/golden/losses.json anew, or compares with it.")
    parser.add_argument("--check", action="store_true", help="compare to the last bit; writes nothing")
    options = parser.parse_args()
    ranks = RankPool(max_world_size=4)
    try:
        losses = golden_losses(ranks)
    finally:
        ranks.close()
    if not options.check:
        GOLDEN_FILE.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {len(_flat(losses))} numbers to {GOLDEN_FILE.name}")
        return 0
    found = differences(losses, read_golden())
    for name, relative in found.items():
        print(f"{name}: differs by {relative:.2g} of its value")
    print(f"{len(_flat(losses)) - len(found)} of {len(_flat(losses))} numbers are equal to the bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
