"""``length``: 1 for a response of ``length_bonus_min`` to ``length_bonus_max`` tokens, right or wrong, else 0."""

from __future__ import annotations

from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.registry import RewardEntry, each, register


def value_of(given: RewardInput, options: RewardOptions) -> float:
    """1 if the length is within the bounds, which are included."""
    return float(options.section.length_bonus_min <= given.length <= options.section.length_bonus_max)


register(RewardEntry("length", each(value_of)))
