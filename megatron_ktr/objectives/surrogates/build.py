"""The surrogates by the value of ``--ratio``. A new one is a file here and a line of ``SURROGATES``."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ktr.config.sections import ObjectiveSection
from megatron_ktr.objectives.surrogates import Surrogate
from megatron_ktr.objectives.surrogates.cispo import Cispo
from megatron_ktr.objectives.surrogates.clipped import Clipped
from megatron_ktr.objectives.surrogates.sequence import SequenceRatio

SURROGATES: dict[str, Callable[[ObjectiveSection], Surrogate]] = {
    "token": lambda section: Clipped(section.clip_low, section.clip_high, dual=section.dual_clip),
    "sequence": lambda section: SequenceRatio(section.clip_low, section.clip_high),
    "sequence_token": lambda section: SequenceRatio(section.clip_low, section.clip_high, is_by_token=True),
    "cispo": lambda section: Cispo(section.ratio_cap),
}


def build_surrogate(section: ObjectiveSection) -> Surrogate:
    return SURROGATES[section.ratio](section)
