"""Rules for the options of group filtering and of the retirement of easy records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_ktr.config.given import flag, given
from megatron_ktr.config.rollout_section import RolloutSection

if TYPE_CHECKING:
    from megatron_ktr.config import Config

WHOLE_REWARD, ACCURACY = "reward", "accuracy"
DEFAULT_PARTS = ("accuracy", "format")
"""The parts of the reward where no file and no option names others (``rewards.DEFAULT_REWARDS``)."""


def metric_of(rollout: RolloutSection) -> str:
    """The value of a response that the filter compares."""
    return rollout.filter_metric or (ACCURACY if rollout.filter_groups == "range" else WHOLE_REWARD)


def parts_needed(rollout: RolloutSection) -> dict[str, str]:
    """The parts that every reward must have, each with what needs it."""
    needed = {}
    if rollout.filter_groups != "off" and (metric := metric_of(rollout)) != WHOLE_REWARD:
        needed[metric] = f"--filter-groups {rollout.filter_groups} compares {metric}"
    if rollout.retire_above is not None:
        needed[ACCURACY] = "--retire-above goes by accuracy"
    return needed


def draws_together(rollout: RolloutSection) -> bool:
    """Whether all replicas draw the prompts of a step together (``data/together.py``)."""
    return rollout.filter_groups != "off" or rollout.retire_above is not None


def problems(config: Config) -> Iterator[str]:
    """What is wrong with these options, one sentence each."""
    rollout, objective = config.rollout, config.objective.objective
    if config.objective.is_supervised:
        for name in given(rollout, ("filter_groups", "retire_above"), objective=objective):
            yield f"{flag(name)} is not read by --objective {objective}: given responses have no rewards"
    if rollout.filter_groups == "off":
        yield from _unread(config, ("filter_metric", "min_reward_spread", "filter_max_rounds"), "--filter-groups")
    if rollout.filter_groups != "range":
        yield from _unread(config, ("filter_low", "filter_high"), "--filter-groups range")
    elif rollout.filter_low >= rollout.filter_high:
        yield f"--filter-low {rollout.filter_low:g} must be below --filter-high {rollout.filter_high:g}"
    if rollout.retire_above is None:
        yield from _unread(config, ("retire_for", "retire_decay"), "--retire-above")
    elif rollout.retire_above >= 1:
        yield f"--retire-above {rollout.retire_above:g}: no accuracy is above 1, give a number below it"
    if rollout.retire_decay >= 1:
        yield f"--retire-decay {rollout.retire_decay:g} must be below 1: the last group would count nothing"
    if rollout.engine != "replay" and not config.objective.is_supervised:
        yield from _missing_parts(config)


def _unread(config: Config, names: Sequence[str], needed: str) -> Iterator[str]:
    for name in given(config.rollout, names, objective=config.objective.objective):
        yield f"{flag(name)} needs {needed}"


def _missing_parts(config: Config) -> Iterator[str]:
    """Parts of the reward that a file's responses would not have. Those of a replay are checked when it is read."""
    general = config.reward.reward_functions or DEFAULT_PARTS
    for source in config.data.sources:
        names = [name.rpartition(":")[2] for name in source.reward_functions or general]
        for part, why in parts_needed(config.rollout).items():
            if part not in names:
                where = f"the reward_functions of {source.label}" if source.reward_functions else "--reward-functions"
                yield f"{why}: add it to {where}, which are {', '.join(names)}"
