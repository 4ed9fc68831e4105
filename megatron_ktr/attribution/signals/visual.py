"""The signal ``visual``: how much a token owes to seeing the video, by ``shift`` from the intact to the hidden view.

It says nothing about responses to prompts without media. The release of Video-KTR scores these with 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ktr.attribution.counterfactuals import can_hide
from megatron_ktr.attribution.signals.base import Comparison, Signal
from megatron_ktr.config.signal_registry import SignalEntry, register_signal
from megatron_ktr.types import Prompt

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


def _has_no_media(prompt: Prompt) -> bool:
    return not prompt.media


def _build(section: ObjectiveSection) -> Signal:
    view = "hidden"
    return Signal(
        "visual",
        Comparison(section.shift, view),
        view=view,
        needs_kl=section.shift == "kl",
        applies=can_hide,
        is_zero_in_release=_has_no_media,
    )


register_signal(
    SignalEntry(
        "visual",
        "whose probability depends most on seeing the video (compared with the video hidden)",
        _build,
    )
)
