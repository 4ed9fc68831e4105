"""GRPO's group-relative advantage (arXiv 2402.03300) and Video-R1's length bonus (arXiv 2503.21776).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        over the G responses of one prompt, std unbiased

Deviation: A is exactly 0 where the rewards of a group differ by at most 1e-6. Fractional rewards computed in fp32 can
differ by rounding alone, and the division by std(r) would turn these tiny differences into large advantages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.types import RolloutGroup

STD_FLOOR = 1e-4
EQUAL_REWARDS = 1e-6
CORRECT_ACCURACY = 0.1


@dataclass(frozen=True)
class LengthBonus:
    """Extra reward for a correct response of moderate length; paid only if the group has several correct responses."""

    bonus: float = 0.2
    min_length: int = 320
    max_length: int = 512
    """Response lengths from ``min_length`` to ``max_length`` tokens earn the bonus. Both bounds are included, and the
    end token counts."""


def group_advantages(reward_PG: Tensor | Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
    """Advantages, float64 in the input's shape; the last dimension holds the responses of one group."""
    reward_PG = torch.as_tensor(reward_PG, dtype=torch.float64)
    spread_P1 = reward_PG.amax(-1, keepdim=True) - reward_PG.amin(-1, keepdim=True)
    # A single response has no unbiased standard deviation. Its spread is 0, so the result below does not use std.
    correction = 1 if reward_PG.shape[-1] > 1 else 0
    std_P1 = reward_PG.std(-1, keepdim=True, correction=correction)
    advantage_PG = (reward_PG - reward_PG.mean(-1, keepdim=True)) / (std_P1 + STD_FLOOR)
    return torch.where(spread_P1 <= EQUAL_REWARDS, torch.zeros_like(advantage_PG), advantage_PG)


def length_bonuses(accuracies: Sequence[float], lengths: Sequence[int], *, setting: LengthBonus) -> list[float]:
    """The bonus of each response of one group.

    A response earns ``setting.bonus`` if its accuracy is above 0.1 and its length is within the bounds. Nobody earns it
    unless at least two responses of the group are that accurate.
    """
    is_correct = [accuracy > CORRECT_ACCURACY for accuracy in accuracies]
    if sum(is_correct) <= 1:
        return [0.0] * len(accuracies)
    return [
        setting.bonus if correct and setting.min_length <= length <= setting.max_length else 0.0
        for correct, length in zip(is_correct, lengths, strict=True)
    ]


def response_rewards(
    groups: Sequence[RolloutGroup], *, lengths: Sequence[int] | None = None, setting: LengthBonus | None = None
) -> list[list[tuple[float, float]]]:
    """(reward, length bonus) of every response by group; the reward does not contain the bonus yet.

    ``lengths`` has one length per response, over all groups in order; None means the responses' token counts.
    """
    remaining = iter(lengths) if lengths is not None else None
    found: list[list[tuple[float, float]]] = []
    for group in groups:
        own = [len(rollout.token_ids) if remaining is None else next(remaining) for rollout in group.rollouts]
        bonuses = [0.0] * len(own)
        if setting is not None and setting.bonus:
            bonuses = length_bonuses(_accuracies(group), own, setting=setting)
        found.append([(rollout.reward, bonus) for rollout, bonus in zip(group.rollouts, bonuses, strict=True)])
    return found


def _accuracies(group: RolloutGroup) -> list[float]:
    try:
        return [rollout.rewards["accuracy"] for rollout in group.rollouts]
    except KeyError:
        raise UserError(
            f"length_bonus needs the reward part 'accuracy' on every response; prompt {group.prompt.problem_id!r} "
            f"has {sorted(set().union(*(rollout.rewards for rollout in group.rollouts)))}; set length_bonus 0 or add it"
        ) from None
