"""The signal ``temporal``: how much a token owes to the order of the frames, by ``shift`` from the intact view to the
one that ``temporal_view`` names (shuffled, by default).

It says nothing about responses to prompts without a video whose order can be lost. The release of Video-KTR scores
these with 0 if the prompt has a video at all; prompts with images only get no temporal score there either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ktr.attribution.counterfactuals import can_shuffle
from megatron_ktr.attribution.signals.base import Signal, comparing
from megatron_ktr.config.signal_registry import SignalEntry, register_signal
from megatron_ktr.types import Prompt

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


def _has_fixed_video(prompt: Prompt) -> bool:
    return any(medium.kind == "video" for medium in prompt.media) and not can_shuffle(prompt)


def _build(section: ObjectiveSection) -> Signal:
    return comparing("temporal", measure=section.shift, view=section.temporal_view, is_zero_in_release=_has_fixed_video)


register_signal(
    SignalEntry(
        "temporal",
        "whose probability depends most on the order of the frames (compared with shuffled frames, or with the run's "
        "temporal_view)",
        _build,
    )
)
