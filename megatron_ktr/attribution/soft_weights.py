"""Soft token weights: every token carries the loss, tokens with higher scores carry more of it.

    rank       w = 2 (p + 1) / (n + 1)                                     p = 0 .. n - 1: place among the n scores
    sigmoid    w = 1 + g (sigmoid(k (p / (n - 1) - 1/2)) - 1/2)            k = 20, g = 1.5: the release of Video-KTR
    softmax    w = n softmax(score / temperature)
    soft_mask  w = sigmoid(z - c), z = (score - mean) / (std + 1e-6)       c such that the mean of w is ``ratio``

The first three have mean one over the finite scores of a scope (``scopes.py``); ``soft_mask`` is the soft form of
VPPO's mask (arXiv 2510.09285, ablation) and has the mean of the mask that it replaces. Places count from the lowest
score, and tokens with equal scores share the mean of their weights.

A token whose score is not finite has the weight 1 (``ratio`` with ``soft_mask``): the signal says nothing about it.
The same holds for every token of a scope whose scores are all equal.

The release applies ``sigmoid`` to the ranks of one prompt's responses (``adaptive_weighting``); with it the paper's
ablation got 51.9, with the hard mask 53.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ktr.attribution.scopes import count_in_scopes, mean_over_ties, sort_in_scopes
from megatron_ktr.config.words import TOKEN_WEIGHTS, TokenWeights

SIGMOID_SLOPE, SIGMOID_RANGE = 20.0, 1.5
STD_FLOOR = 1e-6
BISECTIONS = 60
"""Each halves the interval that holds c. It is below 2^12 wide for a million tokens, so that 2^-48 is left of it."""


def soft_weights(
    score_R: Tensor,
    scope_R: Tensor,
    *,
    num_scopes: int,
    kind: TokenWeights,
    temperature: float = 1.0,
    ratio: float = 0.2,
) -> Tensor:
    """The weight of every token, fp32 [R]; computed in fp64.

    Args:
        score_R: the scores, of any floating dtype; a higher score means a larger weight.
        scope_R: int64 in 0 .. num_scopes - 1, in any order.
        kind: one of the four forms above.
        temperature: of ``softmax``, in the units of the scores.
        ratio: the mean weight of ``soft_mask``.
    """
    score_R = score_R.double()
    is_finite_R = score_R.isfinite()
    if kind in ("rank", "sigmoid"):
        found_R = _by_place(score_R, scope_R, num_scopes=num_scopes, kind=kind)
    elif kind == "softmax":
        found_R = _softmax(score_R / temperature, scope_R, num_scopes=num_scopes)
    elif kind == "soft_mask":
        found_R = _soft_mask(score_R, scope_R, num_scopes=num_scopes, ratio=ratio)
    else:
        raise ValueError(f"token_weights must be one of {TOKEN_WEIGHTS[1:]} for soft weights, got {kind!r}")
    neutral = ratio if kind == "soft_mask" else 1.0
    return torch.where(is_finite_R, found_R, torch.full_like(found_R, neutral)).float()


def _by_place(score_R: Tensor, scope_R: Tensor, *, num_scopes: int, kind: TokenWeights) -> Tensor:
    order = sort_in_scopes(score_R, scope_R, num_scopes=num_scopes)
    place_R, num_R = order.place_R.double(), order.num_finite_P[order.scope_R].double()
    if kind == "rank":
        weight_R = 2 * (place_R + 1) / (num_R + 1)
    else:
        middle_R = place_R / (num_R - 1).clamp(min=1) - 0.5
        # A scope of one token has its only place in the middle.
        middle_R = torch.where(num_R > 1, middle_R, torch.zeros_like(middle_R))
        weight_R = 1 + SIGMOID_RANGE * ((SIGMOID_SLOPE * middle_R).sigmoid() - 0.5)
    return order.unsorted(mean_over_ties(weight_R, score_R, order))


def _softmax(score_R: Tensor, scope_R: Tensor, *, num_scopes: int) -> Tensor:
    is_finite_R = score_R.isfinite()
    lowest_R = score_R.masked_fill(~is_finite_R, float("-inf"))
    largest_P = score_R.new_full((num_scopes,), float("-inf")).scatter_reduce_(0, scope_R, lowest_R, "amax")
    power_R = torch.where(is_finite_R, (score_R - largest_P[scope_R]).exp(), torch.zeros_like(score_R))
    total_P = count_in_scopes(power_R, scope_R, num_scopes)
    num_P = count_in_scopes(is_finite_R.double(), scope_R, num_scopes)
    return power_R * (num_P / total_P.clamp(min=1))[scope_R]


def _soft_mask(score_R: Tensor, scope_R: Tensor, *, num_scopes: int, ratio: float) -> Tensor:
    is_finite_R = score_R.isfinite()
    num_P = count_in_scopes(is_finite_R.double(), scope_R, num_scopes)

    def total(values_R: Tensor) -> Tensor:
        return count_in_scopes(values_R.masked_fill(~is_finite_R, 0.0), scope_R, num_scopes)

    centred_R = score_R - (total(score_R) / num_P.clamp(min=1))[scope_R]
    std_P = (total(centred_R**2) / (num_P - 1).clamp(min=1)).sqrt()
    z_R = centred_R / (std_P + STD_FLOOR)[scope_R]
    # The mean of w falls as c grows. |z| is at most sqrt(n), and no ratio of fp32 is beyond sigmoid(-104).
    high_P = num_P.sqrt() + 104
    low_P = -high_P
    for _ in range(BISECTIONS):
        middle_P = (low_P + high_P) / 2
        is_too_large_P = total((z_R - middle_P[scope_R]).sigmoid()) > ratio * num_P
        low_P, high_P = torch.where(is_too_large_P, middle_P, low_P), torch.where(is_too_large_P, high_P, middle_P)
    return (z_R - ((low_P + high_P) / 2)[scope_R]).sigmoid()
