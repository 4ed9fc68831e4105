"""Policy gradients as compositions of parts; with the default parts it is GRPO as Video-R1 trains it.

    loss = -sum_r weight_r [surrogate_r - sum_p p.weight * p_r]              summed over the global batch

    part         what it decides                                       folder
    -----------  ----------------------------------------------------  -------------------------------
    bonuses      rewards that depend on the other responses            ``bonuses/``
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ktr.attribution.key_tokens import KeyTokens, build_key_tokens
from megatron_ktr.attribution.noise_floor import SignalNoise
from megatron_ktr.config.sections import ObjectiveSection, RewardSection, RolloutSection
from megatron_ktr.config.words import LOSS_AGGREGATIONS, LossAggregation
from megatron_ktr.objectives.advantages import Advantage
from megatron_ktr.objectives.advantages.group import group_relative
from megatron_ktr.objectives.base import Gather, Objective
from megatron_ktr.objectives.bonuses import Bonus
from megatron_ktr.objectives.bonuses.length import LengthBonus
from megatron_ktr.objectives.denominators import count_by_response, token_weights
from megatron_ktr.objectives.importance import ImportanceCorrection
from megatron_ktr.objectives.loss import policy_gradient_loss
from megatron_ktr.objectives.penalties import Penalty
from megatron_ktr.objectives.penalties.kl import KL
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
    surrogate: Surrogate = Clipped()
    penalties: tuple[Penalty, ...] = (KL(0.04),)
    importance: ImportanceCorrection = ImportanceCorrection()
    original_compat: bool = False
    """Reproduces two traits of the authors' release; matters only with key tokens. First, the logged length and the
    length bonus count key tokens alone. Second, a response without key tokens divides 0 by 0, so that the loss is NaN.
    The step is then skipped (``reason_to_skip``), because it would turn every weight into NaN."""

    def __post_init__(self) -> None:
        if self.aggregation not in LOSS_AGGREGATIONS:
            raise ValueError(f"loss_aggregation must be one of {LOSS_AGGREGATIONS}, got {self.aggregation!r}")

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
        return any(penalty.needs_reference for penalty in self.penalties)

    @property
    def needs_selection_first(self) -> bool:
        return self.selection is not None and (self.aggregation == "token" or self.selection.needs_batch)

    def may_have_gradient(self, groups: Sequence[RolloutGroup]) -> bool:
        if self.penalties or self.bonuses:
            return True
        return any(len({rollout.reward for rollout in group.rollouts}) > 1 for group in groups)

    def select(
        self, items: Sequence[ScoredBatch], facts: BatchFacts, *, gather: Gather | None = None
    ) -> list[Selection | None]:
        if self.selection is None:
            return [None] * len(items)
        return list(self.selection.select(items, facts, gather=gather))

    def signal_noise(self, item: ScoredBatch, again: TokenScores) -> Mapping[str, SignalNoise]:
        return {} if self.selection is None else self.selection.noise(item, again)

    def num_loss_tokens(self, batch: PackedBatch, selection: Selection | None) -> int:
        if self.selection is None:
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
            selection = Selection(torch.ones_like(item.scores.policy_logprob_R, dtype=torch.bool))
        response_R = item.response_R
        metrics = _selection_metrics(selection)
        lengths = self._lengths(item, selection, metrics)
        rewards = self._rewards(item.groups, lengths, metrics)
        advantages = self.advantage(rewards, facts)
        advantage_R = send(advantages.to(torch.float32), response_R.device)[response_R]
        weight_R = token_weights(
            selection.is_key_R,
            response_R,
            num_responses=batch.num_responses,
            num_responses_global=facts.num_responses,
            num_tokens_global=facts.num_tokens,
            aggregation=self.aggregation,
            zero_division=self.original_compat,
        )
        if selection.weight_R is not None:
            weight_R = weight_R * selection.weight_R
        if selection.advantage_factor_R is not None:
            advantage_R = advantage_R * selection.advantage_factor_R
        metrics.add("response_length", sum(lengths), len(lengths))
        streams = TokenStreams(
            advantage_R=advantage_R,
            weight_R=weight_R,
            is_key_token_R=selection.is_key_R,
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
        is_pulled_R = streams.advantage_R != 0
        for penalty in self.penalties:
            is_pulled_R = is_pulled_R | penalty.is_pulling(scores)
        return ((streams.weight_R != 0) & is_pulled_R).any()

    def _lengths(self, item: ScoredBatch, selection: Selection, metrics: Metrics) -> list[int]:
        """The length of each response, in tokens; with ``original_compat`` the number of its key tokens."""
        if not self.original_compat:
            return [len(rollout.token_ids) for group in item.groups for rollout in group.rollouts]
        counts = count_by_response(selection.is_key_R, item.response_R, num_responses=item.batch.num_responses)
        lengths = [int(count) for count in counts.tolist()]
        metrics.add(NO_KEY_TOKENS, lengths.count(0), len(lengths))
        return lengths

    def _rewards(self, groups: Sequence[RolloutGroup], lengths: Sequence[int], metrics: Metrics) -> list[list[float]]:
        """The reward of each response by group, bonuses included. Their means become metrics."""
        remaining = iter(lengths)
        found: list[list[float]] = []
        paid: dict[str, list[float]] = {bonus.name: [] for bonus in self.bonuses}
        for group in groups:
            own = [next(remaining) for _ in group.rollouts]
            parts = [[rollout.reward for rollout in group.rollouts]]
            for bonus in self.bonuses:
                values = bonus.values(group, own)
                paid[bonus.name] += values
                parts.append(values)
            found.append([sum(of_response) for of_response in zip(*parts, strict=True)])
        for name, values in paid.items():
            metrics.add(f"reward/{name}", sum(values), len(values))
        return found


@dataclass(frozen=True)
class BuildContext:
    """What an objective may read besides its own section; None where a caller has no such section."""

    reward: RewardSection | None = None
    rollout: RolloutSection | None = None


def build_policy_gradient(section: ObjectiveSection, context: BuildContext, **parts: Any) -> PolicyGradient:
    """The composition that the options describe. ``parts`` are fields of ``PolicyGradient`` that no option chooses."""
    bonus = _length_bonus(context.reward)
    chosen: dict[str, Any] = dict(
        name=section.objective,
        bonuses=() if bonus is None else (bonus,),
        selection=build_key_tokens(section),
        aggregation=section.loss_aggregation,
        surrogate=Clipped(section.clip_low, section.clip_high),
        penalties=(KL(section.kl_beta),) if section.kl_beta else (),
        importance=ImportanceCorrection(
            level=section.importance_sampling, cap=section.importance_cap, mask=section.importance_bounds
        ),
        original_compat=section.original_compat,
    )
    return PolicyGradient(**{**chosen, **parts})


def _length_bonus(reward: RewardSection | None) -> LengthBonus | None:
    if reward is None or not reward.length_bonus:
        return None
    return LengthBonus(
        bonus=reward.length_bonus, min_length=reward.length_bonus_min, max_length=reward.length_bonus_max
    )


def _selection_metrics(selection: Selection) -> Metrics:
    """Share of the response tokens that are key tokens, in all and by signal, and the selection's own metrics."""
    masks = {"key_token_ratio": selection.is_key_R}
    masks |= {f"key_token_ratio/{signal}": mask_R for signal, mask_R in selection.by_signal.items()}
    metrics = Metrics()
    counts = torch.stack([mask_R.sum() for mask_R in masks.values()])
    metrics.add_later(list(masks), counts, count=selection.is_key_R.numel())
    metrics.merge(selection.metrics)
    return metrics
