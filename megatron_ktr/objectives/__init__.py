"""Objectives: what is optimised. ``build_objective`` makes the one that a configuration names.

To add an objective, write one file here that registers itself (``config/objective_registry.py``) and add its name to
``objective_registry.BUILT_IN``. No other code refers to an objective by name.
"""

from __future__ import annotations

from megatron_ktr.config.objective_registry import objective_entry
from megatron_ktr.config.sections import ObjectiveSection, RewardSection, RolloutSection
from megatron_ktr.errors import UserError
from megatron_ktr.objectives.base import Objective
from megatron_ktr.objectives.policy_gradient import BuildContext

__all__ = ["Objective", "build_objective"]


def build_objective(
    section: ObjectiveSection, *, reward: RewardSection | None = None, rollout: RolloutSection | None = None
) -> Objective:
    """The objective the configuration asks for.

    Args:
        reward: holds the bonuses; None for no bonus.
        rollout: holds the length of responses and what is sampled for a group; None where neither matters.

    Raises:
        UserError: the name is unknown (the message proposes the nearest known one) or a setting is out of range.
    """
    entry = objective_entry(section.objective)
    try:
        return entry.build(section, BuildContext(reward=reward, rollout=rollout))
    except ValueError as error:
        raise UserError(f"objective {entry.name}: {error}") from error
