"""VPPO and 80/20 once more, written naively from their formulas on full logits: the tests' second opinion.

Python loops over responses and tokens, no packing. It shares nothing with ``megatron_ktr``. One update per rollout, so
that every ratio is 1. Indexed [group][response] throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.reference_ktr import ReferenceResponse, group_advantage, token_logprobs

Responses = Sequence[Sequence[ReferenceResponse]]


def dependence(response: ReferenceResponse, kind: str) -> list[float] | None:
    """S of every token; None without a view to compare with."""
    if response.hidden is None:
        return None
    intact, other = (torch.log_softmax(x.detach().double(), dim=-1) for x in (response.intact, response.hidden))
    found = []
    for t, token in enumerate(response.token_ids):
        if kind == "kl":
            found.append(float((intact[t].exp() * (intact[t] - other[t])).sum()))
        else:
            d = max(-20.0, min(20.0, float(other[t, token] - intact[t, token])))
            found.append(max(0.0, min(10.0, math.exp(d) - d - 1)))
    return found


def top_share(scores: Sequence[float] | None, share: float, length: int) -> tuple[list[bool], float]:
    """The mask of the ceil(share n) highest scores, and the gap between the last one taken and the first one left."""
    if scores is None or max(scores) == min(scores):
        return [False] * length, math.inf
    number = math.ceil(share * length)
    ordered = sorted(range(length), key=lambda t: -scores[t])
    taken = set(ordered[:number])
    gap = scores[ordered[number - 1]] - scores[ordered[number]] if number < length else math.inf
    return [t in taken for t in range(length)], gap


def advantage_factors(scores: Sequence[Sequence[Sequence[float] | None]], low: float = 0.9) -> list[list[float]]:
    """alpha of every response, with minimum, maximum and mean over all of them."""
    means = [[None if s is None else sum(s) / len(s) for s in group] for group in scores]
    known = [mean for group in means for mean in group if mean is not None]
    least, most = min(known), max(known)
    shares = [(mean - least) / (most - least) for mean in known]
    reach = (1 - low) / (sum(shares) / len(shares))
    return [
        [1.0 if mean is None else low + reach * (mean - least) / (most - least) for mean in group] for group in means
    ]


def entropies(response: ReferenceResponse) -> Tensor:
    rows = torch.log_softmax(response.intact.detach(), dim=-1)
    return -(rows.exp() * rows).sum(-1)


def masked_loss(
    responses: Responses,
    masks: Sequence[Sequence[Tensor]],
    *,
    factors: Sequence[Sequence[float]] | None = None,
    weights: Sequence[Sequence[Tensor]] | None = None,
    sampled_entropy: float = 0.0,
    counted: str = "all",
) -> Tensor:
    """-(1 / N) sum of mask * weight * factor * ratio * A + sampled_entropy * mean(-log p); N: ``counted`` tokens."""
    total, number = torch.zeros(()), 0
    every, num_tokens = torch.zeros(()), 0
    for g, group in enumerate(responses):
        advantages = group_advantage([response.reward for response in group])
        for i, response in enumerate(group):
            logprobs = token_logprobs(response.intact, response.token_ids)
            for t in range(len(response.token_ids)):
                num_tokens += 1
                every = every - logprobs[t]
                number += int(masks[g][i][t]) if counted == "key" else 1
                if masks[g][i][t]:
                    factor = 1.0 if factors is None else factors[g][i]
                    weight = 1.0 if weights is None else float(weights[g][i][t])
                    ratio = torch.exp(logprobs[t] - logprobs[t].detach())
                    total = total - weight * ratio * factor * advantages[i]
    return total / number + sampled_entropy * every / num_tokens
