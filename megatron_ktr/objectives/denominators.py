"""The weight of each token in the loss: the mask of key tokens, divided by the denominators of the global batch.

sequence   mask / (key tokens of the token's response * responses of the global batch)     GRPO (arXiv 2402.03300)
token      mask / tokens of the global batch that carry the loss                           DAPO (arXiv 2503.14476)
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ktr.config.words import LossAggregation


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
