"""What an objective is, and the two pieces all policy-gradient objectives share: rewards and token weights.

An objective says which scores it needs and turns them into per-token streams; ``loss.py`` consumes the streams.
The trainer and the policy know objectives by this class only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.config.words import LossAggregation
from megatron_ktr.sums import Metrics
from megatron_ktr.types import PackedBatch, RolloutGroup, TokenScores, TokenStreams, View


class Objective(ABC):
    """An algorithm, from scores to loss. Implementations are frozen dataclasses without state and say only where they
    differ from what stands here: one pass, no reference model, every response token carries the loss."""

    name = ""
    views: frozenset[View] = frozenset()
    """Counterfactual views whose log-probs must be in the scores; never contains ``intact``."""
    needs_kl = False
    """Whether the scores must hold KL(intact || view) over the whole vocabulary for each of ``views``."""
    needs_divergence = False
    """Whether the scores must hold the divergence between the responses of a group."""
    needs_divergence_gradient = False
    """Whether the loss is differentiated through that divergence."""
    needs_reference = False
    """Whether the frozen reference model's log-probs must be in the scores (KL weight above 0)."""
    needs_selection_first = False
    """Whether ``num_tokens_global`` counts *key* tokens: then every micro-batch of every replica must be scored and
    selected (``select_tokens``) before the first forward of the update."""
    learns_from_rewards = True
    """Whether a group of equal rewards has no gradient (but for the KL term); False for supervised objectives."""

    def selects_before_update(self, num_updates: int) -> bool:
        """Whether key tokens are chosen in a pass of their own, before the update with its gradient.

        ``num_updates`` is the number of optimizer steps on the same responses. From two on, selection and old policy
        stay those of the first: they are found before any step.
        """
        return self.needs_selection_first or num_updates > 1

    def select_tokens(
        self, batch: PackedBatch, scores: TokenScores, group_data: Sequence[RolloutGroup]
    ) -> dict[str, Tensor]:
        """bool [R] by signal; empty where every response token carries the loss."""
        return {}

    def num_loss_tokens(self, batch: PackedBatch, is_selected_R: Mapping[str, Tensor]) -> int:
        """Tokens of the batch that carry the loss, given ``select_tokens``'s answer; without one (pipeline stages
        that do not score) an objective that selects answers 0."""
        return batch.target_ids_R.numel()

    @abstractmethod
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
        """Advantage, weight and mask of every response token.

        Args:
            batch: the intact view, on any device; the streams live where the scores are.
            group_data: the groups packed in ``batch``, in order, with rewards.
            num_responses_global: responses of the update over all micro-batches and replicas.
            num_tokens_global: tokens that carry the loss over all of them; needed for token aggregation.
            is_selected_R: a selection made earlier, used as it is (several updates per rollout; proofs).
        """

    def reason_to_skip(self, metrics: Metrics) -> str | None:
        """Why the update with these metrics, reduced over all ranks, has no gradient to step along though its loss is
        not finite; None where nothing explains that, and the run must stop."""
        return None

    @abstractmethod
    def loss(self, statistics: Any, streams: TokenStreams, scores: TokenScores) -> tuple[Tensor, Metrics]:
        """Loss of the micro-batch (differentiable through ``statistics.logprob_R``) and its metrics."""


def token_weights(
    is_key_token_R: Tensor,
    response_R: Tensor,
    *,
    num_responses: int,
    num_responses_global: int,
    num_tokens_global: int | None,
    aggregation: LossAggregation,
    zero_division: bool = False,
) -> Tensor:
    """``weight_R`` of ``TokenStreams``: mask and every denominator in one number, fp32 [R].

    ``sequence``: mask / (key tokens of the token's response * responses of the global batch), GRPO's mean over
    responses of means over tokens; ``token``: mask / tokens of the global batch (DAPO). A response without key
    tokens adds zero; with ``zero_division`` it makes all its tokens' weights, and so the loss, NaN (0 / 0).
    """
    mask_R = is_key_token_R.to(torch.float32)
    if aggregation == "token":
        if num_tokens_global is None:
            raise ValueError("loss_aggregation 'token' needs num_tokens_global, the global batch's number of tokens")
        return mask_R / (num_tokens_global if zero_division else max(num_tokens_global, 1))
    num_key_tokens = count_by_response(is_key_token_R, response_R, num_responses=num_responses)
    if not zero_division:
        num_key_tokens = num_key_tokens.clamp(min=1)
    return mask_R / (num_key_tokens[response_R] * num_responses_global)


def count_by_response(is_counted_R: Tensor, response_R: Tensor, *, num_responses: int) -> Tensor:
    """Number of True tokens of each response, fp32 [responses of the batch]."""
    counts = torch.zeros(num_responses, dtype=torch.float32, device=response_R.device)
    return counts.index_add_(0, response_R, is_counted_R.to(torch.float32))


def union_of(is_selected_R: Mapping[str, Tensor]) -> Tensor:
    """bool [R]: True where any signal selected the token."""
    return torch.stack(list(is_selected_R.values())).any(dim=0)
