"""The counterfactual views that exist, by the signal that compares with them, and how their files are found.

A view is an input that a response is scored under once more (``attribution/views/base.py``). To add one, write one file
and add a line here, or call ``register_view`` from outside of the project. Nothing else knows a view by name: scoring,
packing, accounting and planning ask the view itself.

Names stand here, below the files that they name, so that options can list them without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megatron_ktr.config.cli import did_you_mean
from megatron_ktr.errors import UserError

if TYPE_CHECKING:
    from megatron_ktr.attribution.views.base import CounterfactualView

_FOLDER = "megatron_ktr.attribution.views"
VISUAL_VIEWS: dict[str, str] = {
    "hidden": f"{_FOLDER}.hidden:HIDDEN",
    "patches": f"{_FOLDER}.patches:PATCHES",
    "noise": f"{_FOLDER}.noise:NOISE",
    "other_video": f"{_FOLDER}.other_video:OTHER_VIDEO",
}
"""Name -> module:attribute of the views that ``visual_view`` can name."""
TEMPORAL_VIEWS: dict[str, str] = {
    "shuffled": f"{_FOLDER}.shuffled:SHUFFLED",
    "reversed": f"{_FOLDER}.reversed:REVERSED",
}
"""The same of ``temporal_view``."""


def visual_views() -> tuple[str, ...]:
    return tuple(VISUAL_VIEWS)


def temporal_views() -> tuple[str, ...]:
    return tuple(TEMPORAL_VIEWS)


def register_view(name: str, place: str, *, is_temporal: bool) -> None:
    """Makes a view of one's own available: ``place`` is its module:attribute, ``is_temporal`` the signal it serves.

    Raises:
        ValueError: another view has the name already.
    """
    if {**VISUAL_VIEWS, **TEMPORAL_VIEWS}.get(name, place) != place:
        raise ValueError(f"two views are called {name!r}")
    (TEMPORAL_VIEWS if is_temporal else VISUAL_VIEWS)[name] = place


def load_view(name: str) -> CounterfactualView:
    """The view called ``name``; imports its file if that has not happened yet.

    Raises:
        UserError: there is no such view; the message has the nearest name.
    """
    known = {**VISUAL_VIEWS, **TEMPORAL_VIEWS}
    if name not in known:
        raise UserError(f"unknown view {name!r}, expected one of {', '.join(known)}{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
