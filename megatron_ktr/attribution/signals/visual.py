"""The signal ``visual``: how much a token owes to seeing the video, by ``shift`` from the intact view to the one that
``visual_view`` names (the video hidden, by default).

It says nothing about responses to prompts without media. The release of Video-KTR scores these with 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ktr.attribution.signals.base import Signal, comparing
from megatron_ktr.config.signal_registry import SignalEntry, register_signal
from megatron_ktr.types import Prompt

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


def _has_no_media(prompt: Prompt) -> bool:
    return not prompt.media


def _build(section: ObjectiveSection) -> Signal:
    return comparing("visual", measure=section.shift, view=section.visual_view, is_zero_in_release=_has_no_media)


register_signal(
    SignalEntry(
        "visual",
        "whose probability depends most on seeing the video (compared with the video hidden, or with the run's "
        "visual_view)",
        _build,
    )
)
