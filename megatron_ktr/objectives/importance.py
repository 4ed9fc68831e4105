"""Importance weights that correct the mismatch between the policy that sampled a response and the one that is trained.

    d_t = logp_trainer(t) - logp_sampler(t)
    w_t = min(exp(d_t), cap)                            level token
    w_i = min(exp(sum over t of d_t), cap)              level sequence: all tokens of response i, key tokens or not
    loss = -sum_t weight_t [w * (policy-gradient term)_t - beta * k3_t]

This is truncated importance sampling (Ionides 2008, J. Comput. Graph. Stat. 17(2); IMPALA, arXiv 1802.01561). With an
untruncated sequence weight the expected gradient equals that of on-policy samples, but its variance grows with the
response's length. A token weight has less variance but ignores that the sampler also chose the token's prefix. The cap
trades variance for bias.

The trainer's policy in d_t is the policy at the start of the update. With several updates per rollout it is the old
policy of the clipped ratio; with one it is the current policy without gradient. The clipped ratio is still taken
relative to this policy, and the importance weight multiplies it.

``mask`` leaves out tokens whose exp(d_t) lies outside two bounds, at any level (as IcePop, arXiv 2510.18855). Such
tokens carry neither a policy gradient nor a KL term. They still count in every denominator, so that the weights of the
other tokens do not change.

Both log-probs are those of the full softmax of logits / temperature, before top-p and top-k cut it. The ratio thus
measures differences of weights and kernels, and not the effect of that cut.
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
"""Upper bound of log ratios before exp, because sums over long responses would overflow. exp(20) is 4.9e8, far above
any sensible cap."""


@dataclass(frozen=True)
class ImportanceCorrection:
    """What is done about the mismatch; by default it is measured only."""

    level: ImportanceLevel = "none"
    cap: float = 2.0
    mask: tuple[float, float] | None = None
    """Lowest and highest exp(d_t) of tokens that carry the loss; None for no bounds."""

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
        """A copy of ``streams`` in which advantages are multiplied by w and masked tokens have weight 0.

        The copy's metrics also describe the mismatch:
            sampler_trainer_logprob_gap: the mean of |d_t|.
            importance_ratio_mean, importance_ratio_max: of exp(d) before truncation, taken over tokens, or over
                responses at level sequence.
            clipped_fraction: the share of response tokens whose weight was truncated or which were masked.

        Args:
            response_R: int64 [R], index of each token's response among ``num_responses``.

        Raises:
            UserError: a correction is asked for, but the rollouts came without the sampler's log-probs.
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
        # In fp64, because the rounding of a thousand fp32 differences would add up in the weight of a response.
        log_ratio_R = trainer_R.double() - scores.sampler_logprob_R.double()
        log_ratio = log_ratio_R
        if self.level == "sequence":
            log_ratio = log_ratio_R.new_zeros(num_responses).index_add_(0, response_R, log_ratio_R)
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        ratio_R = ratio[response_R] if self.level == "sequence" else ratio

        advantage_R, weight_R, all_weight_R = streams.advantage_R, streams.weight_R, streams.all_weight_R
        is_changed_R = torch.zeros_like(streams.is_key_token_R)
        if self.level != "none":
            advantage_R = advantage_R * ratio_R.clamp(max=self.cap).to(advantage_R.dtype)
            is_changed_R = ratio_R > self.cap
        if self.mask is not None:
            is_masked_R = self._is_masked(log_ratio_R)
            weight_R = weight_R.masked_fill(is_masked_R, 0.0)
            all_weight_R = None if all_weight_R is None else all_weight_R.masked_fill(is_masked_R, 0.0)
            is_changed_R = is_changed_R | is_masked_R
        metrics = Metrics()
        metrics.merge(streams.metrics)
        metrics.merge(_mismatch(log_ratio_R, ratio, is_changed_R))
        return dataclasses.replace(
            streams, advantage_R=advantage_R, weight_R=weight_R, all_weight_R=all_weight_R, metrics=metrics
        )

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
