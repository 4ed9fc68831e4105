"""The signal ``entropy``: H_t = -sum_v p(v) log p(v) of the policy on the intact view, over the full vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_ktr.attribution.signals.base import Signal
from megatron_ktr.config.signal_registry import SignalEntry, register_signal
from megatron_ktr.types import TokenScores

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


def _entropy(scores: TokenScores, dtype: torch.dtype) -> Tensor:
    if scores.entropy_R is None:
        raise ValueError("signal 'entropy' needs TokenScores.entropy_R, which was not computed")
    return scores.entropy_R


def _build(section: ObjectiveSection) -> Signal:
    return Signal("entropy", _entropy)


register_signal(SignalEntry("entropy", "where the model was least sure what to write", _build))
