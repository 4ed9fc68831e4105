"""Scopes: the sets of response tokens whose scores are compared with one another.

    response   the tokens of one response
    prompt     the tokens of all responses to one prompt
    batch      every response token of the global batch, over all micro-batches and replicas

A scope is given as ``scope_R``, int64 [R] in 0 .. num_scopes - 1, in any order of tokens. Everything here handles all
scopes at once, without a loop over tokens or scopes, and no number leaves the device.

Scores that are not finite take no part: they are sorted to the end of their scope and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScopeOrder:
    """The tokens sorted by scope, and within a scope by score, lowest first.

    Example: scores [3, 1, NaN, 2] in scopes [0, 0, 0, 1] give ``order_R`` [1, 0, 2, 3] and ``place_R`` [0, 1, 2, 0].
    """

    order_R: Tensor
    """int64 [R]: the token at each sorted place. Equal scores stay in the order in which the tokens were given."""
    scope_R: Tensor
    """int64 [R]: the scope of the token at each sorted place."""
    place_R: Tensor
    """int64 [R]: the place of that token within its scope, from 0."""
    start_P: Tensor
    """int64 [scopes]: the sorted place of the first token of each scope."""
    num_finite_P: Tensor
    """int64 [scopes]: how many scores of each scope are finite."""

    def unsorted(self, sorted_R: Tensor) -> Tensor:
        """Values that are in sorted order, in the order in which the tokens were given."""
        found_R = torch.empty_like(sorted_R)
        found_R[self.order_R] = sorted_R
        return found_R


def sort_in_scopes(
    score_R: Tensor, scope_R: Tensor, *, num_scopes: int, is_finite_R: Tensor | None = None
) -> ScopeOrder:
    """Sorts the tokens of every scope by score. Two stable sorts: by score, then by scope."""
    is_finite_R = score_R.isfinite() if is_finite_R is None else is_finite_R
    by_score_R = score_R.masked_fill(~is_finite_R, float("inf")).argsort(stable=True)
    order_R = by_score_R[scope_R[by_score_R].argsort(stable=True)]
    num_tokens_P = count_in_scopes(torch.ones_like(scope_R), scope_R, num_scopes)
    start_P = num_tokens_P.cumsum(0) - num_tokens_P
    sorted_scope_R = scope_R[order_R]
    return ScopeOrder(
        order_R=order_R,
        scope_R=sorted_scope_R,
        place_R=torch.arange(len(order_R), device=order_R.device) - start_P[sorted_scope_R],
        start_P=start_P,
        num_finite_P=count_in_scopes(is_finite_R.to(torch.int64), scope_R, num_scopes),
    )


def count_in_scopes(values_R: Tensor, scope_R: Tensor, num_scopes: int) -> Tensor:
    """The sum of ``values_R`` over each scope, in its dtype; [scopes]."""
    return torch.zeros(num_scopes, dtype=values_R.dtype, device=scope_R.device).index_add_(0, scope_R, values_R)


def mean_over_ties(values_R: Tensor, score_R: Tensor, order: ScopeOrder) -> Tensor:
    """Gives tokens of one scope with equal scores the mean of their values, so that the order in which they happen to
    stand decides nothing. ``values_R`` is fp64 in sorted order, and so is the result; ``score_R`` is as given."""
    sorted_R = score_R[order.order_R]
    is_first_R = torch.ones_like(sorted_R, dtype=torch.bool)
    is_first_R[1:] = (sorted_R[1:] != sorted_R[:-1]) | (order.scope_R[1:] != order.scope_R[:-1])
    run_R = is_first_R.to(torch.int64).cumsum(0) - 1
    # There are at most as many runs as tokens; the exact number is known on the device alone.
    total = count_in_scopes(values_R, run_R, len(run_R))
    count = count_in_scopes(torch.ones_like(values_R), run_R, len(run_R))
    return (total / count.clamp(min=1))[run_R]


def shares_of_rank(score_R: Tensor, scope_R: Tensor, *, num_scopes: int) -> Tensor:
    """Scores as ranks, fp64 [R]: 0 for the lowest of a scope, 1 for the highest, evenly spaced between them.

    Equal scores share the mean of their ranks, so that a scope whose scores are all equal has 1/2 everywhere. NaN where
    the score is not finite. Ranks of signals with different units (nats of entropy, differences of log-probs) can be
    added, and an outlier changes no rank but its own.

    Example: scores [7, -1, 3, 3] give [1, 0, 1/2, 1/2].
    """
    order = sort_in_scopes(score_R, scope_R, num_scopes=num_scopes)
    place_R = mean_over_ties(order.place_R.double(), score_R, order)
    last_R = (order.num_finite_P[order.scope_R] - 1).double()
    share_R = torch.where(last_R > 0, place_R / last_R.clamp(min=1), torch.full_like(place_R, 0.5))
    return order.unsorted(share_R).masked_fill(~score_R.isfinite(), float("nan"))
