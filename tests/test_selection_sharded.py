"""Key tokens chosen where the tokens of a group lie on several ranks: the unsharded choice, in few bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_ktr.attribution.selection import select_key_tokens, select_top_share
from tests.support.token_statistics import Traffic

NUM_GROUPS = 5
RATIOS = {"entropy": 0.2, "visual": 0.37, "temporal": 1.0}


@dataclass(frozen=True)
class Tokens:
    """Scores of five groups and the rank that holds each token; made from its seed, alike on every rank."""

    group_R: Tensor
    rank_R: Tensor
    scores: dict[str, Tensor]

    @classmethod
    def draw(cls, kind: str, *, num_ranks: int) -> Tokens:
        generator = torch.Generator().manual_seed(7)
        lengths = torch.tensor([31, 1, 12, 0, 58])  # one token, and none at all
        group_R = torch.arange(NUM_GROUPS).repeat_interleave(lengths)
        group_R = group_R[torch.randperm(len(group_R), generator=generator)]
        scores = {signal: torch.randn(len(group_R), generator=generator) for signal in RATIOS}
        if kind == "ties":
            scores = {signal: (2 * score_R).round() / 2 for signal, score_R in scores.items()}
        if kind == "not finite":
            for score_R in scores.values():
                score_R[torch.rand(len(score_R), generator=generator) < 0.3] = float("nan")
                score_R[torch.rand(len(score_R), generator=generator) < 0.1] = float("inf")
            scores["visual"][group_R == 2] = float("nan")
        if kind == "all equal":
            scores["entropy"][group_R == 4] = 0.25
        draw = torch.rand(len(group_R), generator=generator)
        rank_R = {
            "one rank has none": (draw * (num_ranks - 1)).long(),
            "one rank has all": torch.full_like(group_R, num_ranks - 1),
            "whole groups": group_R % num_ranks,
        }.get(kind, (draw.square() * num_ranks).long())  # uneven
        return cls(group_R, rank_R, scores)


def _select(context, *, kind: str):
    """This rank's part of the choice for each signal, of all, and of one signal alone; and the bytes it sent."""
    import torch.distributed as dist

    tokens = Tokens.draw(kind, num_ranks=context.world_size)
    is_mine_R = tokens.rank_R == context.rank
    group_R, options = tokens.group_R[is_mine_R], dict(num_groups=NUM_GROUPS, context_group=dist.group.WORLD)
    own = {signal: score_R[is_mine_R] for signal, score_R in tokens.scores.items()}
    with Traffic() as traffic:
        key_R, selected = select_key_tokens(own, RATIOS, group_R=group_R, **options)
    alone_R = select_top_share(own["visual"], group_R, ratio=RATIOS["visual"], **options)
    return key_R, selected, alone_R, traffic.sizes


KINDS = ("ragged", "one rank has none", "one rank has all", "whole groups", "ties", "not finite", "all equal")


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_choose_what_the_whole_chooses(ranks, kind: str, world_size: int) -> None:
    tokens = Tokens.draw(kind, num_ranks=world_size)
    whole_R, whole = select_key_tokens(tokens.scores, RATIOS, group_R=tokens.group_R, num_groups=NUM_GROUPS)
    assert 0 < int(whole["entropy"].sum()) < len(tokens.group_R)
    if kind == "all equal":
        assert not whole["entropy"][tokens.group_R == 4].any()
    for rank, (key_R, selected, alone_R, _) in enumerate(ranks(_select, world_size=world_size, kind=kind)):
        is_here_R = tokens.rank_R == rank
        assert torch.equal(key_R, whole_R[is_here_R])
        for signal, mask_R in whole.items():
            assert torch.equal(selected[signal], mask_R[is_here_R]), (rank, signal)
        assert torch.equal(alone_R, whole["visual"][is_here_R])


def test_the_split_is_uneven_and_changes_what_a_rank_alone_would_choose() -> None:
    """Otherwise the test above could not fail."""
    tokens = Tokens.draw("ragged", num_ranks=4)
    counts = torch.bincount(tokens.rank_R, minlength=4)
    assert len(set(counts.tolist())) == 4
    options = dict(ratio=0.2, num_groups=NUM_GROUPS)
    whole_R = select_top_share(tokens.scores["entropy"], tokens.group_R, **options)
    here = tokens.rank_R == 0
    alone_R = select_top_share(tokens.scores["entropy"][here], tokens.group_R[here], **options)
    assert not torch.equal(alone_R, whole_R[here])


def test_a_float_for_each_token_and_signal_travels(ranks) -> None:
    tokens = Tokens.draw("ragged", num_ranks=4)
    most = int(torch.bincount(tokens.rank_R, minlength=4).max())
    for *_, sizes in ranks(_select, world_size=4, kind="ragged"):
        assert sizes == [NUM_GROUPS * 8, len(RATIOS) * most * 4], "counts; then scores, padded to the fullest rank"


def _select_nothing(context):
    import torch.distributed as dist

    no_scores_R, no_groups_R = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return select_top_share(no_scores_R, no_groups_R, ratio=0.2, num_groups=3, context_group=dist.group.WORLD)


def test_no_token_anywhere_selects_none(ranks) -> None:
    assert [mask_R.shape for mask_R in ranks(_select_nothing, world_size=2)] == [(0,), (0,)]
