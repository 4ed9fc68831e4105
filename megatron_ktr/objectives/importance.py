"""Correction of the mismatch between the policy that sampled a response and the one that is trained.

    d_t = logp_trainer(t) - logp_sampler(t)
    w_t = min(exp(d_t), cap)                            level token
    w_i = min(exp(sum over t of d_t), cap)              level sequence: all tokens of response i, key tokens or not
    loss = -sum_t weight_t [w * (policy-gradient term)_t - beta * k3_t]

Truncated importance sampling (Ionides 2008, J. Comput. Graph. Stat. 17(2); IMPALA, arXiv 1802.01561): an untruncated
sequence weight makes the expected gradient that of on-policy samples, at a variance that grows with length; a token
weight ignores the prefix a token was sampled after; the cap trades variance for bias. The trainer's policy is the one
the update starts from: the old policy of a clipped ratio where there are several updates, else the policy without
gradient. The clipped ratio stays relative to it, and the weight multiplies it.

``mask`` leaves out tokens whose exp(d_t) lies outside two bounds, at any level (as IcePop, arXiv 2510.18855): they
carry neither a policy gradient nor a KL term. They stay in every denominator, so that the other tokens weigh what they
would have weighed.

Both log-probs are of the full softmax of logits / temperature: the ratio measures other weights and other kernels, not
the cut of top-p and top-k.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.words import IMPORTANCE_LEVELS, ImportanceLevel
from megatron_ktr.errors import UserError
from megatron_ktr.sums import Metrics
from megatron_ktr.types import TokenScores, TokenStreams

MAX_LOG_RATIO = 20.0
"""Log ratios are cut to this before exp, 4.9e8: sums over long responses would overflow, and no cap is near it."""


@dataclass(frozen=True)
class ImportanceCorrection:
    """What is done about the mismatch; by default it is measured only."""

    level: ImportanceLevel = "none"
    cap: float = 2.0
    mask: tuple[float, float] | None = None
    """Lowest and highest exp(d_t) of tokens that carry the loss; None = any."""

    def __post_init__(self) -> None:
        if self.level not in IMPORTANCE_LEVELS:
            raise ValueError(f"importance_sampling must be one of {IMPORTANCE_LEVELS}, got {self.level!r}")
        if not self.cap > 0:
            raise ValueError(f"importance_cap must be above 0, got {self.cap}")
        if self.mask is not None and not (len(self.mask) == 2 and 0 <= self.mask[0] < self.mask[1]):
            raise ValueError(f"importance_mask needs two bounds, the lower one first, got {self.mask}")

    @property
    def needs_sampler_logprobs(self) -> bool:
        return self.level != "none" or self.mask is not None

    def correct(
        self, streams: TokenStreams, scores: TokenScores, *, response_R: Tensor, num_responses: int
    ) -> TokenStreams:
        """``streams`` with weighted advantages, without the weight of masked tokens, and with the metrics of the
        mismatch: ``sampler_trainer_logprob_gap`` (mean |d_t|), ``importance_ratio_mean`` and ``_max`` (of exp(d) before
        truncation, over tokens, over responses at level sequence), ``clipped_fraction`` (share of response tokens whose
        weight was truncated or which were masked).

        Args:
            response_R: int64 [R], index of each token's response among ``num_responses``.

        Raises:
            UserError: a correction is asked for and the rollouts came without sampler log-probs.
        """
        if scores.sampler_logprob_R is None:
            if self.needs_sampler_logprobs:
                raise UserError(
                    "importance_sampling and importance_mask compare with the sampler's log-probs, which some "
                    "responses lack: record them ('logprobs' of each response), or set --importance-sampling none and "
                    "no --importance-mask"
                )
            return streams
        trainer_R = scores.policy_logprob_R if scores.behaviour_logprob_R is None else scores.behaviour_logprob_R
        # fp64: a response's sum of a thousand fp32 differences would carry their rounding into its weight.
        log_ratio_R = trainer_R.double() - scores.sampler_logprob_R.double()
        log_ratio = log_ratio_R
        if self.level == "sequence":
            log_ratio = log_ratio_R.new_zeros(num_responses).index_add_(0, response_R, log_ratio_R)
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        ratio_R = ratio[response_R] if self.level == "sequence" else ratio

        advantage_R, weight_R = streams.advantage_R, streams.weight_R
        is_changed_R = torch.zeros_like(streams.is_key_token_R)
        if self.level != "none":
            advantage_R = advantage_R * ratio_R.clamp(max=self.cap).to(advantage_R.dtype)
            is_changed_R = ratio_R > self.cap
        if self.mask is not None:
            is_masked_R = self._is_masked(log_ratio_R)
            weight_R = weight_R.masked_fill(is_masked_R, 0.0)
            is_changed_R = is_changed_R | is_masked_R
        metrics = Metrics()
        metrics.merge(streams.metrics)
        metrics.merge(_mismatch(log_ratio_R, ratio, is_changed_R))
        return dataclasses.replace(streams, advantage_R=advantage_R, weight_R=weight_R, metrics=metrics)

    def _is_masked(self, log_ratio_R: Tensor) -> Tensor:
        assert self.mask is not None, "asked only where there is a mask"
        low, high = self.mask
        return (log_ratio_R < (math.log(low) if low > 0 else -math.inf)) | (log_ratio_R > math.log(high))


def _mismatch(log_ratio_R: Tensor, ratio: Tensor, is_changed_R: Tensor) -> Metrics:
    metrics = Metrics()
    of_tokens = torch.stack([log_ratio_R.abs().sum(), is_changed_R.sum().double()])
    metrics.add_later(["sampler_trainer_logprob_gap", "clipped_fraction"], of_tokens, count=len(log_ratio_R))
    metrics.add_later(["importance_ratio_mean"], ratio.sum(), count=len(ratio))
    metrics.add_later(["importance_ratio_max"], ratio.max(), are_maxima=True)
    return metrics
