"""Policy gradients as compositions of parts; with the default parts it is GRPO as Video-R1 trains it.

    loss = -sum_r weight_r [surrogate_r - sum_p p.weight * p_r]              summed over the global batch

    part         what it decides                                       folder
    -----------  ----------------------------------------------------  -------------------------------
    bonuses      rewards that depend on the other responses            ``bonuses/``
    reward KL    the KL to the reference model as part of the reward   ``penalties/kl_in_reward.py``
    advantage    how much better a response is than the others         ``advantages/``
    selection    which tokens carry the loss, and how much             ``attribution/``
    shapings     factors of tokens from their scores                   the objective's own file
    aggregation  the denominators of the loss                          ``denominators.py``
    surrogate    the term whose gradient is the policy gradient        ``surrogates/``
    penalties    KL to the reference model and the like                ``penalties/``
    importance   correction for the sampler's other policy             ``importance.py``

``build_policy_gradient`` makes a composition from the options alone. An objective's file names the parts that no option
chooses, and the defaults of those that options do choose (``config/objective_registry.py``).

Deviations from the published GRPO (arXiv 2402.03300):
1. A is exactly 0 where the rewards of a group differ by at most 1e-6 (``advantages/group.py``).
2. ``loss_aggregation: token`` averages over the tokens of the global batch instead (DAPO, arXiv 2503.14476).
3. The log-ratio of the KL term is clamped to [-10, 10]; a token that has become very improbable would overflow exp.
4. The policy-gradient term can be weighted to correct for differences between the sampler's policy and the trainer's
   (``importance.py``); off by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ktr.attribution.key_tokens import KeyTokens, build_key_tokens, overlaps
from megatron_ktr.attribution.noise_floor import SignalNoise
from megatron_ktr.config.loss_parts import ADVANTAGES, RATIOS, build_part
from megatron_ktr.config.sections import ObjectiveSection, RewardSection, RolloutSection
from megatron_ktr.config.words import LossAggregation, TokenSet
from megatron_ktr.objectives.advantages import Advantage, needs_batch
from megatron_ktr.objectives.advantages.group import group_relative
from megatron_ktr.objectives.base import Gather, Objective
from megatron_ktr.objectives.bonuses import Bonus
from megatron_ktr.objectives.bonuses.length import LengthBonus
from megatron_ktr.objectives.bonuses.temporal import TemporalBonus
from megatron_ktr.objectives.denominators import LossMean, count_by_response
from megatron_ktr.objectives.importance import ImportanceCorrection
from megatron_ktr.objectives.loss import policy_gradient_loss
from megatron_ktr.objectives.penalties import Penalty
from megatron_ktr.objectives.penalties.build import build_penalties, build_reward_kl
from megatron_ktr.objectives.penalties.kl import KL
from megatron_ktr.objectives.penalties.kl_in_reward import KLInReward
from megatron_ktr.objectives.response_rewards import (
    Rewards,
    lengths_of,
    less_kl,
    reward_rows,
    with_bonuses,
    with_rewards,
)
from megatron_ktr.objectives.surrogates import Surrogate
from megatron_ktr.objectives.surrogates.clipped import Clipped
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send
from megatron_ktr.types import (
    BatchFacts,
    PackedBatch,
    RolloutGroup,
    ScoredBatch,
    Selection,
    TokenScores,
    TokenStreams,
    View,
)

NO_KEY_TOKENS = "responses_without_key_tokens"
"""Metric: share of responses without key tokens. It is counted only with ``original_compat``."""


class Shaping(Protocol):
    """A factor of tokens that an algorithm computes from its scores, such as TW-GRPO's weights of positions."""

    needs_divergence: bool
    needs_divergence_gradient: bool

    def shape(self, streams: TokenStreams, item: ScoredBatch, facts: BatchFacts) -> TokenStreams:
        """``streams`` with the factor applied."""
        ...


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """An algorithm made of parts. A token carries the loss if ``selection`` keeps it; without one every token does."""

    name: str = "grpo"
    bonuses: tuple[Bonus, ...] = ()
    advantage: Advantage = group_relative
    selection: KeyTokens | None = None
    shapings: tuple[Shaping, ...] = ()
    aggregation: LossAggregation = "sequence"
    loss_constant: int | None = None
    """With aggregation ``constant``: the tokens that every response counts as."""
    masked_denominator: TokenSet = "key"
    """The tokens that the means of the loss divide by."""
    surrogate: Surrogate = Clipped()
    penalties: tuple[Penalty, ...] = (KL(0.04),)
    reward_kl: KLInReward | None = None
    measures_full_kl: bool = False
    """Whether the KL to the reference model over the whole vocabulary is a metric, even if nothing else needs it."""
    importance: ImportanceCorrection = ImportanceCorrection()
    original_compat: bool = False
    """Reproduces two traits of the authors' release; matters only with key tokens. First, the logged length and the
    length bonus count key tokens alone. Second, a response without key tokens divides 0 by 0, so that the loss is NaN.
    The step is then skipped (``reason_to_skip``), because it would turn every weight into NaN."""

    def __post_init__(self) -> None:
        _ = self.loss_mean  # refuses what it cannot be made of

    @property
    def loss_mean(self) -> LossMean:
        return LossMean(self.aggregation, self.loss_constant, self.masked_denominator)

    @property
    def views(self) -> frozenset[View]:
        return frozenset() if self.selection is None else self.selection.views

    @property
    def signals(self) -> tuple[str, ...]:
        return () if self.selection is None else tuple(signal.name for signal in self.selection.signals)

    @property
    def needs_kl(self) -> bool:
        return self.selection is not None and self.selection.needs_kl

    @property
    def needs_divergence(self) -> bool:
        return any(shaping.needs_divergence for shaping in self.shapings)

    @property
    def needs_divergence_gradient(self) -> bool:
        return any(shaping.needs_divergence_gradient for shaping in self.shapings)

    @property
    def needs_reference(self) -> bool:
        is_needed = self.reward_kl is not None or self.measures_full_kl
        return is_needed or any(penalty.needs_reference for penalty in self.penalties)

    @property
    def needs_reference_kl(self) -> bool:
        is_in_reward = self.reward_kl is not None and self.reward_kl.kind == "full"
        return is_in_reward or self.measures_full_kl or self.needs_reference_kl_gradient

    @property
    def needs_reference_kl_gradient(self) -> bool:
        return any(penalty.needs_reference_kl for penalty in self.penalties)

    @property
    def reaches_every_token(self) -> bool:
        return any(penalty.over == "all" for penalty in self.penalties)

    @property
    def needs_batch_rewards(self) -> bool:
        return needs_batch(self.advantage)

    @property
    def needs_selection_first(self) -> bool:
        if self.needs_batch_rewards and self.reward_kl is not None:
            return True  # the moments of the batch contain the KL of every response
        return self.selection is not None and (self.loss_mean.counts_key_tokens or self.selection.needs_batch)

    def may_have_gradient(self, groups: Sequence[RolloutGroup], facts: BatchFacts) -> bool:
        if self.penalties or self.bonuses or self.reward_kl is not None:
            return True
        if facts.rewards is not None:
            return len({reward for of_group in facts.rewards for reward in of_group}) > 1
        return any(len({rollout.reward for rollout in group.rollouts}) > 1 for group in groups)

    def select(
        self, items: Sequence[ScoredBatch], facts: BatchFacts, *, gather: Gather | None = None
    ) -> list[Selection | None]:
        found: list[Selection | None] = [None] * len(items)
        if self.selection is not None:
            found = list(self.selection.select(items, facts, gather=gather))
        if self.reward_kl is None:
            return found
        return [
            dataclasses.replace(one or _every_token(item), kl_of_response=self.reward_kl.of_responses(item))
            for one, item in zip(found, items, strict=True)
        ]

    def with_scores(
        self,
        facts: BatchFacts,
        items: Sequence[ScoredBatch],
        selections: Sequence[Selection | None],
        *,
        gather: Gather,
    ) -> BatchFacts:
        if not self.needs_batch_rewards or self.reward_kl is None:
            return facts
        rows = []
        for item, selection in zip(items, selections, strict=True):
            assert selection is not None and selection.kl_of_response is not None, "select() has just made it"
            kls = selection.kl_of_response.tolist()
            rewards = less_kl(self.rewards_of(item.groups), kls, weight=self.reward_kl.weight)
            rows.append(reward_rows(rewards, lengths_of(item.groups), device=selection.kl_of_response.device))
        return with_rewards(facts, gather(torch.cat(rows)))

    def signal_noise(self, item: ScoredBatch, again: TokenScores) -> Mapping[str, SignalNoise]:
        return {} if self.selection is None else self.selection.noise(item, again)

    def num_loss_tokens(self, batch: PackedBatch, selection: Selection | None) -> int:
        if self.selection is None or self.masked_denominator == "all":
            return batch.target_ids_R.numel()
        return 0 if selection is None else int(selection.is_key_R.sum())

    def token_streams(
        self, item: ScoredBatch, facts: BatchFacts, *, selection: Selection | None = None
    ) -> TokenStreams:
        batch = item.batch
        if facts.num_responses < batch.num_responses:
            raise ValueError(f"num_responses {facts.num_responses} < {batch.num_responses} of one micro-batch")
        if selection is None:
            (selection,) = self.select([item], facts)
        if selection is None:
            selection = _every_token(item)
        response_R = item.response_R
        metrics = _selection_metrics(selection)
        lengths = self._lengths(item, selection, metrics)
        rewards = with_bonuses(item.groups, lengths, bonuses=self.bonuses, metrics=metrics)
        if self.reward_kl is not None:
            rewards = self._with_kl(rewards, item, selection, metrics)
        advantages = self.advantage(rewards, facts)
        advantage_R = send(advantages.to(torch.float32), response_R.device)[response_R]
        weight_R = self.loss_mean.weights(selection.is_key_R, item, facts, zero_division=self.original_compat)
        if selection.weight_R is not None:
            weight_R = weight_R * selection.weight_R
        if selection.advantage_factor_R is not None:
            advantage_R = advantage_R * selection.advantage_factor_R
        metrics.add("response_length", sum(lengths), len(lengths))
        streams = TokenStreams(
            advantage_R=advantage_R,
            weight_R=weight_R,
            is_key_token_R=selection.is_key_R,
            all_weight_R=self.loss_mean.all_weights(item, facts) if self.reaches_every_token else None,
            is_selected_R=selection.by_signal,
            response_R=response_R,
            num_responses=batch.num_responses,
            metrics=metrics,
        )
        streams = self.importance.correct(
            streams, item.scores, response_R=response_R, num_responses=batch.num_responses
        )
        for shaping in self.shapings:
            streams = shaping.shape(streams, item, facts)
        return streams

    def reason_to_skip(self, metrics: Metrics) -> str | None:
        number = round(metrics.sums.get(NO_KEY_TOKENS, 0))
        if not number:
            return None
        return f"{number} responses have no key token, for which original_compat divides 0 by 0"

    def loss(self, statistics: Any, streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Metrics]:
        return policy_gradient_loss(statistics, streams, scores, surrogate=self.surrogate, penalties=self.penalties)

    def any_gradient(self, streams: TokenStreams, scores: TokenScores) -> Tensor:
        is_pulled_R = (streams.weight_R != 0) & (streams.advantage_R != 0)
        for penalty in self.penalties:
            weight_R = streams.weight_R if penalty.over == "key" else streams.all_weight_R
            assert weight_R is not None, "set for penalties over all tokens"
            is_pulled_R = is_pulled_R | ((weight_R != 0) & penalty.is_pulling(scores))
        return is_pulled_R.any()

    def rewards_of(self, groups: Sequence[RolloutGroup]) -> list[list[float]]:
        return with_bonuses(groups, lengths_of(groups), bonuses=self.bonuses, metrics=Metrics())

    def _with_kl(self, rewards: Rewards, item: ScoredBatch, selection: Selection, metrics: Metrics) -> Rewards:
        """``rewards`` less the weighted KL of each response. The means of both become metrics."""
        assert self.reward_kl is not None, "asked only where rewards contain the KL"
        found = selection.kl_of_response
        kls = (self.reward_kl.of_responses(item) if found is None else found).tolist()
        metrics.add("kl", sum(kls), sum(lengths_of(item.groups)))
        metrics.add("reward/kl", -self.reward_kl.weight * sum(kls), len(kls))
        return less_kl(rewards, kls, weight=self.reward_kl.weight)

    def _lengths(self, item: ScoredBatch, selection: Selection, metrics: Metrics) -> list[int]:
        """The length of each response, in tokens; with ``original_compat`` the number of its key tokens."""
        if not self.original_compat:
            return lengths_of(item.groups)
        counts = count_by_response(selection.is_key_R, item.response_R, num_responses=item.batch.num_responses)
        lengths = [int(count) for count in counts.tolist()]
        metrics.add(NO_KEY_TOKENS, lengths.count(0), len(lengths))
        return lengths


@dataclass(frozen=True)
class BuildContext:
    """What an objective may read besides its own section; None where a caller has no such section."""

    reward: RewardSection | None = None
    rollout: RolloutSection | None = None


def build_policy_gradient(section: ObjectiveSection, context: BuildContext, **parts: Any) -> PolicyGradient:
    """The composition that the options describe. ``parts`` are fields of ``PolicyGradient`` that no option chooses."""
    chosen: dict[str, Any] = dict(
        name=section.objective,
        bonuses=(*_temporal_bonus(context.rollout), *_length_bonus(context.reward)),
        advantage=build_part(ADVANTAGES, section.advantage, section),
        selection=build_key_tokens(section),
        aggregation=section.loss_aggregation,
        loss_constant=_loss_constant(section, context.rollout),
        masked_denominator=section.masked_denominator,
        surrogate=build_part(RATIOS, section.ratio, section),
        penalties=build_penalties(section),
        reward_kl=build_reward_kl(section),
        measures_full_kl=section.measure_full_kl,
        importance=ImportanceCorrection(
            level=section.importance_sampling, cap=section.importance_cap, mask=section.importance_bounds
        ),
        original_compat=section.original_compat,
    )
    return PolicyGradient(**{**chosen, **parts})


def _loss_constant(section: ObjectiveSection, rollout: RolloutSection | None) -> int | None:
    if section.loss_constant is not None or rollout is None:
        return section.loss_constant
    return rollout.max_response_length


def _temporal_bonus(rollout: RolloutSection | None) -> tuple[Bonus, ...]:
    if rollout is None or not rollout.temporal_bonus:
        return ()
    return (TemporalBonus(bonus=rollout.temporal_bonus, margin=rollout.temporal_margin),)


def _length_bonus(reward: RewardSection | None) -> tuple[Bonus, ...]:
    if reward is None or not reward.length_bonus:
        return ()
    return (
        LengthBonus(bonus=reward.length_bonus, min_length=reward.length_bonus_min, max_length=reward.length_bonus_max),
    )


def _every_token(item: ScoredBatch) -> Selection:
    return Selection(torch.ones_like(item.scores.policy_logprob_R, dtype=torch.bool))


def _selection_metrics(selection: Selection) -> Metrics:
    """Share of the response tokens that are key tokens, in all and by signal, how far signals agree, and the
    selection's own metrics."""
    masks = {"key_token_ratio": selection.is_key_R}
    masks |= {f"key_token_ratio/{signal}": mask_R for signal, mask_R in selection.by_signal.items()}
    metrics = Metrics()
    counts = torch.stack([mask_R.sum() for mask_R in masks.values()])
    metrics.add_later(list(masks), counts, count=selection.is_key_R.numel())
    metrics.merge(overlaps(selection.by_signal))
    metrics.merge(selection.metrics)
    return metrics
