"""PPO's clipped surrogate (arXiv 1707.06347), with bounds of their own below and above (DAPO's clip-higher).

term = ratio * A                          one update per rollout: ratio = exp(logp - stopgrad(logp))
     = min(ratio * A, clamp(ratio, 1 - low, 1 + high) * A)
                                          several updates: ratio = exp(logp - logp_behaviour)

With ``dual`` a token of negative advantage has at least the term dual * A, and no gradient where its ratio is above
``dual`` (dual-clip PPO, arXiv 1912.09729; the ``delta`` of TRL). Without it nothing bounds that ratio from above.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.types import TokenScores, TokenStreams


@dataclass(frozen=True)
class Clipped:
    """The clipped ratio of each token. The metric ``clip_ratio`` is the share of key tokens whose gradient the clip
    stops; there is none with one update per rollout, where nothing is clipped."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    """Largest ratio of a token of negative advantage, above 1; None for no limit."""

    def __post_init__(self) -> None:
        check_bounds(self.low, self.high)
        if self.dual is not None and self.dual <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual}")

    def __call__(
        self, logprob_R: Tensor, streams: TokenStreams, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        advantage_R, behaviour_logprob_R = streams.advantage_R, scores.behaviour_logprob_R
        if behaviour_logprob_R is None:
            return (logprob_R - logprob_R.detach()).exp() * advantage_R, {}
        ratio_R = (logprob_R - behaviour_logprob_R.float()).exp()
        unclipped_R = ratio_R * advantage_R
        clipped_R = ratio_R.clamp(1 - self.low, 1 + self.high) * advantage_R
        term_R, is_clipped_R = torch.minimum(unclipped_R, clipped_R), (clipped_R < unclipped_R).detach()
        if self.dual is not None:
            is_floored_R = ((advantage_R < 0) & (ratio_R > self.dual)).detach()
            term_R = torch.where(is_floored_R, self.dual * advantage_R, term_R)
            is_clipped_R = is_clipped_R | is_floored_R
        return term_R, {"clip_ratio": is_clipped_R}


def check_bounds(low: float, high: float) -> None:
    if low < 0 or high < 0:
        raise ValueError(f"clip_low and clip_high must not be negative, got {low} and {high}")


def build(section: ObjectiveSection) -> Clipped:
    return Clipped(section.clip_low, section.clip_high, dual=section.dual_clip)
