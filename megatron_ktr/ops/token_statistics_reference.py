"""The formula that ``linear_token_statistics`` computes, with full logits and ordinary autograd, on one process.

It is for tests and for reading, and shares no code with the implementations. It needs memory for several R x V tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ktr.ops.token_statistics import TokenStatistics
from megatron_ktr.ops.token_statistics_interface import OtherRows


def token_statistics_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    counterfactual_hidden_RD: Sequence[Tensor] = (),
    reference: OtherRows | None = None,
) -> TokenStatistics:
    """Computes the statistics of each hidden row.

    Let log p = log_softmax(hidden @ weight^T / temperature), and log q the same for each set of counterfactual hidden
    rows, and for the reference's rows with the reference's own weight. The result has log p[target] and -sum p log p
    for each row, and for each q also log q[target] and sum p (log p - log q).

    ``weight_VD`` is the whole vocabulary [V padded, D]; rows from ``vocab_size`` on are padding. The product is
    rounded to the inputs' dtype, as in a linear layer; everything after it is at least fp32.
    """

    def logits(hidden_RD: Tensor, weight_VD: Tensor = weight_VD) -> Tensor:
        logits_RV = F.linear(hidden_RD, weight_VD[:vocab_size])
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) / temperature

    logits_RV = logits(hidden_RD)
    logprobs_RV = F.log_softmax(logits_RV, dim=-1)
    with torch.no_grad():
        others = [F.log_softmax(logits(other_RD), dim=-1) for other_RD in counterfactual_hidden_RD]
        others_KRV = torch.stack(others) if others else logprobs_RV.new_empty(0, *logprobs_RV.shape)
        target_KR1 = target_R[None, :, None].expand(len(others_KRV), -1, -1)
        scores = {
            "counterfactual_logprob_KR": others_KRV.gather(2, target_KR1).squeeze(2),
            "kl_KR": (logprobs_RV.exp() * (logprobs_RV - others_KRV)).sum(dim=-1),
            "log_normalizer_R": logits_RV.logsumexp(dim=-1),
        }
    if reference is not None:
        with torch.no_grad():
            own_VD = weight_VD if reference.weight_VD is None else reference.weight_VD
            others_RV = F.log_softmax(logits(reference.hidden_RD, own_VD), dim=-1)
        kl_R = (logprobs_RV.exp() * (logprobs_RV - others_RV)).sum(dim=-1)
        scores["reference_logprob_R"] = others_RV.gather(1, target_R[:, None]).squeeze(1)
        scores["reference_kl_R"] = kl_R if reference.has_kl_gradient else kl_R.detach()
    return TokenStatistics(
        logprob_R=logprobs_RV.gather(1, target_R[:, None]).squeeze(1),
        entropy_R=-(logprobs_RV.exp() * logprobs_RV).sum(dim=-1),
        **scores,
    )
