"""Rewards: named pure functions of (response text, dataset record), summed into the reward of a response."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.rewards.accuracy import accuracy
from megatron_ktr.rewards.text import has_reasoning_format
from megatron_ktr.types import RolloutGroup

RewardFunction = Callable[[str, Mapping[str, Any]], float]


def accuracy_reward(response: str, record: Mapping[str, Any]) -> float:
    """``accuracy`` on the record's ``solution`` and ``problem_type``."""
    return accuracy(response, solution=str(record["solution"]), problem_type=str(record["problem_type"]))


def format_reward(response: str, record: Mapping[str, Any]) -> float:
    """1 if the whole response is a reasoning block and an answer block."""
    return float(has_reasoning_format(response))


BUILT_IN: dict[str, RewardFunction] = {"accuracy": accuracy_reward, "format": format_reward}


def load_reward(name: str) -> tuple[str, RewardFunction]:
    """A built-in reward by name, or your own as ``module:function``; returns (short name, function)."""
    if name in BUILT_IN:
        return name, BUILT_IN[name]
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise UserError(f"reward {name!r} is unknown, expected one of {sorted(BUILT_IN)} or 'module:function'")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward {name!r} cannot be loaded: {error}") from error
    return function_name, function


def reward_groups(groups: Sequence[RolloutGroup], *, names: Sequence[str]) -> list[RolloutGroup]:
    """The same groups with ``rewards`` of every rollout filled in from its text and its prompt's record."""
    functions = [load_reward(name) for name in names]
    return [
        dataclasses.replace(
            group,
            rollouts=tuple(
                dataclasses.replace(
                    rollout,
                    rewards={name: float(function(rollout.text, group.prompt.record)) for name, function in functions},
                )
                for rollout in group.rollouts
            ),
        )
        for group in groups
    ]
