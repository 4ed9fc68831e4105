"""Key tokens: the top share of each signal within a prompt's group, and the union over signals.

    threshold = quantile of the group's finite scores at 1 - ratio, linear interpolation, as torch.quantile
    selected  = score >= threshold

The quantile runs over all response tokens of the G responses together, so a response may have many key tokens
or none. Ties at the threshold are all kept. A degenerate group, without finite scores or with all of them
equal, says nothing about which tokens matter and selects none (quantile and >= would select all).

Under context parallelism each rank holds the scores of some of a group's tokens. The scores are gathered, R floats a
signal over all ranks, and every rank finds the same thresholds from the same numbers: the selection is bit for bit the
unsharded one, however the tokens lie. Hidden states and group ids stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def select_top_share(
    score_R: Tensor, group_R: Tensor, *, ratio: float, num_groups: int, context_group: dist.ProcessGroup | None = None
) -> Tensor:
    """bool [R]: True on tokens at or above their group's quantile at ``1 - ratio``.

    Args:
        score_R: floating point; non-finite scores are left out of the quantile and never selected.
        group_R: int64 in 0 .. num_groups - 1, in any order.
        ratio: in (0, 1].
        num_groups: of the whole micro-batch, equal on every rank of ``context_group``.
        context_group: ranks that hold the other tokens of the same groups, each its own R (possibly 0); None: this
            one holds them all. Every rank of it must call; the result is this rank's part.
    """
    _, selected = select_key_tokens(
        {"score": score_R}, {"score": ratio}, group_R=group_R, num_groups=num_groups, context_group=context_group
    )
    return selected["score"]


def select_key_tokens(
    score_R_by_signal: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    *,
    group_R: Tensor,
    num_groups: int,
    context_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The union over signals, bool [R], and each signal's own selection; arguments as for ``select_top_share``.

    With a ``context_group`` the signals must be the same, in the same order and dtype, on all of its ranks.
    """
    if not score_R_by_signal:
        raise ValueError("select_key_tokens needs at least one signal")
    for signal in score_R_by_signal:
        check_ratio(ratios[signal])
    pooled, pooled_group = dict(score_R_by_signal), group_R
    if context_group is not None:
        stacked_SR = torch.stack(list(score_R_by_signal.values()))
        gathered_SR, pooled_group = gather_scores(
            stacked_SR, group_R, num_groups=num_groups, context_group=context_group
        )
        pooled = dict(zip(score_R_by_signal, gathered_SR, strict=True))
    selected = {}
    for signal, score_R in score_R_by_signal.items():
        threshold_P, is_degenerate_P = _thresholds(
            pooled[signal], pooled_group, quantile=1 - ratios[signal], num_groups=num_groups
        )
        is_above_R = score_R.isfinite() & (score_R >= threshold_P[group_R])
        selected[signal] = is_above_R & ~is_degenerate_P[group_R]
    return torch.stack(list(selected.values())).any(dim=0), selected


def gather_scores(
    score_SR: Tensor, group_R: Tensor, *, num_groups: int, context_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Scores [S, R'] and groups [R'] of the tokens of all ranks, in another order and with NaN scores between them.

    Two all-gathers: ``num_groups`` counts, and S floats a token, padded to the fullest rank. Tokens travel ordered by
    group, so that the counts say which group each belongs to. The padded size is the one thing the host waits for.
    """
    num_ranks, num_signals = dist.get_world_size(context_group), score_SR.shape[0]
    count_P = _count(torch.ones_like(group_R), group_R, num_groups)
    count_CP = count_P.new_empty(num_ranks * num_groups)
    dist.all_gather_into_tensor(count_CP, count_P, group=context_group)
    count_CP = count_CP.view(num_ranks, num_groups)
    width = max(int(count_CP.sum(dim=1).amax()), 1)
    own_SW = score_SR.new_full((num_signals, width), float("nan"))
    own_SW[:, : score_SR.shape[1]] = score_SR[:, group_R.argsort(stable=True)]
    gathered = score_SR.new_empty(num_ranks * num_signals, width)
    dist.all_gather_into_tensor(gathered, own_SW, group=context_group)
    # Place w of a rank belongs to the first group whose tokens end after it; padding may go to any, it is NaN.
    place_CW = torch.arange(width, device=group_R.device).expand(num_ranks, -1).contiguous()
    group_CW = torch.searchsorted(count_CP.cumsum(dim=1), place_CW, right=True).clamp(max=max(num_groups - 1, 0))
    return gathered.view(num_ranks, num_signals, width).transpose(0, 1).flatten(1), group_CW.flatten()


def check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"selection_ratio must be above 0 and at most 1, got {ratio}")


def _thresholds(score_R: Tensor, group_R: Tensor, *, quantile: float, num_groups: int) -> tuple[Tensor, Tensor]:
    """Threshold and degeneracy of each group, [num_groups] both.

    All groups at once: two stable sorts order the tokens by (group, score) with the non-finite ones at each
    group's end, and the interpolation repeats torch.quantile's arithmetic, the rank included, in the scores'
    own precision. No loop over tokens or groups, and no data leaves the device.
    """
    is_finite_R = score_R.isfinite()
    by_score = score_R.masked_fill(~is_finite_R, float("inf")).argsort(stable=True)
    order = by_score[group_R[by_score].argsort(stable=True)]
    sorted_R = score_R[order]
    num_tokens_P = _count(torch.ones_like(group_R), group_R, num_groups)
    num_finite_P = _count(is_finite_R.to(torch.int64), group_R, num_groups)
    start_P = num_tokens_P.cumsum(0) - num_tokens_P

    last_P = (num_finite_P - 1).clamp(min=0)
    rank_P = torch.tensor(quantile, dtype=score_R.dtype, device=score_R.device) * last_P
    below_P, above_P = rank_P.to(torch.int64), rank_P.ceil().to(torch.int64)
    # A group without tokens may start past the end; its value is never read.
    end = max(len(sorted_R) - 1, 0)

    def at(place_P: Tensor) -> Tensor:
        return sorted_R[(start_P + place_P).clamp(max=end)]

    threshold_P = torch.lerp(at(below_P), at(above_P), rank_P - below_P)
    is_degenerate_P = (num_finite_P == 0) | (at(torch.zeros_like(last_P)) == at(last_P))
    return threshold_P, is_degenerate_P


def _count(values: Tensor, group_R: Tensor, num_groups: int) -> Tensor:
    return torch.zeros(num_groups, dtype=torch.int64, device=group_R.device).index_add_(0, group_R, values)
