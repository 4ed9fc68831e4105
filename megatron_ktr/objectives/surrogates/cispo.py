"""CISPO (MiniMax-M1, arXiv 2506.13585): the ratio is a constant weight with a cap, and no token loses its gradient.

    term = stopgrad(min(ratio, cap)) * A * logp        ratio = p / p_old

``cap`` is absolute (5 as in TRL, ms-swift and ScaleRL), not a distance from 1 as ``clip_high`` is. The paper's lower
bound, which its authors leave idle, is not built.

The value of the term is proportional to logp: losses cannot be compared with those of a clipped ratio, gradients can.
With one update per rollout the ratio is 1, and the gradient is that of GRPO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.types import TokenScores, TokenStreams


@dataclass(frozen=True)
class Cispo:
    """The capped ratio of each token as a constant. The metric ``clip_ratio`` is the share of key tokens whose ratio is
    above the cap; there is none with one update per rollout."""

    cap: float = 5.0

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"ratio_cap must be above 0, got {self.cap}")

    def __call__(
        self, logprob_R: Tensor, streams: TokenStreams, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gain_R = streams.advantage_R * logprob_R
        if scores.behaviour_logprob_R is None:
            return gain_R, {}
        log_ratio_R = logprob_R.detach() - scores.behaviour_logprob_R.float()
        # Clamped before exp, so that a ratio which overflows is the cap and not infinite.
        weight_R = log_ratio_R.clamp(max=math.log(self.cap)).exp()
        return weight_R * gain_R, {"clip_ratio": log_ratio_R > math.log(self.cap)}


def build(section: ObjectiveSection) -> Cispo:
    return Cispo(section.ratio_cap)
