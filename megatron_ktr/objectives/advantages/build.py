"""The advantages by the value of ``--advantage``. A new one is a file here and a line of ``ADVANTAGES``."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.objectives.advantages import Advantage
from megatron_ktr.objectives.advantages.batch import BatchNormalised
from megatron_ktr.objectives.advantages.group import group_relative
from megatron_ktr.objectives.advantages.group_mean import group_mean
from megatron_ktr.objectives.advantages.leave_one_out import leave_one_out

ADVANTAGES: dict[str, Callable[[ObjectiveSection], Advantage]] = {
    "group": lambda section: group_relative,
    "group_mean": lambda section: group_mean,
    "leave_one_out": lambda section: leave_one_out,
    "batch": lambda section: BatchNormalised(section.advantage_over),
    "batch_baseline": lambda section: BatchNormalised(section.advantage_over, has_group_baseline=True),
}


def build_advantage(section: ObjectiveSection) -> Advantage:
    return ADVANTAGES[section.advantage](section)
