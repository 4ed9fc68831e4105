"""Objectives by name. A new algorithm is one file, one line in ``BUILDERS``, and its name among the choices of
``config_sections.ObjectiveSection`` and in ``config_checks``."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch

from megatron_ktr.errors import UserError
from megatron_ktr.objectives.advantages import LengthBonus
from megatron_ktr.objectives.base import Objective
from megatron_ktr.objectives.grpo import GRPO
from megatron_ktr.objectives.importance import ImportanceCorrection
from megatron_ktr.objectives.sft import SupervisedFineTuning
from megatron_ktr.objectives.tw_grpo import TWGRPO
from megatron_ktr.objectives.video_ktr import VideoKTR

__all__ = ["BUILDERS", "Objective", "build_objective"]


def build_objective(section: Any, *, reward: Any | None = None) -> Objective:
    """The objective the configuration asks for.

    Args:
        section: the ``objective`` section of the configuration.
        reward: the ``reward`` section, which holds the length bonus; None for no bonus.

    Raises:
        UserError: an unknown name (with the nearest known one) or a setting out of range.
    """
    if section.objective not in BUILDERS:
        nearest = difflib.get_close_matches(section.objective, BUILDERS, n=1, cutoff=0.0)
        raise UserError(
            f"objective: unknown objective {section.objective!r}, expected one of {sorted(BUILDERS)}; "
            f"did you mean {nearest[0]!r}?"
        )
    try:
        return BUILDERS[section.objective](section, _length_bonus(reward))
    except ValueError as error:
        raise UserError(f"objective {section.objective}: {error}") from error


def _grpo(section: Any, length_bonus: LengthBonus | None) -> GRPO:
    return GRPO(
        kl_beta=section.kl_beta,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        loss_aggregation=section.loss_aggregation,
        length_bonus=length_bonus,
        original_compat=section.original_compat,
        importance=ImportanceCorrection(
            level=section.importance_sampling, cap=section.importance_cap, mask=section.importance_mask or None
        ),
    )


def _video_ktr(section: Any, length_bonus: LengthBonus | None) -> VideoKTR:
    return VideoKTR(
        base=_grpo(section, length_bonus),
        signals=tuple(section.signals),
        selection_ratio=section.ratio_of_signal,
        shift=section.shift,
        scores_dtype=torch.bfloat16 if section.scores_dtype == "bf16" else torch.float32,
    )


def _tw_grpo(section: Any, length_bonus: LengthBonus | None) -> TWGRPO:
    return TWGRPO(
        base=_grpo(section, length_bonus), alpha=section.tw_alpha, has_weight_gradient=section.tw_weight_gradient
    )


def _sft(section: Any, length_bonus: LengthBonus | None) -> SupervisedFineTuning:
    return SupervisedFineTuning(loss_aggregation=section.loss_aggregation)


BUILDERS: dict[str, Callable[[Any, LengthBonus | None], Objective]] = {
    "grpo": _grpo,
    "sft": _sft,
    "tw_grpo": _tw_grpo,
    "video_ktr": _video_ktr,
}


def _length_bonus(reward: Any | None) -> LengthBonus | None:
    if reward is None or not reward.length_bonus:
        return None
    if reward.length_bonus_min > reward.length_bonus_max:
        raise UserError(
            f"length_bonus_min {reward.length_bonus_min} is above length_bonus_max {reward.length_bonus_max}"
        )
    return LengthBonus(
        bonus=reward.length_bonus, min_length=reward.length_bonus_min, max_length=reward.length_bonus_max
    )
