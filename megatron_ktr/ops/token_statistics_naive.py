"""``linear_token_statistics`` with the shard's full logits, in plain torch, which the other implementations avoid.

Like a linear layer, it rounds every product to the inputs' dtype. It needs memory for several R x V/tp tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ktr.ops.token_statistics_interface import (
    NUM_STATISTICS,
    GradientSums,
    LogitGradient,
    OtherRows,
    ShardPlan,
    accumulation_dtype,
    empty_statistics,
    locate,
)


class NaiveTokenStatistics:
    """See ``token_statistics_interface.Implementation``."""

    @torch.no_grad()
    def forward(
        self, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: ShardPlan, others: Sequence[OtherRows] = ()
    ) -> Tensor:
        statistics_NR = empty_statistics(hidden_RD, target_R, plan, num_others=len(others))
        if plan.num_columns == 0:
            return statistics_NR
        intact, *of_others = statistics_NR.split(NUM_STATISTICS)
        max_R, sum_R, shifted_sum_R, target_logit_R = intact
        z_RV = _logits(hidden_RD, weight_VD, plan)
        x_RV = _shifted(z_RV, target_R, plan, max_R=max_R, target_logit_R=target_logit_R)
        exp_RV = x_RV.exp()
        sum_R.copy_(exp_RV.sum(dim=1))
        shifted_sum_R.copy_((exp_RV * x_RV).sum(dim=1))
        for other, of_other in zip(others, of_others, strict=True):
            max_R, sum_R, difference_R, target_logit_R = of_other
            z_RV = _logits(other.hidden_RD, weight_VD if other.weight_VD is None else other.weight_VD, plan)
            other_x_RV = _shifted(z_RV, target_R, plan, max_R=max_R, target_logit_R=target_logit_R)
            sum_R.copy_(other_x_RV.exp().sum(dim=1))
            difference_R.copy_((exp_RV * (x_RV - other_x_RV)).sum(dim=1))
        return statistics_NR

    @torch.no_grad()
    def backward(
        self, hidden_RD: Tensor, weight_VD: Tensor, gradient: LogitGradient, plan: ShardPlan, sums: GradientSums
    ) -> None:
        if hidden_RD.shape[0] == 0 or plan.num_columns == 0:
            return
        x_RV = _logits(hidden_RD, weight_VD, plan) - gradient.maximum[:, None]
        slope = 0.0 if gradient.slope is None else gradient.slope[:, None]
        coefficient_RV = gradient.offset[:, None] + slope * x_RV
        if (other := gradient.other) is not None:
            other_z_RV = _logits(other.hidden_RD, weight_VD if other.weight_VD is None else other.weight_VD, plan)
            coefficient_RV += other.slope[:, None] * (x_RV - (other_z_RV - other.maximum[:, None]))
        z_grad_RV = x_RV.exp() * coefficient_RV
        index, is_here = locate(gradient.target, slice(0, plan.num_columns), plan)
        z_grad_RV.scatter_add_(1, index[:, None], torch.where(is_here, gradient.grad, 0.0)[:, None])
        z_grad_RV = (z_grad_RV * plan.scale).to(hidden_RD.dtype)
        if sums.weight_VD is not None:
            sums.weight_VD[: plan.num_columns] += z_grad_RV.t() @ hidden_RD
        if sums.hidden_RD is not None:
            sums.hidden_RD.add_(z_grad_RV @ weight_VD[: plan.num_columns])


IMPLEMENTATION = NaiveTokenStatistics()


def _logits(hidden_RD: Tensor, weight_VD: Tensor, plan: ShardPlan) -> Tensor:
    z_RV = F.linear(hidden_RD, weight_VD[: plan.num_columns])
    return z_RV.to(accumulation_dtype(z_RV)) * plan.scale


def _shifted(z_RV: Tensor, target_R: Tensor, plan: ShardPlan, *, max_R: Tensor, target_logit_R: Tensor) -> Tensor:
    """Returns z - max z; writes the maximum and, if the target is in this shard, the target's logit."""
    index, is_here = locate(target_R, slice(0, plan.num_columns), plan)
    target_logit_R.copy_(torch.where(is_here, z_RV.gather(1, index[:, None]).squeeze(1), target_logit_R))
    max_R.copy_(z_RV.amax(dim=1))
    return z_RV - max_R[:, None]
