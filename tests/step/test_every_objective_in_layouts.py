"""Every objective's update is the same however the model and the groups are split, gradients included.

The settings are those of the golden runs, in which each objective acts: two mini-batches, bounds that clip some ratios,
responses to shuffled frames. Two layouts of four ranks hold every way of splitting at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.runs import OBJECTIVES, golden_groups
from tests.step.test_training_step import _assert_small, _published
from tests.support.layouts import BALANCED, PACKED, sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import StepDifference, StepRecord, compare_steps, run_steps
from tests.support.tiny import save_tiny_hf

HELD_ELSEWHERE = ("video_ktr", "grpo", "vppo")
"""By ``test_training_step.py`` and ``test_context_parallel.py``, in more layouts."""
NAMES = [name for name in OBJECTIVES if name not in HELD_ELSEWHERE]
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tp2 pp2 sp": (sizes_of(2, 2, sp=True), {}),
    "cp2 dp2, balanced, packed": (sizes_of(cp=2), {**BALANCED, **PACKED}),
}


def _step(context: RankContext, objective: str, *, sizes: Any, values: Mapping[str, Any], **options: Any) -> StepRecord:
    chosen = OBJECTIVES[objective]
    groups = golden_groups(asked_twice="temporal_bonus" in chosen)
    return run_steps(context.init(sizes), rollout_groups=groups, values={**chosen, **values}, **options)[0]


def alone(context: RankContext, **options: Any) -> dict[str, StepRecord]:
    return {name: _step(context, name, sizes=sizes_of(), values={}, **options) for name in NAMES}


def differences(
    context: RankContext, *, expected: dict[str, StepRecord], initial: dict[str, Tensor], **options: Any
) -> dict[str, StepDifference]:
    found = {}
    for layout, (sizes, values) in LAYOUTS.items():
        for name, theirs in expected.items():
            # A score at the threshold may fall on either side of it where sums are reordered.
            masks = [theirs.chosen] if theirs.chosen else None
            ours = _step(context, name, sizes=sizes, values=values, masks=masks, **options)
            found[f"{name}, {layout}"] = compare_steps([ours], [theirs], initial=initial)
    return found


@pytest.mark.slow
def test_gradients_of_every_objective_are_the_same_in_layouts(ranks: RankPool, tmp_path: Path) -> None:
    options = dict(hf_dir=tmp_path / "policy", reference_dir=tmp_path / "reference")
    initial = _published(save_tiny_hf(options["hf_dir"]))
    save_tiny_hf(options["reference_dir"], seed=9)
    expected = ranks(alone, 1, **options)[0]
    for name, record in expected.items():
        assert record.values["has_stepped"] == 1.0 and len(record.updates) == OBJECTIVES[name].get("mini_batches", 1)
    gradients = {
        name: torch.cat([g.flatten() for g in of.updates[-1].gradients.values()]) for name, of in expected.items()
    }
    for name, gradient in gradients.items():
        others = [other for key, other in gradients.items() if key != name]
        assert all(float(torch.cosine_similarity(gradient, other, dim=0)) < 0.9999 for other in others), name
    for by_name in ranks(differences, 4, expected=expected, initial=initial, **options):
        for name, difference in by_name.items():
            _assert_small(name, difference)
