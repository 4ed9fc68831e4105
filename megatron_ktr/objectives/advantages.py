"""GRPO's group-relative advantage (arXiv 2402.03300) and Video-R1's length bonus (arXiv 2503.21776).

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        over the G responses of one prompt, std unbiased

Deviation: where all rewards of a group are equal to 1e-6, A is exactly 0. Fractional rewards in fp32 otherwise
leave tiny differences that the division blows up into advantages.
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
    """Reward for a correct response of moderate length, where the prompt is not too hard for the model."""

    bonus: float = 0.2
    min_length: int = 320
    max_length: int = 512
    """Tokens, both ends included, end token counted."""


def group_advantages(reward_PG: Tensor | Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
    """Advantages over the last dimension, float64 in the input's shape."""
    reward_PG = torch.as_tensor(reward_PG, dtype=torch.float64)
    spread_P1 = reward_PG.amax(-1, keepdim=True) - reward_PG.amin(-1, keepdim=True)
    # One response has no unbiased deviation; it also has no spread, so the value below is not used.
    correction = 1 if reward_PG.shape[-1] > 1 else 0
    std_P1 = reward_PG.std(-1, keepdim=True, correction=correction)
    advantage_PG = (reward_PG - reward_PG.mean(-1, keepdim=True)) / (std_P1 + STD_FLOOR)
    return torch.where(spread_P1 <= EQUAL_REWARDS, torch.zeros_like(advantage_PG), advantage_PG)


def length_bonuses(accuracies: Sequence[float], lengths: Sequence[int], *, setting: LengthBonus) -> list[float]:
    """The bonus of each response of one group: ``setting.bonus`` where its accuracy is above 0.1 and its length
    within bounds, provided that more than one response of the group is that accurate."""
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

    ``lengths`` counts over all responses of the groups in order; None for their token counts.
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
