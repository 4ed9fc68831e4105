"""The weight of each token in the loss: the mask of key tokens, divided by the denominators of the global batch.

sequence   mask / (key tokens of the token's response * responses of the global batch)     GRPO (arXiv 2402.03300)
token      mask / tokens of the global batch that carry the loss                           DAPO (arXiv 2503.14476)
constant   mask / (responses of the global batch * L)                                      Dr. GRPO (arXiv 2503.20783)

With ``masked_denominator: all`` the counts of key tokens are counts of all response tokens. A key token then weighs as
much as it would if every token carried the loss (as in TRL and in the release of VPPO); otherwise it weighs the more,
the fewer there are (as in Video-KTR).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.words import LOSS_AGGREGATIONS, LossAggregation, TokenSet
from megatron_ktr.types import BatchFacts, ScoredBatch


@dataclass(frozen=True)
class LossMean:
    """The mean that a loss takes over tokens and responses."""

    aggregation: LossAggregation = "sequence"
    constant: int | None = None
    """The L of aggregation ``constant``, in tokens."""
    counted: TokenSet = "key"
    """The tokens that are counted in the denominators."""

    def __post_init__(self) -> None:
        if self.aggregation not in LOSS_AGGREGATIONS:
            raise ValueError(f"loss_aggregation must be one of {LOSS_AGGREGATIONS}, got {self.aggregation!r}")
        if self.aggregation == "constant" and self.constant is None:
            raise ValueError("loss_aggregation 'constant' needs loss_constant, a number of tokens")

    @property
    def counts_key_tokens(self) -> bool:
        """Whether a denominator is the number of key tokens of the global batch."""
        return self.aggregation == "token" and self.counted == "key"

    def weights(self, is_key_R: Tensor, item: ScoredBatch, facts: BatchFacts, *, zero_division: bool = False) -> Tensor:
        """``TokenStreams.weight_R``: fp32 [R], 0 on tokens that ``is_key_R`` leaves out."""
        if self.aggregation == "constant":
            return is_key_R.to(torch.float32) / (facts.num_responses * (self.constant or 1))
        is_counted_R = is_key_R if self.counted == "key" else torch.ones_like(is_key_R)
        weight_R = token_weights(
            is_counted_R,
            item.response_R,
            num_responses=item.batch.num_responses,
            num_responses_global=facts.num_responses,
            num_tokens_global=facts.num_tokens,
            aggregation=self.aggregation,
            zero_division=zero_division,
        )
        return weight_R if self.counted == "key" else weight_R * is_key_R

    def all_weights(self, item: ScoredBatch, facts: BatchFacts) -> Tensor:
        """``TokenStreams.all_weight_R``: the weights if every response token carried the loss, fp32 [R]."""
        every_R = torch.ones_like(item.scores.policy_logprob_R, dtype=torch.bool)
        return self.weights(every_R, item, dataclasses.replace(facts, num_tokens=facts.num_response_tokens))


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

    Aggregation ``sequence`` is GRPO's mean over responses of means over tokens, ``token`` is DAPO's mean. A response
    without key tokens adds zero. With ``zero_division`` the weights of all its tokens are 0 / 0 = NaN instead, and so
    is the loss.
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
