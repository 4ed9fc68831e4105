"""Supervised fine-tuning: maximum likelihood of given responses, with the packing and log-prob op of the RL objectives.

    loss = -(1 / N) sum_t logp_t          N = tokens t of the global batch (loss_aggregation token)
    loss = -mean_i (1 / |o_i|) sum_t logp_t                                (loss_aggregation sequence)

Every response forms a group of its own. It is either one answer or a conversation from its first answer on; in a
conversation, only the assistant's tokens t carry the loss. In terms of ``TokenStreams`` these are key tokens with
advantage 1. The ratio of the policy gradient is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.config.words import LossAggregation
from megatron_ktr.objectives.advantages import LengthBonus
from megatron_ktr.objectives.base import Objective, token_weights
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send
from megatron_ktr.types import PackedBatch, RolloutGroup, TokenScores, TokenStreams


@dataclass(frozen=True)
class SupervisedFineTuning(Objective):
    """With ``loss_aggregation`` ``token`` every token weighs the same, with ``sequence`` every response does."""

    name = "sft"
    learns_from_rewards = False
    loss_aggregation: LossAggregation = "token"

    def num_loss_tokens(self, batch: PackedBatch, is_selected_R: Mapping[str, Tensor]) -> int:
        return batch.target_ids_R.numel() if batch.is_trained_R is None else int(batch.is_trained_R.sum())

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
        is_key_token_R = torch.ones_like(scores.policy_logprob_R, dtype=torch.bool)
        if batch.is_trained_R is not None:
            is_key_token_R = send(batch.is_trained_R, is_key_token_R.device)
        weight_R = token_weights(
            is_key_token_R,
            send(batch.response_R, is_key_token_R.device),
            num_responses=batch.num_responses,
            num_responses_global=num_responses_global,
            num_tokens_global=num_tokens_global,
            aggregation=self.loss_aggregation,
        )
        return TokenStreams(advantage_R=torch.ones_like(weight_R), weight_R=weight_R, is_key_token_R=is_key_token_R)

    def loss(self, statistics: Any, streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Metrics]:
        return -(streams.weight_R * statistics.logprob_R).sum(), Metrics()


def _build(section: ObjectiveSection, *, length_bonus: LengthBonus | None) -> SupervisedFineTuning:
    return SupervisedFineTuning(loss_aggregation=section.loss_aggregation)


register(
    ObjectiveEntry(
        name=SupervisedFineTuning.name,
        title="Supervised fine-tuning",
        summary="the likelihood of the responses in `data_path`",
        build=_build,
        is_supervised=True,
    )
)
