"""RLOO's advantage (arXiv 2402.14740): the baseline of a response is the mean reward of the other responses.

    A_i = r_i - 1 / (G - 1) sum_{j != i} r_j  =  G / (G - 1) (r_i - mean(r))        over the G responses of one prompt

The baseline does not contain the response's own reward, so that the policy gradient is unbiased. (GRPO's and
Dr. GRPO's baseline does; Dr. GRPO's gradient is (G - 1) / G times the one of RLOO.)

Deviation: A is exactly 0 where the rewards of a group differ by at most 1e-6, as in ``group.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.objectives.advantages import Advantage
from megatron_ktr.objectives.advantages.group_mean import centred
from megatron_ktr.types import BatchFacts


def leave_one_out(rewards: Sequence[Sequence[float]], facts: BatchFacts) -> Tensor:
    """The advantages of every response, float64 [responses]; ``rewards`` has one list per group, of at least two."""
    return torch.cat([centred(of_group) * (len(of_group) / (len(of_group) - 1)) for of_group in rewards])


def build(section: ObjectiveSection) -> Advantage:
    return leave_one_out
