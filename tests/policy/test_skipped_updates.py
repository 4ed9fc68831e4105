"""An update whose numbers are not finite is skipped by all ranks together: nothing changes, the reason is counted."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.batch.micro_batch import UpdateResult, together
from megatron_ktr.batch.skips import IN_A_ROW, SkipStreak
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.run.metrics import step_line
from megatron_ktr.sums import Metrics
from tests.support.layouts import sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import DISTRIBUTED_SGD, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

PLAN = ("", "log_prob", "loss", "gradient", "")
"""What goes wrong in each step."""
ADAM: dict[str, Any] = dict(optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=1.0)
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("skipped")
    save_tiny_hf(directory, num_layers=2)
    return directory


def _state_of(policy: Any) -> list[torch.Tensor]:
    """Everything that an update may change on this rank."""
    policy.wait_for_parameters()
    found = [parameter.detach().clone() for chunk in policy.chunks for parameter in chunk.parameters()]
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            found += [parameter.detach().clone() for parameter in group["params"]]
            found.append(torch.tensor(group["lr"]))
        for state in part.optimizer.state.values():
            found += [torch.as_tensor(value).clone() for value in state.values()]
    return [*found, torch.tensor(policy.scheduler.num_steps)]


def steps_with_faults(
    context: RankContext,
    *,
    hf_dir: Path,
    sizes: ParallelSizes,
    values: dict[str, Any],
    plan: tuple[str, ...],
    loss_scale: float | None = None,
    num_steps: int | None = None,
) -> list[tuple[dict[str, float], bool]]:
    """The metrics of each step of ``plan``, and whether the step has left every bit as it was. With ``num_steps``,
    ``plan`` is of updates."""
    kept: list[bool] = []

    def prepare(policy: Any) -> None:
        backward, update = policy.backward, policy.update
        faults = iter(plan)
        for part in policy.optimizer.chained_optimizers if loss_scale else ():
            part.grad_scaler._scale.fill_(loss_scale)

        def spoiled(*args: Any, **kwargs: Any) -> UpdateResult:
            result, fault = backward(*args, **kwargs), next(faults)
            if fault == "log_prob":
                return dataclasses.replace(result, num_not_finite=2)
            if fault == "loss":
                return dataclasses.replace(result, loss=math.inf)
            if fault == "gradient" and context.rank == context.world_size - 1:
                # One rank alone has it: in its shard, or its copy of what ranks share.
                parameter = next(p for p in policy.bare_chunks[0].parameters() if p.requires_grad and p.numel() > 100)
                parameter.main_grad.fill_(math.nan)
            return result

        def recorded(*args: Any, **kwargs: Any) -> UpdateResult:
            before = _state_of(policy)
            result = update(*args, **kwargs)
            after = _state_of(policy)  # the first step makes the moments
            kept.append(len(before) == len(after) and all(map(torch.equal, before, after)))
            return result

        policy.backward, policy.update = spoiled, recorded

    groups = example_groups("mixed", "long video")
    records = run_steps(
        context.init(sizes),
        hf_dir=hf_dir,
        rollout_groups=groups,
        values=values,
        num_steps=num_steps or len(plan),
        before=prepare,
    )
    return [(record.values, is_kept) for record, is_kept in zip(records, kept, strict=num_steps is None)]


LAYOUTS = {
    "one rank": (ParallelSizes(), 1, ADAM),
    "tp2 sp": (sizes_of(2, sp=True), 2, ADAM),
    "pp2": (sizes_of(1, 2), 2, ADAM),
    "dp2, whole copies": (ParallelSizes(), 2, ADAM),
    "dp2, shards, overlapped": (ParallelSizes(), 2, {**ADAM, **OVERLAPPED}),
    "dp2, lora, no clipping": (ParallelSizes(), 2, {**ADAM, **DISTRIBUTED_SGD, "clip_grad": 0.0, "lora_rank": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fault_of_one_rank_skips_the_update_on_all_and_keeps_every_bit(
    ranks: RankPool, hf_dir: Path, name: str
) -> None:
    sizes, world_size, values = LAYOUTS[name]
    for steps in ranks(steps_with_faults, world_size, hf_dir=hf_dir, sizes=sizes, values=values, plan=PLAN):
        for fault, (metrics, is_unchanged) in zip(PLAN, steps, strict=True):
            assert metrics["has_stepped"] == float(not fault) and is_unchanged == bool(fault), (name, fault)
            assert metrics["skipped_updates"] == float(bool(fault))
            assert not fault or metrics[f"skipped_updates/{fault}"] == 1.0
        assert [metrics.get(IN_A_ROW) for metrics, _ in steps] == [None, 1.0, 2.0, 3.0, None]
        assert math.isfinite(steps[-1][0]["loss"]) and math.isfinite(steps[-1][0]["grad_norm"])


def test_an_overflow_under_the_loss_scale_is_how_the_scale_is_found_and_no_fault(ranks: RankPool, hf_dir: Path) -> None:
    values = {**ADAM, "params_dtype": "fp16"}
    for metrics, _ in ranks(steps_with_faults, 1, hf_dir=hf_dir, sizes=ParallelSizes(), values=values, plan=("",) * 2)[
        0
    ]:
        assert metrics["skipped_updates/loss_scale"] == metrics["skipped_updates"] == 1.0
        assert IN_A_ROW not in metrics


FP16_LAYOUTS = {
    "dp2, whole copies": (ParallelSizes(), {"use_distributed_optimizer": False}),
    "dp2, shards": (ParallelSizes(), {"use_distributed_optimizer": True}),
    "tp2": (sizes_of(2), {"use_distributed_optimizer": False}),
}


@pytest.mark.parametrize("name", FP16_LAYOUTS)
def test_an_overflow_of_one_rank_alone_scales_less_on_all(ranks: RankPool, hf_dir: Path, name: str) -> None:
    """megatron-core looks for it over model-parallel ranks alone, and leaves the step before the norm is agreed on."""
    sizes, changes = FP16_LAYOUTS[name]
    plan = ("", "gradient", "gradient", "gradient", "")
    arguments: dict[str, Any] = dict(values={**ADAM, **changes, "params_dtype": "fp16"}, plan=plan, loss_scale=2.0)
    for steps in ranks(steps_with_faults, 2, hf_dir=hf_dir, sizes=sizes, **arguments):
        assert [metrics["has_stepped"] for metrics, _ in steps] == [1.0, 0.0, 0.0, 0.0, 1.0]
        assert [is_unchanged for _, is_unchanged in steps] == [False, True, True, True, False]
        assert steps[1][0]["skipped_updates/loss_scale"] == 1.0 and IN_A_ROW not in steps[1][0]
        # At the smallest scale there is nothing to scale: it is a fault.
        assert [metrics.get(IN_A_ROW) for metrics, _ in steps[2:]] == [1.0, 2.0, None]


def test_a_step_whose_last_update_alone_is_skipped_has_changed_the_weights(ranks: RankPool, hf_dir: Path) -> None:
    """A dump after it must not take the checkpoint before it for the weights of its own step."""
    values = {**ADAM, "updates_per_rollout": 2}
    context: dict[str, Any] = dict(values=values, plan=("", "gradient"), num_steps=1)
    (steps,) = ranks(steps_with_faults, 1, hf_dir=hf_dir, sizes=ParallelSizes(), **context)
    metrics = steps[0][0]
    assert (metrics["has_stepped"], metrics["skipped_updates"], metrics[IN_A_ROW]) == (1.0, 1.0, 1.0)
    assert math.isnan(metrics["grad_norm"])


def _result(reason: str | None = None, *, has_stepped: bool = False) -> UpdateResult:
    return UpdateResult(1.0, True, Metrics(), has_stepped=has_stepped, skip_reason=reason)


def test_only_a_step_ends_a_row_and_only_faults_lengthen_it() -> None:
    streak = SkipStreak()
    fault, step = _result("gradient"), _result(has_stepped=True)
    assert streak.add([fault, _result("loss_scale"), _result("log_prob")])[IN_A_ROW] == 2.0
    assert IN_A_ROW not in streak.add([UpdateResult(0.0, False, Metrics()), _result("threshold"), _result("objective")])
    assert streak.length == 2
    # The longest row counts, although the step ends it; a new one begins after it.
    found = streak.add([fault, step, fault])
    assert (found[IN_A_ROW], found["skipped_updates/gradient"], found["skipped_updates"]) == (3.0, 2.0, 2.0)
    assert streak.length == 1
    assert IN_A_ROW not in streak.add([step]) and streak.length == 0
    assert together([step, fault]).skip_reason == "gradient" and together([step, fault]).has_stepped
    assert "updates skipped 1" in step_line(1, 2, streak.add([fault]))
