"""Terms that move the policy's entropy.

    EntropyBonus      loss -= c * mean_t H_t             H of the next-token distribution; keeps the policy from
                                                         collapsing (A3C, arXiv 1602.01783); t over key tokens
    SampledEntropy    loss += c * mean_t (-logp_t)       of the sampled tokens; lowers the entropy (VPPO, arXiv
                                                         2510.09285, c = 0.06); t over all response tokens

The means have the denominators of the policy gradient (``loss_aggregation``). H and its gradient come from the pass
over the vocabulary that computes logp (``ops/token_statistics.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ktr.config.words import TokenSet
from megatron_ktr.types import TokenScores


@dataclass(frozen=True)
class EntropyBonus:
    """``weight`` times -H; the weight is ``--entropy-bonus``. The metric ``entropy`` shows H."""

    weight: float

    name = None
    over: TokenSet = "key"
    needs_reference = False
    needs_reference_kl = False

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"entropy_bonus must not be negative, got {self.weight}")

    def __call__(self, logprob_R: Tensor, statistics: Any, scores: TokenScores) -> Tensor:
        return -statistics.entropy_R

    def is_pulling(self, scores: TokenScores) -> Tensor:
        return torch.ones_like(scores.policy_logprob_R, dtype=torch.bool)


@dataclass(frozen=True)
class SampledEntropy:
    """``weight`` times -logp; the weight is ``--sampled-entropy-penalty``. The mean of -logp is the metric
    ``sampled_entropy``."""

    weight: float

    name = "sampled_entropy"
    over: TokenSet = "all"
    needs_reference = False
    needs_reference_kl = False

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"sampled_entropy_penalty must not be negative, got {self.weight}")

    def __call__(self, logprob_R: Tensor, statistics: Any, scores: TokenScores) -> Tensor:
        return -logprob_R

    def is_pulling(self, scores: TokenScores) -> Tensor:
        return torch.ones_like(scores.policy_logprob_R, dtype=torch.bool)
