"""Supervised fine-tuning: maximum likelihood of given responses, with the packing and log-prob op of the RL objectives.

    loss = -(1 / N) sum_t logp_t          N = tokens t of the global batch (loss_aggregation token)
    loss = -mean_i (1 / |o_i|) sum_t logp_t                                (loss_aggregation sequence)

Every response forms a group of its own. It is either one answer or a conversation from its first answer on; in a
conversation, only the assistant's tokens t carry the loss. In terms of ``TokenStreams`` these are key tokens with
advantage 1. The ratio of the policy gradient is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.config.objective_registry import ObjectiveEntry, register
from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.config.words import LossAggregation
from megatron_ktr.objectives.base import Objective
from megatron_ktr.objectives.denominators import token_weights
from megatron_ktr.objectives.policy_gradient import BuildContext
from megatron_ktr.sums import Metrics
from megatron_ktr.transfer import send
from megatron_ktr.types import BatchFacts, PackedBatch, ScoredBatch, Selection, TokenScores, TokenStreams


@dataclass(frozen=True)
class SupervisedFineTuning(Objective):
    """With ``loss_aggregation`` ``token`` every token weighs the same, with ``sequence`` every response does."""

    name = "sft"
    loss_aggregation: LossAggregation = "token"

    def num_loss_tokens(self, batch: PackedBatch, selection: Selection | None) -> int:
        return batch.target_ids_R.numel() if batch.is_trained_R is None else int(batch.is_trained_R.sum())

    def token_streams(
        self, item: ScoredBatch, facts: BatchFacts, *, selection: Selection | None = None
    ) -> TokenStreams:
        batch = item.batch
        is_key_token_R = torch.ones_like(item.scores.policy_logprob_R, dtype=torch.bool)
        if batch.is_trained_R is not None:
            is_key_token_R = send(batch.is_trained_R, is_key_token_R.device)
        weight_R = token_weights(
            is_key_token_R,
            item.response_R,
            num_responses=batch.num_responses,
            num_responses_global=facts.num_responses,
            num_tokens_global=facts.num_tokens,
            aggregation=self.loss_aggregation,
        )
        return TokenStreams(advantage_R=torch.ones_like(weight_R), weight_R=weight_R, is_key_token_R=is_key_token_R)

    def loss(self, statistics: Any, streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Metrics]:
        return -(streams.weight_R * statistics.logprob_R).sum(), Metrics()


def _build(section: ObjectiveSection, context: BuildContext) -> SupervisedFineTuning:
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
