"""PPO's clipped surrogate (arXiv 1707.06347), with bounds of their own below and above (DAPO's clip-higher).

term = ratio * A                          one update per rollout: ratio = exp(logp - stopgrad(logp))
     = min(ratio * A, clamp(ratio, 1 - low, 1 + high) * A)
                                          several updates: ratio = exp(logp - logp_behaviour)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.types import TokenScores, TokenStreams


@dataclass(frozen=True)
class Clipped:
    """The clipped ratio of each token. The metric ``clip_ratio`` is the share of key tokens whose gradient the clip
    stops; there is none with one update per rollout, where nothing is clipped."""

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0:
            raise ValueError(f"clip_low and clip_high must not be negative, got {self.low} and {self.high}")

    def __call__(
        self, logprob_R: Tensor, streams: TokenStreams, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        advantage_R, behaviour_logprob_R = streams.advantage_R, scores.behaviour_logprob_R
        if behaviour_logprob_R is None:
            return (logprob_R - logprob_R.detach()).exp() * advantage_R, {}
        ratio_R = (logprob_R - behaviour_logprob_R.float()).exp()
        unclipped_R = ratio_R * advantage_R
        clipped_R = ratio_R.clamp(1 - self.low, 1 + self.high) * advantage_R
        return torch.minimum(unclipped_R, clipped_R), {"clip_ratio": (clipped_R < unclipped_R).detach()}
