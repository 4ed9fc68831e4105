"""The media that counterfactual views show, in tests that do not train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_ktr.attribution.views.base import ViewDraw
from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.config.view_registry import load_view
from megatron_ktr.types import RolloutGroup, VisualInput
from tests.support.groups import MEDIA


def draw_of(*, seed: int = 0, step: int = 0, draw: int = 0, media: MediaSpec = MEDIA, **options: Any) -> ViewDraw:
    return ViewDraw(ObjectiveSection(**options), sizes=media, seed=seed, step=step, draw=draw)


def shown_by(view: str, groups: Sequence[RolloutGroup], **draw: Any) -> list[tuple[VisualInput, ...]]:
    """The media that the view shows, by group."""
    return [load_view(view).shown(group.prompt, draw_of(**draw)) for group in groups]
