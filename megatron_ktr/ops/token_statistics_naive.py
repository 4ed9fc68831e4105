"""``linear_token_statistics`` with the shard's full logits, in plain torch: what the other implementations replace.

Every product is a linear layer's: rounded to the inputs' dtype. Memory: several R x V/tp tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import (
    LogitGradient,
    ShardPlan,
    accumulation_dtype,
    empty_statistics,
    locate,
)


class NaiveTokenStatistics:
    """See ``token_statistics_interface.Implementation``."""

    @torch.no_grad()
    def forward(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        target_R: Tensor,
        plan: ShardPlan,
        counterfactual_hidden_RD: Tensor | None = None,
    ) -> Tensor:
        has_counterfactual = counterfactual_hidden_RD is not None
        statistics_KR = empty_statistics(hidden_RD, target_R, plan, has_counterfactual=has_counterfactual)
        if plan.num_columns == 0:
            return statistics_KR
        z_RV = _logits(hidden_RD, weight_VD, plan)
        x_RV = _shifted(z_RV, target_R, plan, maximum_R=statistics_KR[0], target_logit_R=statistics_KR[3])
        exp_RV = x_RV.exp()
        statistics_KR[1], statistics_KR[2] = exp_RV.sum(dim=1), (exp_RV * x_RV).sum(dim=1)
        if counterfactual_hidden_RD is not None:
            z_RV = _logits(counterfactual_hidden_RD, weight_VD, plan)
            other_x_RV = _shifted(z_RV, target_R, plan, maximum_R=statistics_KR[4], target_logit_R=statistics_KR[7])
            statistics_KR[5], statistics_KR[6] = other_x_RV.exp().sum(dim=1), (exp_RV * (x_RV - other_x_RV)).sum(dim=1)
        return statistics_KR

    @torch.no_grad()
    def backward(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        gradient: LogitGradient,
        plan: ShardPlan,
        *,
        needs_hidden_grad: bool,
        weight_grad_VD: Tensor | None,
    ) -> Tensor | None:
        if hidden_RD.shape[0] == 0 or plan.num_columns == 0:
            return torch.zeros_like(hidden_RD, dtype=accumulation_dtype(hidden_RD)) if needs_hidden_grad else None
        x_RV = _logits(hidden_RD, weight_VD, plan) - gradient.maximum[:, None]
        slope = 0.0 if gradient.slope is None else gradient.slope[:, None]
        z_grad_RV = x_RV.exp() * (gradient.offset[:, None] + slope * x_RV)
        index, is_here = locate(gradient.target, slice(0, plan.num_columns), plan)
        z_grad_RV.scatter_add_(1, index[:, None], torch.where(is_here, gradient.grad, 0.0)[:, None])
        z_grad_RV = (z_grad_RV * plan.scale).to(hidden_RD.dtype)
        if weight_grad_VD is not None:
            weight_grad_VD[: plan.num_columns] += z_grad_RV.t() @ hidden_RD
        if not needs_hidden_grad:
            return None
        return (z_grad_RV @ weight_VD[: plan.num_columns]).to(accumulation_dtype(hidden_RD))


IMPLEMENTATION = NaiveTokenStatistics()


def _logits(hidden_RD: Tensor, weight_VD: Tensor, plan: ShardPlan) -> Tensor:
    z_RV = F.linear(hidden_RD, weight_VD[: plan.num_columns])
    return z_RV.to(accumulation_dtype(z_RV)) * plan.scale


def _shifted(z_RV: Tensor, target_R: Tensor, plan: ShardPlan, *, maximum_R: Tensor, target_logit_R: Tensor) -> Tensor:
    """z - max z; writes the maximum and, where the target is here, its logit."""
    index, is_here = locate(target_R, slice(0, plan.num_columns), plan)
    target_logit_R.copy_(torch.where(is_here, z_RV.gather(1, index[:, None]).squeeze(1), target_logit_R))
    maximum_R.copy_(z_RV.amax(dim=1))
    return z_RV - maximum_R[:, None]
