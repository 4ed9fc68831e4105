"""The view ``other_video``: the media of another question, in the frame number and size of this prompt's own.

The other question is chosen where the prompt is read (``data/other_media.py``), from the seed and the place of the
prompt in the data. It therefore does not depend on the micro-batch, the replica or the parallel layout, and its files
are never the prompt's own. A prompt for which no other media could be read has no such view.

The rows are those of the intact view, and the encoder runs over all media again. There is one draw. Besides, a second
record is decoded for each prompt, and its frames travel with the prompt, which doubles the host memory of media.
"""

from __future__ import annotations

from megatron_ktr.attribution.views.base import CounterfactualView, ViewDraw
from megatron_ktr.types import Prompt, VisualInput


class OtherVideo(CounterfactualView):
    name = "other_video"
    is_random = False
    needs_other_media = True

    def applies(self, prompt: Prompt) -> bool:
        return bool(prompt.other_media)

    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        return prompt.other_media


OTHER_VIDEO = OtherVideo()
