"""TW-GRPO (arXiv 2505.24718): GRPO whose tokens weigh more where the responses of a group disagree.

    loss = -(1 / N) sum_i sum_t w_t [ratio_it * A_i - beta * k3_it]           N = response tokens of the global batch
    w_t  = 1 + (alpha - 1) (D_t - min D) / (max D - min D + 1e-8)             min and max over the group's positions
    D_t  = divergence of the G next-token distributions at position t         ``ops/group_divergence.py``

All responses of a group share w_t at position t. w is between 1 and alpha. If the divergence is the same at all
positions of a group, w is 1 there. N is the number of tokens, not the sum of their weights. The paper's soft
multi-choice reward is ``soft_choice`` (``rewards/``).

Deviations from the authors' code:
1. N counts the tokens of the whole global batch, over micro-batches and replicas; theirs counts the responses of one
   prompt at a time.
2. With several updates per rollout, all of them use the weights w of the first, just as they use its old policy.
3. w_t is a constant here. Theirs is not detached, so that the gradient also flows through D_t, its minimum and its
   maximum. ``has_weight_gradient`` restores that; it changes the gradient by 2% of its norm (cosine 0.9997).
4. The log-ratio of the KL term is clamped to 10, as everywhere in this package; theirs to 11.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.config.sections import ObjectiveSection, RolloutSection
from megatron_ktr.objectives.policy_gradient import BuildContext, PolicyGradient, build_policy_gradient
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send
from megatron_ktr.types import BatchFacts, ScoredBatch, TokenStreams

SPREAD_FLOOR = 1e-8
"""Added to the denominator max D - min D, in nats."""


@dataclass(frozen=True)
class PositionWeights:
    """The weight w of each position, as a part of ``PolicyGradient``."""

    alpha: float = 1.7
    """Weight of the position with the largest divergence, at least 1."""
    has_weight_gradient: bool = False
    """Whether the gradient of the loss also flows through w."""

    needs_divergence = True

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise ValueError(f"tw_alpha must be at least 1, got {self.alpha}")

    @property
    def needs_divergence_gradient(self) -> bool:
        return self.has_weight_gradient

    def shape(self, streams: TokenStreams, item: ScoredBatch, facts: BatchFacts) -> TokenStreams:
        """``streams`` with ``weight_R`` multiplied by w. The scores must contain the divergence."""
        divergence_R = item.scores.divergence_R
        if divergence_R is None:
            raise ValueError("tw_grpo needs TokenScores.divergence_R, which was not computed")
        if not self.has_weight_gradient:
            divergence_R = divergence_R.detach()
        factor_R = position_weights(
            divergence_R,
            send(item.batch.group_R, divergence_R.device),
            num_groups=item.num_groups,
            alpha=self.alpha,
        )
        metrics = Metrics()
        metrics.merge(streams.metrics)
        totals = torch.stack([divergence_R.sum(), factor_R.sum()])
        metrics.add_later(["group_divergence", "token_weight"], totals, count=len(factor_R))
        weight_R = streams.weight_R * factor_R.to(streams.weight_R.dtype)
        return dataclasses.replace(streams, weight_R=weight_R, metrics=metrics)


def position_weights(divergence_R: Tensor, group_R: Tensor, *, num_groups: int, alpha: float) -> Tensor:
    """The weight w of every token, [R]; ``group_R`` is int64 in 0 .. num_groups - 1.

    Minimum and maximum are taken over the tokens of a group. They equal those over its positions, because the longest
    response has a token at every position.
    """

    def extreme(reduce: str) -> Tensor:
        of_group_P = divergence_R.new_zeros(num_groups)
        return of_group_P.scatter_reduce_(0, group_R, divergence_R, reduce, include_self=False)[group_R]

    least_R = extreme("amin")
    return 1 + (alpha - 1) * (divergence_R - least_R) / (extreme("amax") - least_R + SPREAD_FLOOR)


def _build(section: ObjectiveSection, context: BuildContext) -> PolicyGradient:
    if section.loss_aggregation != "token":
        raise ValueError(f"loss_aggregation must be 'token', got {section.loss_aggregation!r}")
    weights = PositionWeights(alpha=section.tw_alpha, has_weight_gradient=section.tw_weight_gradient)
    return build_policy_gradient(section, context, shapings=(weights,))


def _rules(section: ObjectiveSection, rollout: RolloutSection) -> Iterator[str]:
    if section.loss_aggregation != "token":
        yield "--objective tw_grpo averages over the tokens of the global batch: leave out --loss-aggregation"
    if section.tw_weight_gradient and section.num_updates > 1:
        yield (
            "--tw-weight-gradient needs --updates-per-rollout 1 and --mini-batches 1: later updates keep the weights "
            "of the first, which have no gradient there"
        )


register(
    ObjectiveEntry(
        name="tw_grpo",
        title="TW-GRPO",
        summary="the loss of GRPO, weighted by how much the responses of a group differ at a token's position",
        build=_build,
        defaults={"loss_aggregation": "token"},
        rules=(_rules,),
        own_options=("tw_alpha", "tw_weight_gradient"),
    )
)
