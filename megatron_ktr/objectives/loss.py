"""The policy-gradient loss that all algorithms share; they differ only in the streams they pass to it.

    loss      = -sum_r weight_r * (surrogate_r - kl_beta * k3_r)
    surrogate = ratio * A                 one update per rollout: ratio = exp(logp - stopgrad(logp))
              = min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A)
                                          several updates: ratio = exp(logp - logp_behaviour)
    k3        = exp(x) - x - 1,   x = clamp(logp_reference - logp, -10, 10)

``weight_R`` already contains the mask and every denominator of the global batch. The losses of micro-batches and
replicas therefore add up to the global loss, and nothing here divides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ktr.sums import Metrics
from megatron_ktr.types import TokenScores, TokenStreams

MAX_LOG_RATIO = 10.0


def policy_gradient_loss(
    logprob_R: Tensor,
    streams: TokenStreams,
    *,
    scores: TokenScores,
    kl_beta: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Metrics]:
    """The loss, an fp32 scalar differentiable in ``logprob_R``, and the metrics to reduce over ranks.

    Tokens of weight 0 get a gradient of exactly 0, whatever their values, so that the pass over the vocabulary can skip
    their rows. Even if no token has weight, the loss stays connected to ``logprob_R``: the backward pass contains
    collectives, and a rank that skipped them would leave the others waiting. ``loss`` is not among the metrics, because
    it is a sum over micro-batches and not a mean.

    Raises:
        ValueError: ``kl_beta`` is above 0 and the scores have no reference log-probs.
    """
    # A NaN weight (from original_compat's division by zero) also counts as carrying the loss.
    carries_R = streams.weight_R != 0
    logprob_R = torch.where(carries_R, logprob_R.float(), logprob_R.detach().float())
    surrogate_R, is_clipped_R = _surrogate(
        logprob_R, streams.advantage_R, scores.behaviour_logprob_R, clip_low=clip_low, clip_high=clip_high
    )
    objective_R = surrogate_R
    counted = {"clip_ratio": is_clipped_R} if is_clipped_R is not None else {}
    if kl_beta > 0:
        if scores.reference_logprob_R is None:
            raise ValueError("kl_beta > 0 needs TokenScores.reference_logprob_R, which was not computed")
        k3_R = k3_divergence(logprob_R, scores.reference_logprob_R.float())
        objective_R = surrogate_R - kl_beta * k3_R
        counted["kl"] = k3_R.detach()
    # A token without weight may have an infinite value (the ratio of a token that became very improbable or probable),
    # and 0 * inf would be NaN.
    objective_R = torch.where(carries_R, objective_R, torch.zeros_like(objective_R))
    loss = -(streams.weight_R * objective_R).sum()
    return loss, _metrics(streams, counted, scores)


def k3_divergence(logprob_R: Tensor, reference_logprob_R: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = clamp(reference - policy, -10, 10): an unbiased, non-negative estimate of
    KL(policy || reference) on sampled tokens (Schulman's k3)."""
    log_ratio_R = (reference_logprob_R - logprob_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio_R.exp() - log_ratio_R - 1


def _surrogate(
    logprob_R: Tensor, advantage_R: Tensor, behaviour_logprob_R: Tensor | None, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor | None]:
    """The policy-gradient term of each token and, for a clipped ratio, where the clip stops the gradient."""
    if behaviour_logprob_R is None:
        return (logprob_R - logprob_R.detach()).exp() * advantage_R, None
    ratio_R = (logprob_R - behaviour_logprob_R.float()).exp()
    unclipped_R = ratio_R * advantage_R
    clipped_R = ratio_R.clamp(1 - clip_low, 1 + clip_high) * advantage_R
    return torch.minimum(unclipped_R, clipped_R), (clipped_R < unclipped_R).detach()


def _metrics(streams: TokenStreams, counted: dict[str, Tensor], scores: TokenScores) -> Metrics:
    """The objective's own metrics, the means of ``counted`` over key tokens, and the mean entropy over all response
    tokens. No value is read from the device here, so that the host does not wait for it."""
    metrics = Metrics()
    metrics.merge(streams.metrics)
    is_key_R = streams.is_key_token_R
    if counted:
        totals = torch.stack([torch.where(is_key_R, values.float(), 0.0).sum() for values in counted.values()])
        metrics.add_later(list(counted), totals, count=is_key_R.sum())
    if scores.entropy_R is not None:
        metrics.add_later(["entropy"], scores.entropy_R.float().sum(), count=is_key_R.numel())
    return metrics
