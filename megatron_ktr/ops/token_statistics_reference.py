"""The formula that ``linear_token_statistics`` computes, with full logits and ordinary autograd, on one process.

For tests and for reading; it shares no line with the implementations. Memory: several R x V tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ktr.ops.token_statistics import TokenStatistics


def token_statistics_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    counterfactual_hidden_RD: Tensor | None = None,
) -> TokenStatistics:
    """log p = log_softmax(hidden @ weight^T / temperature), log q likewise from the counterfactual hidden rows;
    returns per row log p[target], -sum p log p, log q[target] and sum p (log p - log q).

    ``weight_VD`` is the whole vocabulary [V padded, D]; rows from ``vocab_size`` on are padding. The product is
    rounded to the inputs' dtype, as a linear layer does; what follows is at least fp32.
    """

    def logprobs(hidden_RD: Tensor) -> Tensor:
        logits_RV = F.linear(hidden_RD, weight_VD[:vocab_size])
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        return F.log_softmax(logits_RV.to(dtype) / temperature, dim=-1)

    logprobs_RV = logprobs(hidden_RD)
    statistics = {
        "logprob_R": logprobs_RV.gather(1, target_R[:, None]).squeeze(1),
        "entropy_R": -(logprobs_RV.exp() * logprobs_RV).sum(dim=-1),
    }
    if counterfactual_hidden_RD is not None:
        with torch.no_grad():
            other_RV = logprobs(counterfactual_hidden_RD)
            statistics["counterfactual_logprob_R"] = other_RV.gather(1, target_R[:, None]).squeeze(1)
            statistics["kl_R"] = (logprobs_RV.exp() * (logprobs_RV - other_RV)).sum(dim=-1)
    return TokenStatistics(**statistics)
