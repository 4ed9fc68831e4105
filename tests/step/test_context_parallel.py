"""Context parallelism changes where rows are computed, and nothing else: planning, and whole training steps.

The steps run through Trainer and Policy like those of ``test_training_step.py``, against one process without context
parallelism: loss, scores, metrics, gradient norm, gradients and SGD weights, of two steps, with injected key tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ktr.config.part_options import ModelOptions
from megatron_ktr.ops.context_shard import shard_layout
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan
from megatron_ktr.types import GroupSpan, PackedBatch, PackedLayout
from tests.step.test_training_step import (
    GROUPS,
    Case,
    _assert_small,
    assert_layouts_agree,
    make_cases,
    run_in_layout,
)
from tests.support.layouts import AGAIN, DISTRIBUTED, FRAMES, FULL, OVERLAPPED, SMALL, Layout, sizes_of
from tests.support.ranks import RankContext, RankPool
from tests.support.steps import compare_steps, example_groups
from tests.support.tiny import save_tiny_hf

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
        Layout("cp2 frames, tied", sizes_of(cp=2), FRAMES, case="tied, clipped"),
        Layout("cp2 frames, vision recomputed", sizes_of(cp=2), {**FRAMES, **AGAIN}),
    ],
    4: [
        Layout("cp4", sizes_of(cp=4)),
        Layout("cp4 two groups per micro-batch, tied", sizes_of(cp=4), dict(micro_batch_groups=2), "tied, clipped"),
        Layout("tp2 cp2", sizes_of(2, cp=2)),
        Layout("tp2 cp2 sp, tied", sizes_of(2, cp=2, sp=True), case="tied, clipped"),
        Layout("tp2 cp2 sp frames", sizes_of(2, cp=2, sp=True), FRAMES),
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
    assert_layouts_agree(ranks, world_size, layouts=LAYOUTS[world_size], cases=cases)


@pytest.mark.parametrize(
    "values",
    [
        dict(shift="kl", shuffle_unit="temporal_patch"),
        dict(objective="grpo", loss_aggregation="token", updates_per_rollout=2),
        dict(objective="tw_grpo", loss_aggregation="token"),
        dict(objective="sft", kl_beta=0.0),
    ],
    ids=["kl between views", "grpo, two updates", "tw_grpo", "sft"],
)
def test_other_objectives_take_the_same_step(ranks: RankPool, cases: dict[str, Case], values: dict[str, Any]) -> None:
    """``shift: kl`` compares hidden rows of two views, whose prompts differ in length: each rank must hold the rows of
    the same tokens in both."""
    case = cases["untied"]
    options = dict(hf_dir=case.hf_dir, reference_dir=case.reference_dir, rollout_groups=example_groups(*GROUPS))
    options["values"] = {**case.values, **values}
    expected = ranks(run_in_layout, 1, sizes=sizes_of(), **options)[0]
    assert expected[0].values["has_stepped"] == 1.0
    if expected[0].chosen:
        options["masks"] = [expected[0].chosen]
    for sizes, world_size in ((sizes_of(cp=2), 2), (sizes_of(1, 2, cp=2), 4)):
        for records in ranks(run_in_layout, world_size, sizes=sizes, **options):
            _assert_small(f"{values} {sizes}", compare_steps(records, expected, initial=case.initial))


# Keys and statistics between ranks


LAYOUT = PackedLayout((GroupSpan(0, 21, (4, 1, 6)), GroupSpan(32, 2, (3,))), num_padding=2)
"""The second prompt is shorter than the number of chunks; with four ranks one of them has no response."""


def attention_differences(context: RankContext, *, impl: str) -> list[float]:
    """Of this rank's rows: output, and gradients of q, k, v, against the whole layout on one rank; fp64."""
    from megatron_ktr.ops.key_exchange import KeyExchange
    from megatron_ktr.ops.prefix_attention import prefix_attention

    groups = context.init(sizes_of(cp=context.world_size))
    generator = torch.Generator().manual_seed(0)
    shapes = [(LAYOUT.num_tokens, n, 8) for n in (4, 2, 2, 4)]
    *whole, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    weight[-LAYOUT.num_padding :] = 0
    whole = [x.requires_grad_() for x in whole]
    expected = prefix_attention(*whole, plan=AttentionPlan.of_layout(LAYOUT), impl="torch")
    expected_gradients = torch.autograd.grad((expected * weight).sum(), whole)

    shard = shard_layout(LAYOUT, size=context.world_size, rank=context.rank, multiple=4)

    def mine(x: Tensor) -> Tensor:
        # Padding holds numbers that would be seen in any result they leaked into.
        padding = torch.full((shard.num_rows - len(shard.rows), *x.shape[1:]), 1e3, dtype=x.dtype)
        return torch.cat([x.detach()[shard.rows], padding])

    local = [mine(x).requires_grad_() for x in whole]
    exchange = KeyExchange(shard, group=groups.context)
    out = prefix_attention(*local, plan=shard.plan, impl=impl, exchange=exchange)
    gradients = torch.autograd.grad((out * mine(weight)).sum(), local)
    count = len(shard.rows)
    pairs = zip((out, *gradients), (expected, *expected_gradients), strict=True)
    differences = [float((ours[:count] - theirs[shard.rows]).abs().max()) if count else 0.0 for ours, theirs in pairs]
    return [*differences, *(float(g[count:].abs().sum()) for g in gradients)]


@pytest.mark.parametrize("impl", ["torch", "merged"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_attention_over_ranks_equals_attention_on_one(ranks: RankPool, world_size: int, impl: str) -> None:
    for found in ranks(attention_differences, world_size, impl=impl):
        assert max(found) < 1e-12  # fp64, a few dozen terms in another order; padding gets exactly nothing


def gathered_statistics(context: RankContext) -> tuple[list[list[float]], list[float]]:
    from megatron_ktr.ops.key_exchange import gather_statistics

    groups = context.init(sizes_of(cp=context.world_size))
    owner_R = torch.tensor([0, 1, 1, 0, 1, 1])
    mine_R = torch.arange(6.0)[owner_R == context.rank].requires_grad_()
    logprob_R, score_R = gather_statistics(mine_R, mine_R.detach() * 10, owner_R=owner_R, group=groups.context)
    assert not score_R.requires_grad
    (logprob_R * torch.arange(1.0, 7.0)).sum().backward()
    return [logprob_R.tolist(), score_R.tolist()], mine_R.grad.tolist()


def test_gathered_statistics_send_back_each_ranks_own_gradient_once(ranks: RankPool) -> None:
    (first, first_grad), (second, second_grad) = ranks(gathered_statistics, 2)
    assert first == second == [[0.0, 1, 2, 3, 4, 5], [0.0, 10, 20, 30, 40, 50]]
    assert first_grad == [1, 4] and second_grad == [2, 3, 5, 6]  # not times the number of ranks


# Memory


def kept_bytes(context: RankContext, *, hf_dir: Path, context_size: int, recompute: bool) -> int:
    """What autograd keeps of one forward of the language model on this rank, parameters left out."""
    from megatron_ktr.config import Config
    from megatron_ktr.config.sections import ParallelSection
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.model import build_model

    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    groups = context.init(sizes_of(cp=context_size))
    config = Config(parallel=ParallelSection(**(full if recompute else {})))
    (model,) = build_model(Qwen2_5_VLConfig.from_hf(hf_dir), ranks=groups, options=ModelOptions.of(config))
    model.train().vision.requires_grad_(False)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        # Detached: a graph that holds a tensor which holds the graph is never freed, nor the model and its groups.
        x = x.detach()
        if x.untyped_storage().data_ptr() not in known:
            storages[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(long_batch())
    assert out.requires_grad
    return sum(size for size, _ in storages.values())


def long_batch() -> PackedBatch:
    """1,536 tokens of prompt, four responses of 64: what four ranks can share without a remainder."""
    layout = PackedLayout((GroupSpan(0, 1536, (64,) * 4),))
    starts = [1536 + 64 * i for i in range(4)]
    rows = torch.tensor([row for start in starts for row in (1535, *range(start, start + 63))])
    return PackedBatch(
        view="hidden",
        layout=layout,
        token_ids_T=torch.arange(layout.num_tokens) % 150,
        position_ids_3T=torch.arange(layout.num_tokens).clamp(max=1600).expand(3, -1),
        predicting_rows_R=rows,
        target_ids_R=torch.zeros(256, dtype=torch.int64),
        response_R=torch.arange(4).repeat_interleave(64),
        group_R=torch.zeros(256, dtype=torch.int64),
        visual_rows=torch.empty(0, dtype=torch.int64),
        patches_SD=None,
        grid_thw_M3=torch.empty(0, 3, dtype=torch.int64),
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "full recomputation"])
def test_what_a_rank_keeps_for_backward_shrinks_with_the_number_of_ranks(
    ranks: RankPool, tmp_path: Path, recompute: bool
) -> None:
    save_tiny_hf(tmp_path)
    sizes = {
        size: max(ranks(kept_bytes, 4, hf_dir=tmp_path, context_size=size, recompute=recompute)) for size in (1, 2, 4)
    }
    for size in (2, 4):
        # Index tensors of the plan and the rounding of chunks are all that does not shrink.
        assert sizes[size] <= 1.03 * sizes[1] / size, sizes
