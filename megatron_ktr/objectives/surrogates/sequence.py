"""GSPO's ratio of whole responses (arXiv 2507.18071).

    s_i  = exp(1 / |o_i| sum_t [logp_it - logp_old_it])               over all tokens of response i
    term = min(s_i * A, clamp(s_i, 1 - low, 1 + high) * A)            sequence: the same number at every token of i
    term with s_it = stopgrad(s_i) * p_it / stopgrad(p_it)            sequence_token (GSPO-token, as in verl)

The mean over tokens then responses gives the paper's mean over responses. Where all tokens of a response carry the loss
with the same advantage, both forms have the same gradient, s_i A / |o_i| at every token. With key tokens, s_i is still
that of the whole response, and only key tokens get a gradient: the token form divides it by the number of key tokens,
the sequence form by the length of the response.

With one update per rollout s_i is 1, and the gradient is that of GRPO.

Deviation: the mean log ratio is clamped to at most 20 before exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.objectives.surrogates.clipped import check_bounds
from megatron_ktr.types import TokenScores, TokenStreams

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class SequenceRatio:
    """The clipped ratio of each response. The metric ``clip_ratio`` is the share of key tokens whose gradient the clip
    stops; there is none with one update per rollout."""

    low: float = 3e-4
    high: float = 4e-4
    is_by_token: bool = False
    """Whether the gradient of a token is that of its own log-prob alone (GSPO-token)."""

    def __post_init__(self) -> None:
        check_bounds(self.low, self.high)

    def __call__(
        self, logprob_R: Tensor, streams: TokenStreams, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        response_R, old_R = streams.response_R, scores.behaviour_logprob_R
        assert response_R is not None, "every policy gradient sets it"
        log_ratio_R = logprob_R - (logprob_R.detach() if old_R is None else old_R.float())
        # In fp64, as the sum over a long response would round many times.
        sums = log_ratio_R.new_zeros(streams.num_responses, dtype=torch.float64)
        lengths = sums.index_add(0, response_R, torch.ones_like(log_ratio_R, dtype=torch.float64))
        mean_log = (sums.index_add(0, response_R, log_ratio_R.double()) / lengths.clamp(min=1)).float()
        mean_log_R = mean_log.clamp(max=MAX_LOG_RATIO)[response_R]
        if self.is_by_token:
            mean_log_R = mean_log_R.detach() + (logprob_R - logprob_R.detach())
        ratio_R = mean_log_R.exp()
        unclipped_R = ratio_R * streams.advantage_R
        clipped_R = ratio_R.clamp(1 - self.low, 1 + self.high) * streams.advantage_R
        counted = {} if old_R is None else {"clip_ratio": (clipped_R < unclipped_R).detach()}
        return torch.minimum(unclipped_R, clipped_R), counted


def build(section: ObjectiveSection) -> SequenceRatio:
    return SequenceRatio(section.clip_low, section.clip_high)


def build_by_token(section: ObjectiveSection) -> SequenceRatio:
    return SequenceRatio(section.clip_low, section.clip_high, is_by_token=True)
