"""VPPO's shaping of advantages (arXiv 2510.09285, eq. 4): responses that depend more on what they saw count more.

    S_i     = mean over the tokens of response i of its dependence                    ``signals/dependence.py``
    alpha_i = low + (high - low) (S_i - min S) / (max S - min S)                      A'_i = alpha_i A_i
    high    = low + (1 - low) / mean_i[(S_i - min S) / (max S - min S)]               where no ``high`` is given

Minimum, maximum and mean are taken over the responses of the global batch, over all micro-batches and replicas. The
``high`` of the third line makes the mean of alpha 1 (the paper: "dynamic per batch"). If all S differ by at most 1e-6,
every alpha is 1.

Deviations:
1. The release takes minimum and maximum over a device's mini-batch and the mean over a micro-batch, so that its alpha
   depends on how a batch is split. Ours does not.
2. A response whose prompt has nothing to hide has no dependence. Its alpha is 1, and it takes no part in the others'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.attribution.scopes import count_in_scopes

SMALLEST_SPREAD = 1e-6
Gather = Callable[[Tensor], Tensor]
"""The tensors of all replicas, concatenated along dimension 0; their sizes may differ there."""


@dataclass(frozen=True)
class DependenceShaping:
    """The bounds of alpha."""

    low: float = 0.9
    high: float | None = None
    """None: such that the mean of alpha over the batch is 1."""

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError(f"shaping_min must not be negative, got {self.low}")
        if self.high is not None and self.high < self.low:
            raise ValueError(f"shaping_max {self.high} is below shaping_min {self.low}")
        if self.high is None and self.low > 1:
            raise ValueError(f"shaping_min {self.low} is above 1, and without shaping_max the mean factor is 1")

    def factors(self, dependence: Tensor, *, gather: Gather | None = None) -> Tensor:
        """alpha, fp32 [responses]; ``dependence`` is S, fp64 [responses], NaN where a response has none.

        ``gather`` gives the S of all replicas; without it these are all there are.
        """
        every = dependence if gather is None else gather(dependence)
        # Sorted, they add up to the same bits whichever replica has which response. NaN are sorted to the end.
        every = every.sort().values
        is_known = every.isfinite()
        if not len(every):
            return torch.ones_like(dependence).float()
        least = every.masked_fill(~is_known, float("inf")).amin()
        spread = every.masked_fill(~is_known, float("-inf")).amax() - least
        share = (dependence - least) / spread
        if self.high is None:
            shares = torch.where(is_known, (every - least) / spread, torch.zeros_like(every))
            # The largest share is 1, so the mean is above 0 wherever it is used.
            reach = (1 - self.low) * is_known.sum() / shares.sum()
        else:
            reach = torch.full_like(spread, self.high - self.low)
        is_shaped = dependence.isfinite() & (spread > SMALLEST_SPREAD)
        return torch.where(is_shaped, self.low + reach * share, torch.ones_like(share)).float()


def mean_by_response(score_R: Tensor, response_R: Tensor, *, num_responses: int) -> Tensor:
    """The mean of ``score_R`` over each response, fp64 [responses]; NaN where a score is not finite or
    there is no token."""
    total = count_in_scopes(score_R.double(), response_R, num_responses)
    found = total / count_in_scopes(torch.ones_like(score_R, dtype=torch.float64), response_R, num_responses)
    return found.masked_fill(~found.isfinite(), float("nan"))
