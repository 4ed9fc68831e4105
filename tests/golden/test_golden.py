"""A change that claims no numerical effect has none."""

from __future__ import annotations

import pytest

from megatron_ktr.config.objective_registry import BUILT_IN
from tests.golden.runs import LAYOUTS, OBJECTIVES, differences, golden_losses, num_steps_of, read_golden
from tests.support.ranks import RankPool

TOLERANCE = 1e-4
"""Relative. On the machine and the torch that wrote the file every number is equal to the bit (``make golden-check``);
other processors take other kernels, and Adam divides an element of the gradient by its own magnitude."""


def test_the_file_holds_every_run_whole() -> None:
    golden = read_golden()
    assert golden.keys() == {f"{objective}, {layout}" for objective in OBJECTIVES for layout in LAYOUTS}
    assert OBJECTIVES.keys() == set(BUILT_IN)
    for name, steps in golden.items():
        assert len(steps) == num_steps_of(name.partition(",")[0]) and all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP2 x PP2", marks=pytest.mark.slow)])
def test_losses_gradient_norms_and_key_token_ratios_are_those_written_down(ranks: RankPool, layout: str) -> None:
    golden = {name: steps for name, steps in read_golden().items() if name.endswith(f", {layout}")}
    found = differences(golden_losses(ranks, [layout]), golden)
    moved = {name: relative for name, relative in found.items() if not relative <= TOLERANCE}
    assert not moved, "if the numbers had to move: `make golden`, and the reason in the commit"


def test_layouts_agree_where_the_weights_are_still_the_same() -> None:
    golden = read_golden()
    for objective in OBJECTIVES:
        alone, split = (golden[f"{objective}, {layout}"][0] for layout in LAYOUTS)
        assert alone.keys() == split.keys()
        assert {k: v for k, v in alone.items() if v != pytest.approx(split[k], rel=1e-4, abs=1e-6)} == {}


def test_a_number_that_moved_and_one_that_is_missing_are_seen() -> None:
    golden = {"run": [{"loss": 1.0, "grad_norm": 2.0}]}
    assert differences(golden, golden) == {}
    found = differences({"run": [{"loss": 1.001, "entropy": 1.0}]}, golden)
    assert sorted(found) == ["run, step 1, entropy", "run, step 1, grad_norm", "run, step 1, loss"]
    assert found["run, step 1, loss"] == pytest.approx(1e-3)
