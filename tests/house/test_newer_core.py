"""Options that exist with megatron-core 0.19 alone: refused in one line with 0.16, and with 0.19 the same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr import stack
from megatron_ktr.config import load_config
from megatron_ktr.distributed.groups import ParallelGroups, ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.run.metrics import step_line
from tests.step.test_training_step import (
    GROUPS,
    LOSS_TOLERANCE,
    Case,
    assert_layouts_agree,
    make_cases,
    run_in_layout,
)
from tests.support.layouts import FULL, Layout, sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import DISTRIBUTED_SGD, StepRecord, example_groups, run_steps
from tests.support.tiny import save_tiny_hf

NEEDS_0_19 = pytest.mark.skipif(not stack.has_core_0_19(), reason="megatron-core 0.16 does not have it")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> dict[str, Case]:
    return make_cases(tmp_path_factory, ranks)


def _config(*flags: str) -> Any:
    return load_config(["--model", "m", "--replay-path", "r", *flags])


@pytest.mark.parametrize("flags", [("--mlp-chunks", "2"), ("--grad-norm-skip-threshold", "10")])
def test_the_older_stack_refuses_them_in_one_line(flags: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "installed", lambda: stack.OLD)
    with pytest.raises(UserError, match=rf"^{flags[0]} needs megatron-core 0\.19\.2, .* Python 3\.12"):
        _config(*flags)
    monkeypatch.setattr(stack, "installed", lambda: stack.NEW)
    _config(*flags)


# MLPs in parts


CHUNKED: dict[int, list[Layout]] = {
    1: [
        Layout("3 parts", values=dict(mlp_chunks=3)),
        Layout("more parts than rows, tied", values=dict(mlp_chunks=1000), case="tied, clipped"),
        Layout("2 parts, whole layers recomputed", values=dict(mlp_chunks=2, **FULL)),
        Layout("2 parts, packed rows", values=dict(mlp_chunks=2, micro_batch_groups=2)),
    ],
    2: [
        # Parts of a tensor rank's own rows, which are gathered part by part; the last part is shorter.
        Layout("tp2 sp, 5 parts", sizes_of(2, sp=True), dict(mlp_chunks=5)),
        Layout("tp2, 3 parts, tied", sizes_of(2), dict(mlp_chunks=3), "tied, clipped"),
        Layout("cp2, 3 parts", sizes_of(cp=2), dict(mlp_chunks=3)),
        Layout("pp2 vpp2, 2 parts, tied", sizes_of(1, 2, vpp=2), dict(mlp_chunks=2), "tied, clipped"),
    ],
}


@NEEDS_0_19
@pytest.mark.parametrize("world_size", CHUNKED)
def test_mlps_in_parts_of_the_rows_take_the_same_steps(
    ranks: RankPool, cases: dict[str, Case], world_size: int
) -> None:
    assert_layouts_agree(ranks, world_size, layouts=CHUNKED[world_size], cases=cases)


@NEEDS_0_19
def test_every_pass_runs_in_parts_and_the_vision_encoder_never(one_rank: ParallelGroups, tmp_path: Path) -> None:
    """Update, counterfactual passes and the reference model's: none of them ever leaves training mode."""
    save_tiny_hf(tmp_path, num_layers=1, vision_depth=1, fullatt_block_indexes=(0,))
    calls: dict[int, list[str]] = {}

    def watch(policy: Any) -> None:
        assert policy.bare_chunks[0].vision.config.mlp_chunks_for_training == 1
        chunks = {"policy": policy.bare_chunks[0], "reference": policy.reference.chunks[0]}
        seen = calls.setdefault(policy.options.parallel.mlp_chunks, [])
        for name, chunk in chunks.items():
            chunk.language.decoder.layers[0].mlp.register_forward_hook(lambda *_, name=name: seen.append(name))

    for num_chunks in (1, 2):
        run_steps(
            one_rank,
            hf_dir=tmp_path,
            rollout_groups=example_groups("mixed"),
            values=dict(mlp_chunks=num_chunks),
            before=watch,
        )
    # Hidden view, shuffled view, update; reference model.
    assert {name: calls[1].count(name) for name in ("policy", "reference")} == {"policy": 3, "reference": 1}
    assert sorted(calls[2]) == sorted(calls[1] * 2)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--recompute-granularity", "selective", "--recompute-modules", "mlp"), "--recompute-modules mlp"),
        (("--fp8-format", "hybrid", "--bf16"), "--fp8-format"),
        (("--scoring-precision", "fp8", "--bf16"), "--scoring-precision fp8"),
    ],
)
def test_parts_that_would_be_ignored_or_have_scales_of_their_own_are_refused(
    flags: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "installed", lambda: stack.NEW)
    with pytest.raises(UserError, match=f"--mlp-chunks does not go with {part}"):
        _config("--mlp-chunks", "2", *flags)


# Updates skipped for their gradient norm


def _steps_and_rates(context: RankContext, *, sizes: ParallelSizes, **options: Any) -> tuple[list[StepRecord], float]:
    rates = []
    records = run_steps(context.init(sizes), after=lambda policy: rates.append(policy.learning_rate), **options)
    return records, rates[0]


def _options(case: Case, values: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict(
        hf_dir=case.hf_dir,
        reference_dir=case.reference_dir,
        rollout_groups=example_groups(*GROUPS),
        values={**case.values, **values},
        num_steps=2,
        masks=case.masks,
        **more,
    )


@NEEDS_0_19
@pytest.mark.parametrize(
    "sizes, values",
    [
        (ParallelSizes(), dict(clip_grad=0.0)),
        (sizes_of(2, sp=True), dict(clip_grad=0.5)),
        (sizes_of(1, 2), dict(clip_grad=0.5)),
        (ParallelSizes(), {**DISTRIBUTED_SGD, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
    ids=["dp2, no clipping", "tp2 sp", "pp2", "dp2 distributed overlapped"],
)
def test_an_update_above_the_threshold_is_counted_and_changes_nothing(
    ranks: RankPool, cases: dict[str, Case], sizes: ParallelSizes, values: dict[str, Any]
) -> None:
    """Weights keep every bit on every rank, the schedule stays at its start, and the reported norm is the true one;
    just above the norm that was found, the same steps are taken as without the option."""
    case = cases["untied"]
    warm = dict(lr_warmup_steps=4)
    norm = case.expected[0].updates[0].grad_norm
    for threshold, is_skipped in ((0.5 * norm, True), (1e6, False)):
        options = _options(case, {**values, **warm, "grad_norm_skip_threshold": threshold}, sizes=sizes)
        for records, rate in ranks(_steps_and_rates, 2, **options):
            for record in records:
                assert record.values["skipped_updates"] == float(is_skipped)
                assert record.values["has_stepped"] == float(not is_skipped)
                assert [update.has_stepped for update in record.updates] == [not is_skipped]
            assert abs(records[0].updates[0].grad_norm / norm - 1) < LOSS_TOLERANCE * 100
            assert (rate == 0.0) == is_skipped
            is_same = {n: torch.equal(records[-1].weights[n], weight) for n, weight in case.initial.items()}
            assert all(is_same.values()) if is_skipped else not all(is_same.values())


@NEEDS_0_19
def test_every_update_on_the_same_responses_is_counted(ranks: RankPool, cases: dict[str, Case]) -> None:
    values = dict(grad_norm_skip_threshold=1e-9, updates_per_rollout=3)
    options = _options(cases["untied"], values, sizes=ParallelSizes())
    for record in ranks(run_in_layout, 1, **{**options, "masks": None})[0]:
        assert record.values["skipped_updates"] == 3.0
    assert "updates skipped 3" in step_line(1, 2, record.values)
    assert "updates skipped" not in step_line(1, 2, {**record.values, "skipped_updates": 0.0})


def _refusal(context: RankContext, *, sizes: ParallelSizes, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        run_steps(context.init(sizes), **options)
    return str(error.value)


@NEEDS_0_19
def test_ranks_that_would_not_skip_together_are_refused_together(ranks: RankPool, cases: dict[str, Case]) -> None:
    """The second of two stages is frozen: it has no parameters beside which megatron-core compares the norm."""
    values = dict(grad_norm_skip_threshold=1.0, freeze=("language",))
    found = ranks(_refusal, 2, **_options(cases["untied"], values, sizes=sizes_of(1, 2)))
    assert len(set(found)) == 1
    assert found[0].startswith("--grad-norm-skip-threshold: 1 of 2 ranks hold no parameters to update")


def test_a_step_without_evidence_is_not_a_skipped_one() -> None:
    from megatron_ktr.batch.micro_batch import UpdateResult
    from megatron_ktr.sums import Metrics

    idle = UpdateResult(loss=0.0, has_gradient=False, metrics=Metrics())
    assert not idle.is_skipped
    assert dataclasses.replace(idle, has_gradient=True).is_skipped
    assert not dataclasses.replace(idle, has_gradient=True, has_stepped=True).is_skipped
