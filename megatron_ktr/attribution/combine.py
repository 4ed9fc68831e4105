"""From the scores of several signals to one choice of tokens, within given scopes (``scopes.py``).

    union         tokens that any signal selects (Video-KTR)
    intersection  tokens that every signal selects
    weighted      tokens that the sum over signals of weight x rank selects

For ``weighted`` every score is replaced by its rank within the scope, from 0 (lowest) to 1 (highest)
(``scopes.shares_of_rank``). The signals have different units and tails, so that a sum of scores would be a sum of
outliers. Where one of several signals says nothing about a token it counts as 1/2, the middle rank; where no signal
says anything the token has no score.

With soft weights (``soft_weights.py``) every token is chosen, and the one score per token, that of the only signal or
the weighted sum, decides how much it weighs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ktr.attribution.scopes import shares_of_rank
from megatron_ktr.attribution.selection import check_ratio, select_by_rank, select_top_share
from megatron_ktr.attribution.soft_weights import soft_weights
from megatron_ktr.config.words import Combine, SelectionRule, TokenWeights

WEIGHTED = "weighted"
"""The name under which the tokens of a weighted sum are reported."""
SUM_GRID = 2.0**36
"""Weighted sums are rounded to multiples of 1 / 2^36. Their rounding errors are smaller than that, and ranks of a
million tokens lie 2^16 times as far apart."""


@dataclass(frozen=True)
class Choice:
    """The tokens that the signals choose."""

    is_selected_R: Tensor
    """bool [R]"""
    by_signal: Mapping[str, Tensor] = field(default_factory=dict)
    """bool [R] by name: what each signal selects on its own. Empty with soft weights, which select every token."""
    weight_R: Tensor | None = None
    """fp32 [R] with soft weights; None: 1 on every selected token."""


@dataclass(frozen=True)
class ChoiceRules:
    """How scores choose tokens; the same for every scope."""

    ratio_of: Mapping[str, float]
    """The share of a scope's tokens that each signal selects; with ``weighted`` all values are the same."""
    count_of: Mapping[str, int] = field(default_factory=dict)
    """The number of tokens per scope that each signal selects, in place of a share; empty: shares."""
    rule: SelectionRule = "quantile"
    combine: Combine = "union"
    signal_weights: Mapping[str, float] = field(default_factory=dict)
    """The weight of each signal in ``weighted``; empty: 1 each."""
    token_weights: TokenWeights = "hard"
    temperature: float = 1.0
    least_of: Mapping[str, float] = field(default_factory=dict)
    """The smallest score that a signal selects (``min_shift``); empty: no limit."""
    like_release: bool = False
    """Do as the release of Video-KTR with degenerate scopes and infinite scores (``selection.py``)."""

    def __post_init__(self) -> None:
        if not self.ratio_of:
            raise ValueError("signals must name at least one signal, for tokens to be selected by")
        for ratio in self.ratio_of.values():
            check_ratio(ratio)
        if self.like_release and (self.count_of or self.rule != "quantile" or self.token_weights != "hard"):
            raise ValueError("original_compat selects by quantile, with a hard mask")
        if self.token_weights != "hard" and self.combine != WEIGHTED and len(self.ratio_of) > 1:
            raise ValueError("token_weights needs one score per token: one signal, or combine 'weighted'")
        if self.least_of and (self.token_weights != "hard" or self.combine == WEIGHTED):
            raise ValueError("a smallest score needs signals that each select tokens of their own")

    def choose(self, score_R_by_signal: Mapping[str, Tensor], scope_R: Tensor, *, num_scopes: int) -> Choice:
        """The chosen tokens; ``scope_R`` is int64 [R] in 0 .. num_scopes - 1."""
        if self.combine == WEIGHTED:
            score_R = self._weighted_sum(score_R_by_signal, scope_R, num_scopes=num_scopes)
            first = next(iter(score_R_by_signal))
            scored = {WEIGHTED: (score_R, first)}
        else:
            scored = {name: (score_R, name) for name, score_R in score_R_by_signal.items()}
        if self.token_weights != "hard":
            ((score_R, signal),) = scored.values()
            weight_R = soft_weights(
                score_R,
                scope_R,
                num_scopes=num_scopes,
                kind=self.token_weights,
                temperature=self.temperature,
                ratio=self.ratio_of[signal],
            )
            return Choice(torch.ones_like(weight_R, dtype=torch.bool), weight_R=weight_R)
        by_signal = {
            name: self._select(score_R, scope_R, signal, num_scopes=num_scopes)
            for name, (score_R, signal) in scored.items()
        }
        masks_SR = torch.stack(list(by_signal.values()))
        return Choice(masks_SR.all(dim=0) if self.combine == "intersection" else masks_SR.any(dim=0), by_signal)

    def _select(self, score_R: Tensor, scope_R: Tensor, signal: str, *, num_scopes: int) -> Tensor:
        count, ratio = self.count_of.get(signal), self.ratio_of[signal]
        if count is not None or self.rule == "rank":
            mask_R = select_by_rank(score_R, scope_R, num_scopes=num_scopes, ratio=ratio, count=count)
        else:
            mask_R = select_top_share(
                score_R, scope_R, ratio=ratio, num_scopes=num_scopes, like_release=self.like_release
            )
        return mask_R & (score_R >= self.least_of[signal]) if signal in self.least_of else mask_R

    def _weighted_sum(self, score_R_by_signal: Mapping[str, Tensor], scope_R: Tensor, *, num_scopes: int) -> Tensor:
        """fp64 [R]; NaN on tokens about which no signal says anything."""
        total_R = torch.zeros_like(scope_R, dtype=torch.float64)
        is_scored_R = torch.zeros_like(scope_R, dtype=torch.bool)
        for name, score_R in score_R_by_signal.items():
            share_R = shares_of_rank(score_R, scope_R, num_scopes=num_scopes)
            is_scored_R |= share_R.isfinite()
            total_R += self.signal_weights.get(name, 1.0) * share_R.nan_to_num(nan=0.5)
        # Ranks are on a grid, so that many sums are equal, and must be so here too: 0.1 + 0.6 is not 0.3 + 0.4.
        total_R = (total_R * SUM_GRID).round() / SUM_GRID
        return total_R.masked_fill(~is_scored_R, float("nan"))
