"""Video-R1's length bonus (arXiv 2503.21776): extra reward for a correct response of moderate length.

bonus_i = b   if accuracy_i > 0.1 and l_min <= |o_i| <= l_max, and at least two responses of the group are that
              accurate; else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.errors import UserError
from megatron_ktr.types import RolloutGroup

CORRECT_ACCURACY = 0.1
"""A response is correct if its accuracy is above this."""


@dataclass(frozen=True)
class LengthBonus:
    """The bonus, paid only if the group has several correct responses."""

    bonus: float = 0.2
    min_length: int = 320
    max_length: int = 512
    """Response lengths from ``min_length`` to ``max_length`` tokens earn the bonus. Both bounds are included, and the
    end token counts."""

    name = "length_bonus"

    def __post_init__(self) -> None:
        if self.min_length > self.max_length:
            raise ValueError(f"length_bonus_min {self.min_length} is above length_bonus_max {self.max_length}")

    def values(self, group: RolloutGroup, lengths: Sequence[int]) -> list[float]:
        """The bonus of each response of one group.

        Raises:
            UserError: a response has no reward part ``accuracy``.
        """
        accuracies = accuracies_of(group, asked_by="length_bonus")
        is_correct = [accuracy > CORRECT_ACCURACY for accuracy in accuracies]
        if sum(is_correct) <= 1:
            return [0.0] * len(accuracies)
        return [
            self.bonus if correct and self.min_length <= length <= self.max_length else 0.0
            for correct, length in zip(is_correct, lengths, strict=True)
        ]

    def shares(self, group: RolloutGroup) -> dict[str, float]:
        return {}


def accuracies_of(group: RolloutGroup, *, asked_by: str) -> list[float]:
    """The accuracy of each response of a group.

    Raises:
        UserError: a response has none; the message names the option ``asked_by``.
    """
    try:
        return [rollout.rewards["accuracy"] for rollout in group.rollouts]
    except KeyError:
        raise UserError(
            f"{asked_by} needs the reward part 'accuracy' on every response; prompt {group.prompt.problem_id!r} "
            f"has {sorted(set().union(*(rollout.rewards for rollout in group.rollouts)))}; set {asked_by} 0 or add it"
        ) from None
