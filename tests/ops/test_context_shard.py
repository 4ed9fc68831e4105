"""Which rows a context-parallel rank keeps: the invariants of ``ops/context_shard.py``, on many layouts."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_ktr.batch.packing import pack_groups
from megatron_ktr.ops.context_shard import ContextShard, LocalRows, shard_layout
from megatron_ktr.ops.prefix_attention_plan import AttentionPlan
from megatron_ktr.types import GroupSpan, PackedLayout
from tests.support.groups import MEDIA, group_of, image, video

LONG = PackedLayout((GroupSpan(0, 4000, (900, 700, 500, 450, 400, 350, 300, 250)),))


def random_layout(seed: int) -> PackedLayout:
    """One to three groups; prompts shorter than the number of chunks among them, and responses of one token."""
    rng = random.Random(seed)
    groups, start = [], 0
    for _ in range(rng.randint(1, 3)):
        group = GroupSpan(
            start, rng.choice([1, 3, 17, 60]), tuple(rng.randint(1, 12) for _ in range(rng.randint(1, 5)))
        )
        groups.append(group)
        start = group.end
    return PackedLayout(tuple(groups), num_padding=rng.choice([0, 0, 3]))


CASES = [(seed, size, multiple) for seed in range(6) for size, multiple in ((1, 1), (2, 1), (2, 4), (3, 1), (4, 2))]


def shards_of(layout: PackedLayout, *, size: int, multiple: int = 1) -> list[ContextShard]:
    return [shard_layout(layout, size=size, rank=rank, multiple=multiple) for rank in range(size)]


def attended(plan: AttentionPlan, rows: list[int]) -> dict[int, set[int]]:
    """Row of the whole layout -> the keys it attends, by the definition of a segment."""
    found = {}
    for segment in plan.segments:
        prefix = set(range(segment.prefix.start, segment.prefix.stop))
        for i in range(segment.length):
            found[rows[segment.start + i]] = prefix | set(range(segment.own_start, segment.own_start + i + 1))
    return found


@pytest.mark.parametrize(("seed", "size", "multiple"), CASES)
def test_every_row_lies_on_one_rank_and_attends_what_it_attends_in_the_whole(
    seed: int, size: int, multiple: int
) -> None:
    layout = random_layout(seed)
    num_real = layout.num_tokens - layout.num_padding
    shards = shards_of(layout, size=size, multiple=multiple)
    assert sorted(row for shard in shards for row in shard.rows.tolist()) == list(range(num_real))
    (num_rows,) = {shard.num_rows for shard in shards}
    longest = max(len(shard.rows) for shard in shards)
    assert num_rows % multiple == 0 and longest <= num_rows < longest + multiple
    together: dict[int, set[int]] = {}
    for rank, shard in enumerate(shards):
        assert shard.plan.num_queries == num_rows and shard.plan.num_keys == num_real
        assert shard.plan.num_attending == len(shard.rows)
        together |= attended(shard.plan, shard.rows.tolist())
        # Where the gathered keys of a row are found again: all ranks agree.
        assert shard.place[shard.rows].tolist() == [rank * num_rows + i for i in range(len(shard.rows))]
        assert torch.equal(shard.place, shards[0].place)
    assert together == attended(AttentionPlan.of_layout(layout), list(range(num_real)))


@pytest.mark.parametrize("seed", range(6))
def test_owners_of_response_tokens_do_not_depend_on_the_prompts(seed: int) -> None:
    """The hidden view's prompts are shorter; its rows must meet the intact view's on the same rank."""
    layout = random_layout(seed)
    groups, start = [], 0
    for group in layout.groups:
        groups.append(GroupSpan(start, 1, group.response_lengths))
        start = groups[-1].end
    hidden = PackedLayout(tuple(groups))

    def owners(layout: PackedLayout) -> list[list[int]]:
        shard = shard_layout(layout, size=3, rank=0)
        return [
            (shard.place[group.start + group.prompt_length - 1 : group.end] // shard.num_rows).tolist()
            for group in layout.groups
        ]

    assert owners(hidden) == owners(layout)
    assert all(of_group[0] == 0 for of_group in owners(layout)), "a prompt's last row lies on rank 0"


def test_long_prompts_are_shared_evenly_in_rows_and_in_attention() -> None:
    whole = attended_keys(AttentionPlan.of_layout(LONG))
    for size in (2, 4):
        shards = shards_of(LONG, size=size)
        # Whole responses cannot be cut: up to half of the longest one is left over.
        assert shards[0].num_rows <= LONG.num_tokens / size + 450
        work = [attended_keys(shard.plan) for shard in shards]
        assert sum(work) == whole
        assert max(work) <= 1.25 * whole / size


def attended_keys(plan: AttentionPlan) -> int:
    """Pairs of query and key: what attention costs."""
    return sum(s.length * s.prefix_length + s.length * (s.length + 1) // 2 for s in plan.segments)


def test_example_of_the_docstring() -> None:
    first, second = shards_of(PackedLayout((GroupSpan(0, 5, (1, 2)),)), size=2)
    assert first.rows.tolist() == [0, 3, 4, 5] and second.rows.tolist() == [1, 2, 6, 7]
    assert first.num_rows == 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_local_rows_are_the_batchs_rows(size: int) -> None:
    """Tokens, positions, places of vision features and predicting rows, of a batch with media."""
    groups = [
        group_of(1, video(6, 4, 4), 2, 3, image(), responses=[[5, 6, 7], [8], [9, 10]]),
        group_of(4, 5, responses=[[6, 7, 8, 9]], problem_id="text"),
    ]
    batch = pack_groups(groups, view="intact", media=MEDIA, pad_to_multiple=8)
    found_visual: dict[int, int] = {}
    found_predicting: dict[int, int] = {}
    for shard in shards_of(batch.layout, size=size, multiple=2):
        local = shard.take(batch)
        num_real = len(shard.rows)
        assert len(local.token_ids_T) == local.position_ids_3T.shape[1] == shard.num_rows
        assert torch.equal(local.token_ids_T[:num_real], batch.token_ids_T[shard.rows])
        assert torch.equal(local.position_ids_3T[:, :num_real], batch.position_ids_3T[:, shard.rows])
        for row, index in zip(local.visual_rows.tolist(), local.visual_index.tolist(), strict=True):
            found_visual[index] = int(shard.rows[row])
        mine = (shard.owners(batch) == shard.rank).nonzero()[:, 0].tolist()
        for row, index in zip(local.predicting_rows_R.tolist(), mine, strict=True):
            found_predicting[index] = int(shard.rows[row])
    assert [found_visual[i] for i in range(len(found_visual))] == batch.visual_rows.tolist()
    assert [found_predicting[i] for i in range(len(found_predicting))] == batch.predicting_rows_R.tolist()


def test_without_context_parallelism_a_rank_keeps_the_batch_as_it_is() -> None:
    batch = pack_groups([group_of(1, 2, responses=[[3, 4]])], view="intact", media=MEDIA, pad_to_multiple=3)
    local = LocalRows.whole(batch)
    assert local.token_ids_T is batch.token_ids_T and local.predicting_rows_R is batch.predicting_rows_R
    assert local.visual_index is None


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="rank=2, size=2"):
        shard_layout(LONG, size=2, rank=2)
