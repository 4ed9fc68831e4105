"""The signals that exist, by name; importing this module imports neither torch nor a signal.

A signal's file (``megatron_ktr/attribution/signals/NAME.py``) calls ``register_signal`` when it is imported. Besides
that, a signal needs only its name in ``BUILT_IN_SIGNALS``. A file is imported when its signal is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ktr.config.cli import did_you_mean
from megatron_ktr.config.words import SELECTIONS
from megatron_ktr.errors import UserError

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection

BUILT_IN_SIGNALS = ("entropy", "visual", "temporal", "dependence")
"""Each is a module of ``megatron_ktr.attribution.signals`` that registers the signal of the same name."""


@dataclass(frozen=True)
class SignalEntry:
    """What a signal says about itself."""

    name: str
    """A word of ``--signals``, and what metrics and reports call the signal."""
    meaning: str
    """What a token is that the signal selects, to be read after "tokens": "where the model was least sure"."""
    build: Callable[[ObjectiveSection], Any]
    """Makes the ``attribution.signals.base.Signal`` from the objective section."""


_entries: dict[str, SignalEntry] = {}


def register_signal(entry: SignalEntry) -> None:
    """Makes a signal available by its name.

    Raises:
        ValueError: another signal, or a word of ``--selection``, has the name already.
    """
    if entry.name in (*SELECTIONS, "weighted"):
        raise ValueError(f"a signal cannot be called {entry.name!r}, which is how a selection is called")
    if _entries.setdefault(entry.name, entry) != entry:
        raise ValueError(f"two signals are called {entry.name!r}")


def available_signals() -> tuple[str, ...]:
    """The names that ``--signals`` may have; no signal is imported."""
    return (*BUILT_IN_SIGNALS, *(name for name in _entries if name not in BUILT_IN_SIGNALS))


def signal_entry(name: str) -> SignalEntry:
    """What the signal called ``name`` says about itself; imports its file where that has not happened yet.

    Raises:
        UserError: there is no such signal; the message has the nearest name.
    """
    known = available_signals()
    if name not in known:
        raise UserError(
            f"--signals: unknown signal {name!r}, expected some of {', '.join(known)}{did_you_mean(name, known)}"
        )
    if name not in _entries:
        importlib.import_module(f"megatron_ktr.attribution.signals.{name}")
    return _entries[name]
