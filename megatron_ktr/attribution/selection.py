"""Key tokens of one signal: the tokens of a scope (``scopes.py``) with the highest scores, by one of two rules.

``quantile``, the rule of Video-KTR:

    threshold = quantile of the scope's finite scores at 1 - ratio, linear interpolation, as torch.quantile
    selected  = score >= threshold

All tokens tied at the threshold are selected.

``rank`` selects exactly k = ceil(ratio n) of the n finite scores of a scope, or k = count; of tokens with equal scores
it takes those that stand first.

In the scope of a prompt's group a response may have many key tokens or none. A scope is degenerate if it has no finite
scores or if they are all equal. Its scores do not say which tokens matter, so none is selected (quantile and >= alone
would select all).

``like_release`` (the objective's ``original_compat``) applies quantile and >= without these exceptions, as the release
of Video-KTR does: equal scores select all tokens, and +inf is selected. The threshold is the fp32 quantile of the
finite scores, rounded to the scores' dtype before the comparison, as torch does with a scalar. In bf16 this may round
the threshold down to a score just below, and all tokens with that score are then selected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ktr.attribution.scopes import count_in_scopes, sort_in_scopes

RANK_TOLERANCE = 1e-9
"""In fp64 a product such as 0.7 * 10 is 7.000000000000001, whose ceiling would be one token too many."""


def select_top_share(
    score_R: Tensor, scope_R: Tensor, *, ratio: float, num_scopes: int, like_release: bool = False
) -> Tensor:
    """bool [R]: True on tokens at or above their scope's quantile at ``1 - ratio``.

    Args:
        score_R: fp32 or fp64; with ``like_release`` also bf16. Non-finite scores are left out of the quantile and are
            never selected; the exception is +inf with ``like_release``.
        scope_R: int64 in 0 .. num_scopes - 1, in any order.
        ratio: in (0, 1].
    """
    check_ratio(ratio)
    is_finite_R = score_R.isfinite()
    # bf16 cannot represent ranks among many tokens exactly; a rank in bf16 would be off by whole tokens.
    precise_R = score_R.float() if score_R.dtype == torch.bfloat16 else score_R
    threshold_P, is_degenerate_P = thresholds(
        precise_R, scope_R, is_finite_R, quantile=1 - ratio, num_scopes=num_scopes
    )
    is_above_R = score_R >= threshold_P.to(score_R.dtype)[scope_R]
    if not like_release:
        return is_finite_R & is_above_R & ~is_degenerate_P[scope_R]
    # A scope without finite scores has no quantile and selects nothing; the release raises an exception there.
    return is_above_R & (count_in_scopes(is_finite_R.to(torch.int64), scope_R, num_scopes) > 0)[scope_R]


def select_by_rank(
    score_R: Tensor,
    scope_R: Tensor,
    *,
    num_scopes: int,
    ratio: float = 1.0,
    count: int | None = None,
) -> Tensor:
    """bool [R]: True on exactly ``count`` tokens of each scope, or on ceil(ratio n) of its n finite scores.

    A scope with fewer finite scores than ``count`` has them all selected; a degenerate one has none.
    """
    check_ratio(ratio)
    if count is not None and count < 1:
        raise ValueError(f"selection_count must be at least 1, got {count}")
    num_finite_P = count_in_scopes(score_R.isfinite().to(torch.int64), scope_R, num_scopes)
    if count is None:
        wanted_P = (num_finite_P.double() * ratio - RANK_TOLERANCE).ceil().to(torch.int64)
    else:
        wanted_P = torch.full_like(num_finite_P, count)
    return select_highest(score_R, scope_R, count_P=wanted_P * ~is_degenerate(score_R, scope_R, num_scopes=num_scopes))


def select_highest(score_R: Tensor, scope_R: Tensor, *, count_P: Tensor) -> Tensor:
    """bool [R]: the ``count_P`` highest finite scores of each scope (all of them if there are fewer). Of equal scores
    the tokens that stand first are taken; a degenerate scope is no exception."""
    order = sort_in_scopes(-score_R, scope_R, num_scopes=len(count_P))
    most_P = torch.minimum(count_P, order.num_finite_P)
    return order.unsorted(order.place_R < most_P[order.scope_R])


def is_degenerate(score_R: Tensor, scope_R: Tensor, *, num_scopes: int) -> Tensor:
    """bool [scopes]: whether the finite scores of a scope are all equal, or it has none."""
    is_finite_R = score_R.isfinite()

    def extreme(reduce: str, other: float) -> Tensor:
        values_P = score_R.new_full((num_scopes,), other)
        return values_P.scatter_reduce_(0, scope_R, score_R.masked_fill(~is_finite_R, other), reduce)

    # A scope without finite scores keeps +inf and -inf.
    return extreme("amin", float("inf")) >= extreme("amax", float("-inf"))


def check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"selection_ratio must be above 0 and at most 1, got {ratio}")


def thresholds(
    score_R: Tensor, scope_R: Tensor, is_finite_R: Tensor, *, quantile: float, num_scopes: int
) -> tuple[Tensor, Tensor]:
    """The threshold of each scope, and whether the scope is degenerate; both [scopes].

    The interpolation repeats the arithmetic of torch.quantile, including that of the rank, in the scores' own
    precision. Among more than 2^24 tokens ranks are not exact in fp32; they are then computed in fp64 (torch.quantile
    refuses so many).
    """
    order = sort_in_scopes(score_R, scope_R, num_scopes=num_scopes, is_finite_R=is_finite_R)
    sorted_R = score_R[order.order_R]
    last_P = (order.num_finite_P - 1).clamp(min=0)
    rank_dtype = torch.float64 if len(score_R) > EXACT_IN_FP32 else score_R.dtype
    rank_P = torch.full((), quantile, dtype=rank_dtype, device=score_R.device) * last_P
    below_P, above_P = rank_P.to(torch.int64), rank_P.ceil().to(torch.int64)
    # A scope without tokens may start past the end. The clamp below keeps its index valid; its value is never used.
    end = max(len(sorted_R) - 1, 0)

    def at(place_P: Tensor) -> Tensor:
        return sorted_R[(order.start_P + place_P).clamp(max=end)]

    threshold_P = torch.lerp(at(below_P), at(above_P), (rank_P - below_P).to(score_R.dtype))
    is_degenerate_P = (order.num_finite_P == 0) | (at(torch.zeros_like(last_P)) == at(last_P))
    return threshold_P, is_degenerate_P


EXACT_IN_FP32 = 2**24
