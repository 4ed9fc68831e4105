"""Dr. GRPO's advantage (arXiv 2503.20783): GRPO's without the division by the standard deviation.

    A_i = r_i - mean(r)        over the G responses of one prompt

GRPO's division gives a prompt that is nearly always solved, or nearly never, as much weight as one that is solved half
of the time.

Deviation: A is exactly 0 where the rewards of a group differ by at most 1e-6, as in ``group.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.objectives.advantages import Advantage
from megatron_ktr.objectives.advantages.group import EQUAL_REWARDS
from megatron_ktr.types import BatchFacts


def group_mean(rewards: Sequence[Sequence[float]], facts: BatchFacts) -> Tensor:
    """The advantages of every response, float64 [responses]; ``rewards`` has one list per group."""
    return torch.cat([centred(of_group) for of_group in rewards])


def centred(rewards: Sequence[float]) -> Tensor:
    """r - mean(r) of one group, float64 [G]; exactly 0 where all rewards are equal."""
    reward_G = torch.as_tensor(rewards, dtype=torch.float64)
    is_equal = reward_G.amax() - reward_G.amin() <= EQUAL_REWARDS
    return torch.zeros_like(reward_G) if is_equal else reward_G - reward_G.mean()


def build(section: ObjectiveSection) -> Advantage:
    return group_mean
