"""The formula that ``linear_logprob`` computes, with full logits and ordinary autograd, on one process.

For tests and for reading. Memory: several R x V tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ktr.ops.linear_logprob import LinearLogprob


def linear_logprob_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> LinearLogprob:
    """log p = log_softmax(hidden @ weight^T / temperature); returns log p[target] and -sum p log p per row.

    ``weight_VD`` is the whole vocabulary [V padded, D]; rows from ``vocab_size`` on are padding. The product is
    rounded to the inputs' dtype, as a linear layer does; what follows is at least fp32.
    """
    logits_RV = F.linear(hidden_RD, weight_VD[:vocab_size])
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    logprobs_RV = F.log_softmax(logits_RV.to(dtype) / temperature, dim=-1)
    return LinearLogprob(
        logprob_R=logprobs_RV.gather(1, target_R[:, None]).squeeze(1),
        entropy_R=-(logprobs_RV.exp() * logprobs_RV).sum(dim=-1),
    )
