"""The objectives that exist, and what other parts of the program must know of each without knowing it by name.

An objective's file (``megatron_ktr/objectives/NAME.py``) calls ``register`` when it is imported. Besides that, an
objective needs only its name in ``BUILT_IN``. Names are listed here so that they are known without importing the
files, which import torch. A file is imported when its objective is first asked for: when a configuration is checked,
when the objective is built, or when the reference page is written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_ktr.config.cli import did_you_mean
from megatron_ktr.errors import UserError

if TYPE_CHECKING:
    from megatron_ktr.config.sections import ObjectiveSection, RolloutSection

BUILT_IN = (
    "video_ktr",
    "grpo",
    "t_grpo",
    "tw_grpo",
    "dapo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "gspo",
    "cispo",
    "entropy_80_20",
    "vppo",
    "sft",
)
"""Each is a module of ``megatron_ktr.objectives`` that registers the objective of the same name."""

Rule = Callable[["ObjectiveSection", "RolloutSection"], Iterable[str]]
"""Gives one sentence for each problem that the options have with the objective; no sentence where all is well."""


@dataclass(frozen=True)
class ObjectiveEntry:
    """What an objective says about itself."""

    name: str
    """The value of ``--objective``."""
    title: str
    """What reports and tables call it."""
    summary: str
    """One sentence for the reference page: what the objective optimises."""
    build: Callable[..., Any]
    """``build(section, context)`` makes the ``Objective`` from the objective section; ``context`` is a
    ``BuildContext`` (``objectives/policy_gradient.py``). It may raise ``ValueError`` for a setting out of range."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What options are with this objective where the user gives nothing, by name of the option. So a comparison of
    algorithms changes one line, the objective. Options of any section may be named."""
    rules: tuple[Rule, ...] = ()
    """Relations between options that hold for this objective alone."""
    own_options: tuple[str, ...] = ()
    """Options of the objective section that no other objective reads. Another objective refuses them when they differ
    from their defaults. One that several objectives read is named by each of them."""
    is_supervised: bool = False
    """True where the responses are given in ``data_path``: then nothing is sampled and nothing is rewarded."""


_entries: dict[str, ObjectiveEntry] = {}


def register(entry: ObjectiveEntry) -> None:
    """Makes an objective available by its name.

    Raises:
        ValueError: another objective has the name already.
    """
    if _entries.setdefault(entry.name, entry) != entry:
        raise ValueError(f"two objectives are called {entry.name!r}")


def available_objectives() -> tuple[str, ...]:
    """The names that can be trained with; no objective is imported."""
    return (*BUILT_IN, *(name for name in _entries if name not in BUILT_IN))


def objective_entry(name: str) -> ObjectiveEntry:
    """What the objective called ``name`` says about itself; imports its file where that has not happened yet.

    Raises:
        UserError: there is no such objective; the message has the nearest name.
    """
    if name not in available_objectives():
        raise UserError(
            f"objective: unknown objective {name!r}, expected one of {', '.join(available_objectives())}"
            f"{did_you_mean(name, available_objectives())}"
        )
    if name not in _entries:
        importlib.import_module(f"megatron_ktr.objectives.{name}")
    return _entries[name]


def options_of_others(name: str) -> tuple[str, ...]:
    """Options of the objective section that some other objective calls its own and the objective ``name`` does not."""
    entries = [objective_entry(other) for other in available_objectives()]
    own = set(objective_entry(name).own_options)
    return tuple(dict.fromkeys(option for entry in entries for option in entry.own_options if option not in own))
