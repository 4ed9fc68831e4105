"""The interface of an objective, and the token weights that all objectives share.

An objective declares which scores (log-probs, entropy, divergence) it needs. It turns them into per-token streams of
advantages and weights, from which its loss is computed (``loss.py`` for policy gradients). The trainer and the policy
know objectives by this class only.
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
    """An algorithm, from scores to loss.

    Implementations are frozen dataclasses without state. The defaults of this class describe the simplest case: a
    single pass, no reference model, and every response token carries the loss. Implementations override what differs.
    """

    name = ""
    views: frozenset[View] = frozenset()
    """Counterfactual views whose log-probs must be in the scores; never contains ``intact``."""
    needs_kl = False
    """Whether the scores must hold KL(intact || view) over the whole vocabulary for each of ``views``."""
    needs_divergence = False
    """Whether the scores must hold the divergence between the responses of a group."""
    needs_divergence_gradient = False
    """Whether the gradient of the loss also flows through that divergence."""
    needs_reference = False
    """Whether the frozen reference model's log-probs must be in the scores (KL weight above 0)."""
    needs_selection_first = False
    """Whether ``num_tokens_global`` counts *key* tokens only. In that case key tokens must be selected
    (``select_tokens``) in every micro-batch of every replica before the first forward of the update."""
    learns_from_rewards = True
    """Whether the gradient comes from differences of reward, so that a group of equal rewards has none except for the
    KL term; False for supervised objectives."""

    def selects_before_update(self, num_updates: int) -> bool:
        """Whether key tokens are chosen in a separate pass without gradient, before the update.

        ``num_updates`` is the number of optimizer steps on the same responses. With two or more, all of them use the
        selection and the old policy's log-probs of the first, which must therefore be computed before any step.
        """
        return self.needs_selection_first or num_updates > 1

    def select_tokens(
        self, batch: PackedBatch, scores: TokenScores, group_data: Sequence[RolloutGroup]
    ) -> dict[str, Tensor]:
        """The tokens that each signal selects, as a bool [R] mask by signal. Empty if the objective does not select,
        so that every response token carries the loss."""
        return {}

    def num_loss_tokens(self, batch: PackedBatch, is_selected_R: Mapping[str, Tensor]) -> int:
        """The number of tokens of the batch that carry the loss, given the result of ``select_tokens``.

        Pipeline stages that do not score pass an empty result; an objective that selects then answers 0.
        """
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
            batch: the intact view, on any device. The streams are created on the device of the scores.
            group_data: the groups packed in ``batch``, in order, with rewards.
            num_responses_global: number of responses of the update, over all micro-batches and replicas.
            num_tokens_global: number of tokens that carry the loss, over all micro-batches and replicas; needed for
                token aggregation.
            is_selected_R: a selection made earlier, used unchanged (several updates per rollout; proofs).
        """

    def reason_to_skip(self, metrics: Metrics) -> str | None:
        """Why an update whose loss is not finite may be skipped; None if nothing explains it and the run must stop.

        ``metrics`` are those of the update, reduced over all ranks.
        """
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
    """``weight_R`` of ``TokenStreams``: one number per token, fp32 [R], that contains the mask and every denominator.

    Aggregation ``sequence`` is GRPO's mean over responses of means over tokens: mask / (key tokens of the token's
    response * responses of the global batch). Aggregation ``token`` is DAPO's mean: mask / tokens of the global batch.
    A response without key tokens adds zero. With ``zero_division`` the weights of all its tokens are 0 / 0 = NaN
    instead, and so is the loss.
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
