"""The view ``hidden``: the visual tokens are removed from the prompt, and the pass runs over text alone.

No token can then attend to anything visual, and positions are those of the remaining text. Every prompt with media has
this view. It is the cheapest one: it has fewer rows than the intact view and needs no vision encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ktr.attribution.counterfactuals import can_hide
from megatron_ktr.attribution.views.base import CounterfactualView, Encoded, ViewDraw
from megatron_ktr.types import Prompt, VisualInput

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


class Hidden(CounterfactualView):
    name = "hidden"
    keeps_rows = False
    is_random = False

    def applies(self, prompt: Prompt) -> bool:
        return can_hide(prompt)

    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        return ()

    def encodes(self, options: ObjectiveSection) -> Encoded:
        return "nothing"


HIDDEN = Hidden()
