"""Context parallelism changes where rows are computed, and nothing else: planning, and whole training steps.

The steps run through Trainer and Policy like those of ``test_training_step.py``, against one process without context
parallelism: loss, scores, metrics, gradient norm, gradients and SGD weights, of two steps, with injected key tokens.
"""

from __future__ import annotations

import pytest

from tests.support.layouts import DISTRIBUTED, FULL, OVERLAPPED, SMALL, Layout, sizes_of
from tests.support.ranks import RankPool
from tests.support.steps import example_groups
from tests.test_training_step import (
    GROUPS,
    Case,
    _assert_small,
    differences_of,
    make_cases,
)

LAYOUTS: dict[int, list[Layout]] = {
    2: [
        Layout("cp2", sizes_of(cp=2)),
        Layout("cp2, tied", sizes_of(cp=2), case="tied, clipped"),
        Layout("cp2 all groups in one micro-batch", sizes_of(cp=2), dict(micro_batch_groups=4)),
        Layout("cp2 full recomputation", sizes_of(cp=2), FULL),
        Layout("cp2 selective recomputation", sizes_of(cp=2), dict(recompute_granularity="selective")),
        Layout("cp2 reference attention", sizes_of(cp=2), dict(attention_impl="torch")),
        Layout("cp2 distributed optimizer, tied", sizes_of(cp=2), DISTRIBUTED, case="tied, clipped"),
        Layout("cp2 distributed overlapped", sizes_of(cp=2), OVERLAPPED, bucket_size=SMALL),
    ],
    4: [
        Layout("cp4", sizes_of(cp=4)),
        Layout("cp4 two groups per micro-batch, tied", sizes_of(cp=4), dict(micro_batch_groups=2), "tied, clipped"),
        Layout("tp2 cp2", sizes_of(2, cp=2)),
        Layout("tp2 cp2 sp, tied", sizes_of(2, cp=2, sp=True), case="tied, clipped"),
        Layout("cp2 pp2", sizes_of(1, 2, cp=2)),
        Layout("cp2 pp2 vpp2 full recomputation, tied", sizes_of(1, 2, cp=2, vpp=2), FULL, "tied, clipped"),
        Layout("cp2 dp2", sizes_of(cp=2)),
        Layout("cp2 dp2 distributed overlapped, tied", sizes_of(cp=2), OVERLAPPED, "tied, clipped", SMALL),
    ],
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> dict[str, Case]:
    """Untied without clipping; tied with clipping to a fifth of the gradient's norm."""
    return make_cases(tmp_path_factory, ranks)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_two_steps_are_the_same_under_context_parallelism(
    ranks: RankPool, cases: dict[str, Case], world_size: int
) -> None:
    """Ragged groups with and without media, prompts shorter than the number of chunks, ranks without any response."""
    found = ranks(differences_of, world_size, layouts=LAYOUTS[world_size], cases=cases, groups=example_groups(*GROUPS))
    for by_name in found:
        for name, difference in by_name.items():
            _assert_small(name, difference)
