"""The KL divergence to the frozen reference model, estimated on the sampled tokens.

k3 = exp(x) - x - 1,   x = clamp(logp_reference - logp, -10, 10)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ktr.types import TokenScores

MAX_LOG_RATIO = 10.0


@dataclass(frozen=True)
class KL:
    """``weight`` times the estimate; the weight is ``--kl-beta``."""

    weight: float

    name = "kl"
    needs_reference = True

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"kl_beta must not be negative, got {self.weight}")

    def __call__(self, logprob_R: Tensor, statistics: Any, scores: TokenScores) -> Tensor:
        if scores.reference_logprob_R is None:
            raise ValueError("kl_beta > 0 needs TokenScores.reference_logprob_R, which was not computed")
        return k3_divergence(logprob_R, scores.reference_logprob_R.float())

    def is_pulling(self, scores: TokenScores) -> Tensor:
        """bool [R]: the tokens whose log-prob differs from the reference model's."""
        assert scores.reference_logprob_R is not None, "the loss was computed with it"
        return scores.reference_logprob_R != scores.policy_logprob_R


def k3_divergence(logprob_R: Tensor, reference_logprob_R: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = clamp(reference - policy, -10, 10): an unbiased, non-negative estimate of
    KL(policy || reference) on sampled tokens (Schulman's k3)."""
    log_ratio_R = (reference_logprob_R - logprob_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio_R.exp() - log_ratio_R - 1
