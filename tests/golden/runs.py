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
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ktr.config.objective_registry import objective_entry
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.types import Rollout, RolloutGroup
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import example_groups, run_steps
from tests.support.tiny import save_tiny_hf

GOLDEN_FILE = Path(__file__).with_name("losses.json")
NUM_STEPS = 3
GROUPS = ("mixed", "text", "long video", "image")
KEPT = ("loss", "grad_norm", "key_token_ratio", "entropy", "kl", "reward", "learning_rate")
"""Metrics by name or by what stands before a slash, e.g. ``key_token_ratio/visual``."""


def preset(name: str, **values: Any) -> dict[str, Any]:
    """An objective as its entry sets it, where ``run_steps`` has defaults of its own."""
    return {**objective_entry(name).defaults, "objective": name, **values}


ADAM: dict[str, Any] = dict(
    optimizer="adam", use_distributed_optimizer=True, lr=1e-3, lr_decay_style="cosine", clip_grad=1.0, weight_decay=0.01
)
TWICE = dict(mini_batches=2)
"""The second update's ratios are not 1."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "video_ktr": {},
    "grpo": dict(objective="grpo"),
    "tw_grpo": dict(objective="tw_grpo", loss_aggregation="token"),
    "sft": dict(objective="sft", kl_beta=0.0),
    "t_grpo": preset("t_grpo"),
    "dapo": preset("dapo", **TWICE, clip_low=0.02, clip_high=0.03),
    "dr_grpo": preset("dr_grpo", **TWICE, loss_constant=9),
    "rloo": preset("rloo", **TWICE, loss_constant=9),
    "reinforce_pp": preset("reinforce_pp", **TWICE),
    "reinforce_pp_baseline": preset("reinforce_pp_baseline", **TWICE),
    "gspo": preset("gspo", **TWICE, clip_low=0.02, clip_high=0.02),
    "cispo": preset("cispo", **TWICE, ratio_cap=1.02),
    "entropy_80_20": preset("entropy_80_20", **TWICE),
    "vppo": preset("vppo", **TWICE),
}
"""What is small in the presets acts here: bounds of ratios that this model reaches, lengths that its responses have."""
LAYOUTS: dict[str, ParallelSizes] = {
    "one rank": ParallelSizes(),
    "TP2 x PP2": ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True),
}


def num_steps_of(objective: str) -> int:
    """One less where every step has two updates."""
    return NUM_STEPS - 1 if "mini_batches" in OBJECTIVES[objective] else NUM_STEPS


Losses = dict[str, list[dict[str, float]]]
"""By "objective, layout": the kept metrics of each step."""


def losses_on_this_rank(context: RankContext, *, layout: str, hf_dir: Path) -> Losses:
    """Of every objective in one layout, as rank 0 reports them."""
    found = {}
    for name, values in OBJECTIVES.items():
        records = run_steps(
            context.init(LAYOUTS[layout]),
            hf_dir=hf_dir,
            rollout_groups=golden_groups(asked_twice="temporal_bonus" in values),
            values={**ADAM, **values},
            num_steps=num_steps_of(name),
        )
        found[f"{name}, {layout}"] = [kept(record.values) for record in records]
    return found


def golden_groups(*, asked_twice: bool) -> list[RolloutGroup]:
    """``asked_twice``: with responses to shuffled frames, of which those of "long video" are the better ones."""
    groups = example_groups(*GROUPS)
    shuffled = {"mixed": (0.0, 0.0), "long video": (1.0, 1.0)} if asked_twice else {}
    return [
        replace(group, shuffled=tuple(Rollout((5, 6), rewards={"accuracy": a}) for a in shuffled.get(name, ())))
        for name, group in zip(GROUPS, groups, strict=True)
    ]


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
