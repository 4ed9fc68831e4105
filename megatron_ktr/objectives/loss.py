"""The policy-gradient loss that all algorithms share; they differ in the streams and the parts they pass to it.

    loss = -sum_r weight_r * (surrogate_r - sum over penalties p of p.weight * p_r)
           + sum_r all_weight_r * sum over penalties q of q.weight * q_r

The surrogate is one of ``surrogates/``, each penalty one of ``penalties/``: p are those over key tokens, q those over
all tokens of the responses. GRPO's are the clipped ratio and k3.

``weight_R`` already contains the mask and every denominator of the global batch. The losses of micro-batches and
replicas therefore add up to the global loss, and nothing here divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.objectives.penalties import Penalty
from megatron_ktr.objectives.surrogates import Surrogate
from megatron_ktr.sums import Metrics
from megatron_ktr.types import TokenScores, TokenStreams


def policy_gradient_loss(
    statistics: Any,
    streams: TokenStreams,
    scores: TokenScores,
    *,
    surrogate: Surrogate,
    penalties: Sequence[Penalty] = (),
) -> tuple[Tensor, Metrics]:
    """The loss, an fp32 scalar differentiable in ``statistics``, and the metrics to reduce over ranks.

    Tokens of weight 0 get a gradient of exactly 0, whatever their values, so that the pass over the vocabulary can skip
    their rows. Even if no token has weight, the loss stays connected to ``logprob_R``: the backward pass contains
    collectives, and a rank that skipped them would leave the others waiting. ``loss`` is not among the metrics, because
    it is a sum over micro-batches and not a mean.

    Args:
        statistics: has ``logprob_R``, the policy's log-probs with their gradient (``ops/token_statistics.py``).
    """
    # A NaN weight (from original_compat's division by zero) also counts as carrying the loss.
    carries_R = streams.weight_R != 0
    logprob_R = _attached(statistics.logprob_R, carries_R)
    objective_R, counted = surrogate(logprob_R, streams, scores)
    for penalty in penalties:
        if penalty.over == "key":
            value_R = penalty(logprob_R, statistics, scores)
            objective_R = objective_R - penalty.weight * value_R
            if penalty.name is not None:
                counted[penalty.name] = value_R.detach()
    # A token without weight may have an infinite value (the ratio of a token that became very improbable or probable),
    # and 0 * inf would be NaN.
    objective_R = torch.where(carries_R, objective_R, torch.zeros_like(objective_R))
    loss = -(streams.weight_R * objective_R).sum()
    metrics = _metrics(streams, counted, scores)
    for penalty in penalties:
        if penalty.over == "all":
            loss = loss + _over_all_tokens(penalty, statistics, streams, scores, metrics)
    return loss, metrics


def _attached(logprob_R: Tensor, carries_R: Tensor) -> Tensor:
    """fp32 log-probs; those of tokens without weight are constants."""
    return torch.where(carries_R, logprob_R.float(), logprob_R.detach().float())


def _over_all_tokens(
    penalty: Penalty, statistics: Any, streams: TokenStreams, scores: TokenScores, metrics: Metrics
) -> Tensor:
    """The term of the loss that all response tokens have; its mean is added to ``metrics``."""
    weight_R = streams.all_weight_R
    assert weight_R is not None, "the objective has a term over all tokens"
    carries_R = weight_R != 0
    value_R = penalty(_attached(statistics.logprob_R, carries_R), statistics, scores)
    if penalty.name is not None:
        metrics.add_later([penalty.name], value_R.detach().sum(), count=value_R.numel())
    return penalty.weight * (weight_R * torch.where(carries_R, value_R, torch.zeros_like(value_R))).sum()


def _metrics(streams: TokenStreams, counted: dict[str, Tensor], scores: TokenScores) -> Metrics:
    """The objective's own metrics, the means of ``counted`` over key tokens, and over all response tokens the mean
    entropy and, where it is computed, the KL to the reference model over the whole vocabulary. No value is read from
    the device here, so that the host does not wait for it."""
    metrics = Metrics()
    metrics.merge(streams.metrics)
    is_key_R = streams.is_key_token_R
    if counted:
        totals = torch.stack([torch.where(is_key_R, values.float(), 0.0).sum() for values in counted.values()])
        metrics.add_later(list(counted), totals, count=is_key_R.sum())
    of_all_tokens = {"entropy": scores.entropy_R, "kl_full": scores.reference_kl_R}
    for name, values_R in of_all_tokens.items():
        if values_R is not None:
            metrics.add_later([name], values_R.detach().float().sum(), count=is_key_R.numel())
    return metrics
