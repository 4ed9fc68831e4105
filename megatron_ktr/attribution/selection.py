"""Key tokens: the top share of each signal within a prompt's group, and the union over signals.

    threshold = quantile of the group's finite scores at 1 - ratio, linear interpolation, as torch.quantile
    selected  = score >= threshold

The quantile is taken over the response tokens of all G responses together, so that a response may have many key tokens
or none. All tokens tied at the threshold are selected. A group is degenerate if it has no finite scores or if they are
all equal. Its scores do not say which tokens matter, so none is selected (quantile and >= alone would select all).

``like_release`` (the objective's ``original_compat``) applies quantile and >= without these exceptions, as the release
of Video-KTR does: equal scores select all tokens, and +inf is selected. The threshold is the fp32 quantile of the
finite scores, rounded to the scores' dtype before the comparison, as torch does with a scalar. In bf16 this may round
the threshold down to a score just below, and all tokens with that score are then selected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def select_top_share(
    score_R: Tensor, group_R: Tensor, *, ratio: float, num_groups: int, like_release: bool = False
) -> Tensor:
    """bool [R]: True on tokens at or above their group's quantile at ``1 - ratio``.

    Args:
        score_R: fp32 or fp64; with ``like_release`` also bf16. Non-finite scores are left out of the quantile and are
            never selected; the exception is +inf with ``like_release``.
        group_R: int64 in 0 .. num_groups - 1, in any order.
        ratio: in (0, 1].
    """
    check_ratio(ratio)
    is_finite_R = score_R.isfinite()
    # bf16 cannot represent ranks among many tokens exactly; a rank in bf16 would be off by whole tokens.
    precise_R = score_R.float() if score_R.dtype == torch.bfloat16 else score_R
    threshold_P, is_degenerate_P = _thresholds(
        precise_R, group_R, is_finite_R, quantile=1 - ratio, num_groups=num_groups
    )
    is_above_R = score_R >= threshold_P.to(score_R.dtype)[group_R]
    if not like_release:
        return is_finite_R & is_above_R & ~is_degenerate_P[group_R]
    # A group without finite scores has no quantile and selects nothing; the release raises an exception there.
    return is_above_R & (_count(is_finite_R.to(torch.int64), group_R, num_groups) > 0)[group_R]


def select_key_tokens(
    score_R_by_signal: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    *,
    group_R: Tensor,
    num_groups: int,
    like_release: bool = False,
) -> dict[str, Tensor]:
    """Each signal's own selection, bool [R]; the key tokens are their union (``types.Selection.union``)."""
    if not score_R_by_signal:
        raise ValueError("select_key_tokens needs at least one signal")
    return {
        signal: select_top_share(
            score_R, group_R, ratio=ratios[signal], num_groups=num_groups, like_release=like_release
        )
        for signal, score_R in score_R_by_signal.items()
    }


def check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"selection_ratio must be above 0 and at most 1, got {ratio}")


def _thresholds(
    score_R: Tensor, group_R: Tensor, is_finite_R: Tensor, *, quantile: float, num_groups: int
) -> tuple[Tensor, Tensor]:
    """The threshold of each group, and whether the group is degenerate; both [num_groups].

    All groups are handled at once, without a loop over tokens or groups, and no data leaves the device. Two stable
    sorts order the tokens by (group, score), with non-finite scores at the end of each group. The interpolation repeats
    the arithmetic of torch.quantile, including that of the rank, in the scores' own precision.
    """
    by_score = score_R.masked_fill(~is_finite_R, float("inf")).argsort(stable=True)
    order = by_score[group_R[by_score].argsort(stable=True)]
    sorted_R = score_R[order]
    num_tokens_P = _count(torch.ones_like(group_R), group_R, num_groups)
    num_finite_P = _count(is_finite_R.to(torch.int64), group_R, num_groups)
    start_P = num_tokens_P.cumsum(0) - num_tokens_P

    last_P = (num_finite_P - 1).clamp(min=0)
    rank_P = torch.full((), quantile, dtype=score_R.dtype, device=score_R.device) * last_P
    below_P, above_P = rank_P.to(torch.int64), rank_P.ceil().to(torch.int64)
    # A group without tokens may start past the end. The clamp below keeps its index valid; its value is never used.
    end = max(len(sorted_R) - 1, 0)

    def at(place_P: Tensor) -> Tensor:
        return sorted_R[(start_P + place_P).clamp(max=end)]

    threshold_P = torch.lerp(at(below_P), at(above_P), rank_P - below_P)
    is_degenerate_P = (num_finite_P == 0) | (at(torch.zeros_like(last_P)) == at(last_P))
    return threshold_P, is_degenerate_P


def _count(values: Tensor, group_R: Tensor, num_groups: int) -> Tensor:
    return torch.zeros(num_groups, dtype=torch.int64, device=group_R.device).index_add_(0, group_R, values)
