"""The KL to the reference model as a part of the reward (arXiv 1909.08593; RLOO and REINFORCE++ take it so).

    R_i = r_i - beta sum_t kl_it        over all tokens of response i, of the policy that the update starts from

It is subtracted before responses are compared, and has no gradient. ``penalties/kl.py`` has the formulas of kl_it; in
the reward, k1 is the usual one. The sum grows with the length of a response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.config.words import KlKind
from megatron_ktr.objectives.penalties.kl import kl_values
from megatron_ktr.types import ScoredBatch


@dataclass(frozen=True)
class KLInReward:
    """``weight`` times the KL of a response; the weight is ``--kl-beta``."""

    weight: float
    kind: KlKind = "k1"

    def of_responses(self, item: ScoredBatch) -> Tensor:
        """The KL of each response, not yet weighted, fp64 [responses] on the device of the scores."""
        kl_R = kl_values(item.scores.policy_logprob_R.float(), item.scores, kind=self.kind).detach()
        sums = kl_R.new_zeros(item.batch.num_responses, dtype=torch.float64)
        return sums.index_add_(0, item.response_R, kl_R.double())
