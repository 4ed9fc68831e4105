"""T-GRPO's bonus (Video-R1, arXiv 2503.21776): extra reward where the order of the frames did not hurt.

p  = mean accuracy of the G responses to the video
p' = mean accuracy of the responses to the same frames in random order        ``RolloutGroup.shuffled``

bonus_i = b   if p >= m p' and accuracy_i > 0.1; else 0                       b = 0.3, m = 0.8

A group without shuffled responses (text, an image, a video without an order to lose) earns nothing. Accuracies are
those of the reward functions, without any bonus. p = p' = 0 satisfies the rule and pays nobody. A group in which every
response is correct earns b for all, which its advantages take out again.

Deviations:
1. The paper has p >= p' over shares of correct responses; the authors' code has the factor m = 0.8 and means of
   accuracies, which are fractions for OCR, free-form and regression questions. We follow the code.
2. The code shuffles the prompt's first video, by an unseeded order that may be the original one. Here every video is
   shuffled, by a seeded order that never is (``rollout/second_prompt.py``).
3. p may lie 1e-6 below m p', so that rounding does not decide a tie: 3 of 5 against 3 of 4 is one, and 0.8 * 0.75 is
   above 0.6 in floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.objectives.bonuses.length import CORRECT_ACCURACY, accuracies_of
from megatron_ktr.types import RolloutGroup

ROUNDING = 1e-6


@dataclass(frozen=True)
class TemporalBonus:
    """The bonus, paid to correct responses of a group that answers ordered frames well enough."""

    bonus: float = 0.3
    margin: float = 0.8
    """The factor m of the accuracy on shuffled frames that the accuracy on ordered frames must reach."""

    name = "temporal_bonus"

    def holds(self, group: RolloutGroup) -> bool:
        """Whether the group satisfies the rule: it has shuffled responses, and p >= m p'."""
        return bool(group.shuffled) and self._holds(group, accuracies_of(group, asked_by=self.name))

    def is_satisfied(self, ordered: float, shuffled: float) -> bool:
        """The rule for the mean accuracies p and p'."""
        return ordered >= self.margin * shuffled - ROUNDING

    def values(self, group: RolloutGroup, lengths: Sequence[int]) -> list[float]:
        """The bonus of each response of one group.

        Raises:
            UserError: a response has no reward part ``accuracy``.
        """
        if not group.shuffled:
            return [0.0] * len(group.rollouts)
        accuracies = accuracies_of(group, asked_by=self.name)
        is_paid = self._holds(group, accuracies)
        return [self.bonus if is_paid and accuracy > CORRECT_ACCURACY else 0.0 for accuracy in accuracies]

    def shares(self, group: RolloutGroup) -> dict[str, float]:
        """``temporal_rule``: 1 if the rule holds, 0 if not; nothing for a group that it does not concern."""
        return {"temporal_rule": float(self.holds(group))} if group.shuffled else {}

    def _holds(self, group: RolloutGroup, accuracies: Sequence[float]) -> bool:
        shuffled = accuracies_of(RolloutGroup(group.prompt, group.shuffled), asked_by=self.name)
        return self.is_satisfied(sum(accuracies) / len(accuracies), sum(shuffled) / len(shuffled))
