"""TW-GRPO once more, written naively from the formulas: full logits, Python loops, one position at a time.

It shares nothing with ``megatron_ktr``; give it logits of any model in any precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.reference_ktr import ReferenceResponse, group_advantage, token_logprobs


@dataclass
class ReferenceTWUpdate:
    """Lists are by group and position, from the first to the last of the group's longest response."""

    loss: Tensor
    divergences: list[list[float]]
    weights: list[list[float]]


def position_divergences(
    group: Sequence[ReferenceResponse], *, temperature: float = 1.0, with_gradient: bool = False
) -> list[Tensor]:
    found = []
    with torch.set_grad_enabled(with_gradient):
        for t in range(max(len(response.token_ids) for response in group)):
            rows = []
            for response in group:
                if t < len(response.token_ids):
                    rows.append(torch.log_softmax(response.intact[t].double() / temperature, dim=-1))
                else:
                    size = response.intact.shape[-1]
                    rows.append(torch.full((size,), -math.log(size), dtype=torch.float64))
            mean = sum(rows) / len(rows)
            total = 0.0
            for row in rows:
                d = (mean - row).clamp(-11, 11)
                total = total + (d.exp() - d - 1).sum()
            found.append(total / len(rows))
    return found


def reference_tw_update(
    groups: Sequence[Sequence[ReferenceResponse]],
    *,
    alpha: float = 1.7,
    kl_beta: float = 0.04,
    temperature: float = 1.0,
    weight_gradient: bool = False,
) -> ReferenceTWUpdate:
    """One update on all groups of the global batch, one update per rollout. ``weight_gradient``: ordinary autograd
    through the weights, with their minimum and maximum; they are constants otherwise."""
    divergences = [
        position_divergences(group, temperature=temperature, with_gradient=weight_gradient) for group in groups
    ]
    weights, terms = [], []
    for group, values in zip(groups, divergences, strict=True):
        least, most = torch.stack(values).min(), torch.stack(values).max()
        weights.append([1 + (alpha - 1) * (value - least) / (most - least + 1e-8) for value in values])
        advantages = group_advantage([response.reward for response in group])
        for response, advantage in zip(group, advantages, strict=True):
            logprobs = token_logprobs(response.intact, response.token_ids, temperature=temperature)
            for t in range(len(response.token_ids)):
                gain = torch.exp(logprobs[t] - logprobs[t].detach()) * advantage
                if kl_beta > 0:
                    reference = token_logprobs(response.reference, response.token_ids, temperature=temperature)
                    x = (reference[t].detach() - logprobs[t]).clamp(-10, 10)
                    gain = gain - kl_beta * (torch.exp(x) - x - 1)
                terms.append(-weights[-1][t] * gain)
    as_numbers = [[[float(value.detach()) for value in of_group] for of_group in x] for x in (divergences, weights)]
    return ReferenceTWUpdate(sum(terms) / len(terms), *as_numbers)
