"""GRPO's group-relative advantage (arXiv 2402.03300).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        over the G responses of one prompt, std unbiased

Deviation: A is exactly 0 where the rewards of a group differ by at most 1e-6. Fractional rewards computed in fp32 can
differ by rounding alone, and the division by std(r) would turn these tiny differences into large advantages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.objectives.advantages import Advantage
from megatron_ktr.types import BatchFacts

STD_FLOOR = 1e-4
EQUAL_REWARDS = 1e-6


def group_relative(rewards: Sequence[Sequence[float]], facts: BatchFacts) -> Tensor:
    """GRPO's advantages of every response, float64 [responses]; ``rewards`` has one list per group."""
    return torch.cat([group_advantages(of_group) for of_group in rewards])


def group_advantages(reward_PG: Tensor | Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
    """Advantages, float64 in the input's shape; the last dimension holds the responses of one group."""
    reward_PG = torch.as_tensor(reward_PG, dtype=torch.float64)
    spread_P1 = reward_PG.amax(-1, keepdim=True) - reward_PG.amin(-1, keepdim=True)
    # A single response has no unbiased standard deviation. Its spread is 0, so the result below does not use std.
    correction = 1 if reward_PG.shape[-1] > 1 else 0
    std_P1 = reward_PG.std(-1, keepdim=True, correction=correction)
    advantage_PG = (reward_PG - reward_PG.mean(-1, keepdim=True)) / (std_P1 + STD_FLOOR)
    return torch.where(spread_P1 <= EQUAL_REWARDS, torch.zeros_like(advantage_PG), advantage_PG)


def build(section: ObjectiveSection) -> Advantage:
    return group_relative
