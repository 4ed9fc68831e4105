"""Rewards: named pure functions of (response text, dataset record). Their sum is the reward of a response."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from megatron_ktr.errors import UserError
from megatron_ktr.rewards.accuracy import accuracy, with_soft_choice
from megatron_ktr.rewards.protocols import PROTOCOLS, STANDARD, Protocol
from megatron_ktr.types import Prompt, Rollout, RolloutGroup

RewardFunction = Callable[[str, Mapping[str, Any]], float]
BuiltInReward = Callable[..., float]
"""A ``RewardFunction`` that also takes ``protocol``, which says how an answer is found and judged."""


def accuracy_reward(response: str, record: Mapping[str, Any], *, protocol: Protocol = STANDARD) -> float:
    """``accuracy`` on the record's ``solution``, ``problem_type`` and ``options``."""
    return accuracy(
        response,
        solution=record["solution"],
        problem_type=str(record["problem_type"]),
        options=record.get("options") or (),
        protocol=protocol,
    )


def soft_choice_reward(response: str, record: Mapping[str, Any], *, protocol: Protocol = STANDARD) -> float:
    """``accuracy``, except that multiple choice with several right letters pays in parts (``standard.soft_choice``)."""
    return accuracy_reward(response, record, protocol=with_soft_choice(protocol))


def format_reward(response: str, record: Mapping[str, Any], *, protocol: Protocol = STANDARD) -> float:
    """1 if the whole response is a reasoning block and an answer block."""
    return float(protocol.has_format(response))


BUILT_IN: dict[str, BuiltInReward] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "soft_choice": soft_choice_reward,
}
READS_PROBLEM_TYPE = ("accuracy", "soft_choice")
"""Built-in rewards that know five problem types and refuse others."""


DEFAULT_REWARDS = ("accuracy", "format")


def load_reward(name: str, *, protocol: str = "standard") -> tuple[str, RewardFunction]:
    """(short name, function) of the reward called ``name``.

    ``name`` is either that of a built-in reward, which finds answers by ``protocol`` (one of ``PROTOCOLS``), or your
    own function as ``module:function``, which finds them itself.
    """
    if name in BUILT_IN:
        return name, functools.partial(BUILT_IN[name], protocol=PROTOCOLS[protocol])
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise UserError(f"reward {name!r} is unknown, expected one of {sorted(BUILT_IN)} or 'module:function'")
    try:
        function: Any = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # a user's module can raise anything
        raise UserError(f"reward {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"reward {name!r} is no function but {type(function).__name__}")
    return function_name, cast(RewardFunction, function)


def reward_groups(
    groups: Sequence[RolloutGroup], *, names: Sequence[str], protocol: str = "standard"
) -> list[RolloutGroup]:
    """The same groups with ``rewards`` of every rollout filled in from its text and its prompt's record."""
    functions = load_rewards(names, protocol=protocol)
    return [
        dataclasses.replace(
            group,
            rollouts=tuple(
                dataclasses.replace(rollout, rewards=_reward_parts(rollout, group.prompt, functions))
                for rollout in group.rollouts
            ),
        )
        for group in groups
    ]


def load_rewards(names: Sequence[str], *, protocol: str = "standard") -> dict[str, RewardFunction]:
    """The functions by short name; UserError if two have the same short name, because one would hide the other."""
    functions: dict[str, RewardFunction] = {}
    for name in names:
        short_name, function = load_reward(name, protocol=protocol)
        if short_name in functions:
            raise UserError(f"reward_functions: two parts are called {short_name!r}; rename one of the functions")
        functions[short_name] = function
    return functions


def _reward_parts(rollout: Rollout, prompt: Prompt, functions: Mapping[str, RewardFunction]) -> dict[str, float]:
    return {name: _value_of(name, function, rollout, prompt) for name, function in functions.items()}


def _value_of(name: str, function: RewardFunction, rollout: Rollout, prompt: Prompt) -> float:
    try:
        found = function(rollout.text, prompt.record)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(function, functools.partial) and function.func in BUILT_IN.values():
            raise  # a mistake of ours, not of the user's function
        # This is a user's own function: the innermost frame of the traceback says where it failed.
        *_, last = traceback.extract_tb(error.__traceback__)
        raise UserError(
            f"reward {name!r} failed for a response to problem {prompt.problem_id}: {type(error).__name__}: {error} "
            f"({last.filename}, line {last.lineno})"
        ) from error
    try:
        value = float(found)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"reward {name!r} gave {found!r} for a response to problem {prompt.problem_id}, expected a finite number"
        )
    return value
