"""Objectives: what is optimised. ``build_objective`` makes the one that a configuration names.

To add an objective, write one file here that registers itself (``config/objective_registry.py``) and add its name to
``objective_registry.BUILT_IN``. No other code refers to an objective by name.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import objective_entry
from megatron_ktr.config.sections import ObjectiveSection, RewardSection
from megatron_ktr.errors import UserError
from megatron_ktr.objectives.advantages import LengthBonus
from megatron_ktr.objectives.base import Objective

__all__ = ["Objective", "build_objective"]


def build_objective(section: ObjectiveSection, *, reward: RewardSection | None = None) -> Objective:
    """The objective the configuration asks for.

    Args:
        reward: holds the length bonus; None for no bonus.

    Raises:
        UserError: the name is unknown (the message proposes the nearest known one) or a setting is out of range.
    """
    entry = objective_entry(section.objective)
    try:
        return entry.build(section, length_bonus=_length_bonus(reward))
    except ValueError as error:
        raise UserError(f"objective {entry.name}: {error}") from error


def _length_bonus(reward: RewardSection | None) -> LengthBonus | None:
    if reward is None or not reward.length_bonus:
        return None
    if reward.length_bonus_min > reward.length_bonus_max:
        raise UserError(
            f"length_bonus_min {reward.length_bonus_min} is above length_bonus_max {reward.length_bonus_max}"
        )
    return LengthBonus(
        bonus=reward.length_bonus, min_length=reward.length_bonus_min, max_length=reward.length_bonus_max
    )
