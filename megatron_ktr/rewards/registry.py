"""The rewards that exist, and how a reward is found by its name.

A built-in reward is a file ``parts/NAME.py`` that calls ``register`` when it is imported, and its name in ``BUILT_IN``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ktr.config.cli import did_you_mean
from megatron_ktr.errors import UserError
from megatron_ktr.rewards.inputs import RewardInput
from megatron_ktr.rewards.options import RewardOptions
from megatron_ktr.rewards.plug_in import Failed, Form, PlugIn, Value

BUILT_IN = (
    "accuracy",
    "format",
    "soft_choice",
    "length",
    "overlong",
    "repetition",
    "tag_count",
    "tag_count_lines",
    "math",
    "temporal_iou",
    "box_iou",
    "judge",
)
"""Each is a module of ``megatron_ktr.rewards.parts`` that registers the reward of the same name."""
DEFAULT_REWARDS = ("accuracy", "format")

Score = Callable[[Sequence[RewardInput], RewardOptions], Sequence[Value]]
"""Gives the values of the responses of one group, in their order. It is called in any thread."""


@dataclass(frozen=True)
class RewardEntry:
    """What a built-in reward says about itself."""

    name: str
    score: Score
    reads_problem_type: bool = False
    """Whether it judges by the record's problem type, and knows only some of them."""
    reads_solution: bool = False
    """Whether it reads the solution of questions of some types as ``accuracy`` does, so that one that cannot be read
    is to be found before training."""
    check: Callable[[RewardOptions], None] = lambda options: None
    """Raises ``UserError`` if the reward cannot work with these options on this machine. Called before anything
    expensive."""
    prepare: Callable[[RewardOptions], None] = lambda options: None
    """Connects to what the reward asks, before the model is built, where rewards are computed. Raises ``UserError``."""
    close: Callable[[RewardOptions], None] = lambda options: None
    """Gives up what is still asked, because the run ends. Called in any thread, and more than once."""


def each(function: Callable[[RewardInput, RewardOptions], float | None]) -> Score:
    """The ``Score`` of a function of one response."""
    return lambda inputs, options: [function(given, options) for given in inputs]


_entries: dict[str, RewardEntry] = {}


def register(entry: RewardEntry) -> None:
    """Makes a reward available by its name.

    Raises:
        ValueError: another reward has the name already.
    """
    if _entries.setdefault(entry.name, entry) != entry:
        raise ValueError(f"two rewards are called {entry.name!r}")


def available_rewards() -> tuple[str, ...]:
    """The names of the built-in rewards, and of those that were registered besides."""
    return (*BUILT_IN, *(name for name in _entries if name not in BUILT_IN))


def reward_entry(name: str) -> RewardEntry:
    """What the built-in reward called ``name`` says about itself; its file is imported where that has not happened.

    Raises:
        UserError: there is no such reward.
    """
    if name not in available_rewards():
        raise UserError(
            f"reward {name!r} is unknown, expected one of {', '.join(available_rewards())} or 'module:function'"
            f"{did_you_mean(name, available_rewards())}"
        )
    if name not in _entries:
        importlib.import_module(f"megatron_ktr.rewards.parts.{name}")
    return _entries[name]


def reads_problem_type(name: str) -> bool:
    """Whether ``name`` is a built-in reward that judges by the record's problem type."""
    return ":" not in name and reward_entry(name).reads_problem_type


def reads_solution(name: str) -> bool:
    """Whether ``name`` is a built-in reward that reads solutions as ``accuracy`` does."""
    return ":" not in name and reward_entry(name).reads_solution


@dataclass(frozen=True)
class Reward:
    """One part of the reward: built in (``entry``), or the user's own (``plug_in``)."""

    name: str
    """The short name, that of its metric."""
    options: RewardOptions = field(default_factory=RewardOptions)
    entry: RewardEntry | None = None
    plug_in: Form | None = None
    """A ``PlugIn`` where it was loaded into this process; else a process of ``pool.py`` has it."""

    def score_here(self, inputs: Sequence[RewardInput]) -> list[Value]:
        """The values of the responses of one group, computed in this process."""
        if self.entry is not None:
            return list(self.entry.score(inputs, self.options))
        assert isinstance(self.plug_in, PlugIn), "what a process has loaded runs there"
        seconds = self.options.section.reward_timeout
        found = dict(self.plug_in.score(inputs, timeout_seconds=seconds))
        return [found[index] for index in range(len(inputs))]

    def __call__(self, response: str, record: Mapping[str, Any]) -> float | None:
        """The value of one response of which nothing but its text is known.

        Raises:
            UserError: there is none.
        """
        (value,) = self.score_here([RewardInput(response, record, group=(response,))])
        if isinstance(value, Failed):
            raise UserError(f"reward {self.name!r} {value.text}")
        return value


def load_reward(
    name: str,
    *,
    options: RewardOptions | None = None,
    protocol: str | None = None,
    load_own: Callable[[str], Form] = PlugIn.load,
) -> Reward:
    """The reward called ``name``: built in, or the user's own ``module:function``, which ``load_own`` imports.

    Args:
        protocol: stands for options that differ from the defaults in ``answer_protocol`` alone.

    Raises:
        UserError: there is none, or it cannot work here.
    """
    options = options or (RewardOptions.of_protocol(protocol) if protocol else RewardOptions())
    if ":" in name:
        plug_in = load_own(name)
        return Reward(plug_in.name, options, plug_in=plug_in)
    entry = reward_entry(name)
    entry.check(options)
    return Reward(name, options, entry=entry)


def load_rewards(
    names: Sequence[str], *, options: RewardOptions | None = None, load_own: Callable[[str], Form] = PlugIn.load
) -> dict[str, Reward]:
    """The rewards by short name; UserError if two have the same short name, because one would hide the other."""
    found: dict[str, Reward] = {}
    for name in names:
        reward = load_reward(name, options=options, load_own=load_own)
        if reward.name in found:
            raise UserError(f"reward_functions: two parts are called {reward.name!r}; rename one of the functions")
        found[reward.name] = reward
    return found
