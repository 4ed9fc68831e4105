"""GRPO (arXiv 2402.03300), as Video-R1 trains it: every response token carries the loss.

    loss = -mean_i (1 / |o_i|) sum_t [ratio_it * A_i - beta * k3_it]            i over all responses of the batch

Deviations:
1. A is exactly 0 where the rewards of a group differ by at most 1e-6 (``advantages.py``).
2. ``loss_aggregation: token`` averages over the tokens of the global batch instead (DAPO, arXiv 2503.14476).
3. The log-ratio of the KL term is clamped to [-10, 10]; a token that has become very improbable would overflow exp.
4. The policy-gradient term can be weighted to correct for differences between the sampler's policy and the trainer's
   (``importance.py``); off by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.config.words import LOSS_AGGREGATIONS, LossAggregation
from megatron_ktr.objectives.advantages import LengthBonus, group_advantages, response_rewards
from megatron_ktr.objectives.base import (
    Objective,
    count_by_response,
    token_weights,
    union_of,
)
from megatron_ktr.objectives.importance import ImportanceCorrection
from megatron_ktr.objectives.loss import policy_gradient_loss
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedBatch, RolloutGroup, TokenScores, TokenStreams

NO_KEY_TOKENS = "responses_without_key_tokens"
"""Metric: share of responses without key tokens. It is counted only with ``original_compat``."""


@dataclass(frozen=True)
class GRPO(Objective):
    """The base of every policy-gradient algorithm here. Given the key tokens, it computes advantages, token weights and
    the loss; without key tokens it is GRPO."""

    name = "grpo"
    kl_beta: float = 0.04
    clip_low: float = 0.2
    clip_high: float = 0.2
    loss_aggregation: LossAggregation = "sequence"
    length_bonus: LengthBonus | None = None
    original_compat: bool = False
    """Reproduces two traits of the authors' release; matters only with key tokens. First, the logged length and the
    length bonus count key tokens alone. Second, a response without key tokens divides 0 by 0, so that the loss is NaN.
    The step is then skipped (``reason_to_skip``), because it would turn every weight into NaN."""
    importance: ImportanceCorrection = ImportanceCorrection()

    def __post_init__(self) -> None:
        if self.loss_aggregation not in LOSS_AGGREGATIONS:
            raise ValueError(f"loss_aggregation must be one of {LOSS_AGGREGATIONS}, got {self.loss_aggregation!r}")
        if self.kl_beta < 0 or self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(f"kl_beta, clip_low and clip_high must not be negative, got {self}")

    @property
    def needs_reference(self) -> bool:
        return self.kl_beta > 0

    def token_streams(
        self,
        batch: PackedBatch,
        scores: TokenScores,
        group_data: Sequence[RolloutGroup],
        *,
        num_responses_global: int,
        num_tokens_global: int | None = None,
        is_selected_R: Mapping[str, Tensor] | None = None,
    ) -> TokenStreams:
        """The streams of ``Objective.token_streams``. A token carries the loss if any signal selected it; without a
        selection every token does."""
        if num_responses_global < batch.num_responses:
            raise ValueError(f"num_responses_global {num_responses_global} < {batch.num_responses} of one micro-batch")
        selected = dict(is_selected_R or {})
        every_token_R = torch.ones_like(scores.policy_logprob_R, dtype=torch.bool)
        is_key_token_R = union_of(selected) if selected else every_token_R
        # The batch may have stayed on the host; the scores decide where the streams live.
        response_R = send(batch.response_R, is_key_token_R.device)
        lengths = None
        metrics = _selection_metrics(is_key_token_R, selected)
        if self.original_compat:
            counts = count_by_response(is_key_token_R, response_R, num_responses=batch.num_responses)
            lengths = [int(count) for count in counts.tolist()]
            metrics.add(NO_KEY_TOKENS, lengths.count(0), len(lengths))
        rewards = response_rewards(group_data, lengths=lengths, setting=self.length_bonus)
        advantages = torch.cat([group_advantages([sum(parts) for parts in group]) for group in rewards])
        advantage_R = send(advantages.to(torch.float32), response_R.device)[response_R]
        weight_R = token_weights(
            is_key_token_R,
            response_R,
            num_responses=batch.num_responses,
            num_responses_global=num_responses_global,
            num_tokens_global=num_tokens_global,
            aggregation=self.loss_aggregation,
            zero_division=self.original_compat,
        )
        if self.length_bonus is not None:
            bonuses = [bonus for group in rewards for _, bonus in group]
            metrics.add("reward/length_bonus", sum(bonuses), len(bonuses))
        lengths = lengths or [len(rollout.token_ids) for group in group_data for rollout in group.rollouts]
        metrics.add("response_length", sum(lengths), len(lengths))
        streams = TokenStreams(
            advantage_R=advantage_R,
            weight_R=weight_R,
            is_key_token_R=is_key_token_R,
            is_selected_R=selected,
            metrics=metrics,
        )
        return self.importance.correct(streams, scores, response_R=response_R, num_responses=batch.num_responses)

    def reason_to_skip(self, metrics: Metrics) -> str | None:
        number = round(metrics.sums.get(NO_KEY_TOKENS, 0))
        if not number:
            return None
        return f"{number} responses have no key token, for which original_compat divides 0 by 0"

    def loss(self, statistics: Any, streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Metrics]:
        return policy_gradient_loss(
            statistics.logprob_R,
            streams,
            scores=scores,
            kl_beta=self.kl_beta,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )


def build_grpo(section: ObjectiveSection, *, length_bonus: LengthBonus | None) -> GRPO:
    """GRPO with the settings of the objective section; other objectives build their ``base`` with it too."""
    return GRPO(
        kl_beta=section.kl_beta,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        loss_aggregation=section.loss_aggregation,
        length_bonus=length_bonus,
        original_compat=section.original_compat,
        importance=ImportanceCorrection(
            level=section.importance_sampling, cap=section.importance_cap, mask=section.importance_bounds
        ),
    )


def _selection_metrics(is_key_token_R: Tensor, is_selected_R: Mapping[str, Tensor]) -> Metrics:
    """Share of the response tokens that are key tokens, in all and by signal."""
    masks = {"key_token_ratio": is_key_token_R}
    masks |= {f"key_token_ratio/{signal}": mask_R for signal, mask_R in is_selected_R.items()}
    metrics = Metrics()
    counts = torch.stack([mask_R.sum() for mask_R in masks.values()])
    metrics.add_later(list(masks), counts, count=is_key_token_R.numel())
    return metrics


register(
    ObjectiveEntry(
        name=GRPO.name,
        title="GRPO",
        summary="the policy gradient of group-relative advantages, on every response token",
        build=build_grpo,
    )
)
