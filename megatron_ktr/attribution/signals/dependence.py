"""The signal ``dependence``: VPPO's token perception (arXiv 2510.09285, eq. 3), how far the whole distribution of the
next token moves when the picture is taken away.

    S_t = KL(p_intact || p_view)                     ``dependence: kl``, over the whole vocabulary, as in the paper
    S_t = clamp(e^d - d - 1, 0, 10)                  ``dependence: k3``, d = clamp(logp(view) - logp(intact), -20, 20)

The release of VPPO computes k3. It estimates the same KL from the sampled token alone, and is lopsided: a token that
the view makes e^2 times more probable scores 4.39, one that it makes e^2 times less probable scores 1.14. Unlike the
signed shift of ``visual``, both forms are high where the picture makes a token *less* probable, too.

The view is that of the signal ``visual`` (``visual_view``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ktr.attribution.signals.base import Signal, comparing
from megatron_ktr.config.signal_registry import SignalEntry, register_signal

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


def build_dependence(section: ObjectiveSection) -> Signal:
    """The signal as the options describe it; the shaping of advantages reads it too (``attribution/shaping.py``)."""
    return comparing("dependence", measure=section.dependence, view=section.visual_view)


register_signal(
    SignalEntry(
        "dependence",
        "whose whole distribution moves most when the picture is taken away",
        build_dependence,
    )
)
