"""What a counterfactual view is: the same question and responses with other media, or with none.

A signal compares the log-probs of response tokens in the intact view with those in a counterfactual one. Views are
small objects without state. Each says to which prompts it applies, which media it shows, and what a pass over it costs.
``config/view_registry.py`` lists them by name.

Whatever a view draws at random follows from the seed, the step, the prompt's identity and the medium alone
(``generator_of``). All responses of a group, every rank and every parallel layout therefore see the same media.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from megatron_ktr.types import Prompt, VisualInput

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection

Encoded = Literal["nothing", "videos", "media"]
"""The media of a prompt that a view shows with pixels of its own, so that the encoder runs over them again."""


class MediaSizes(Protocol):
    """What views must know of a model's pictures (``batch.packing.MediaSpec`` has it)."""

    @property
    def patch_size(self) -> int: ...

    @property
    def temporal_patch_size(self) -> int: ...

    @property
    def merge_size(self) -> int: ...

    @property
    def pixels_per_unit_C(self) -> Tensor:
        """fp32 [C]: the difference of a pixel's value (0..255) that is 1 after normalisation."""
        ...


@dataclass(frozen=True)
class ViewDraw:
    """Which draw of a random view is meant, and the options and sizes that views read."""

    options: ObjectiveSection
    sizes: MediaSizes
    seed: int
    step: int
    draw: int = 0
    """The index of the draw within the step; a view that is not random has only draw 0."""


@dataclass(frozen=True)
class ViewCost:
    """What one pass over a view costs, for the accounting. It needs no tensors and no prompts."""

    name: str
    passes: int = 1
    """Passes of a step: one for each draw."""
    needs: Literal["media", "video"] = "media"
    """The view applies to prompts with any medium, or only to those with a video."""
    keeps_rows: bool = True
    """False: the visual tokens are removed from the sequence, and the pass is over text alone."""
    encodes: Encoded = "media"


class CounterfactualView(ABC):
    """One counterfactual view. The defaults describe a random view that shows new pixels in the place of all media."""

    name: str = ""
    keeps_rows = True
    """Whether the view has the rows and positions of the intact one. If not, visual tokens are removed."""
    is_random = True
    """Whether several draws (``num_shuffles``) differ."""
    needs: Literal["media", "video"] = "media"
    needs_other_media = False
    """Whether the view shows ``Prompt.other_media``, which are read only if some view needs them."""
    own_options: tuple[str, ...] = ()
    """Options that only this view reads, or this and some other views; refused where no view in use reads them."""

    @abstractmethod
    def applies(self, prompt: Prompt) -> bool:
        """Whether the view differs from the intact one. Where it does not, scores would be rounding: tokens of such
        prompts get none, and the prompt is left out of the pass."""

    @abstractmethod
    def shown(self, prompt: Prompt, draw: ViewDraw) -> tuple[VisualInput, ...]:
        """The media as the view shows them, one for each medium of the prompt and with its grid and timing; empty if
        the view removes them."""

    def shows_intact_patches(self, prompt: Prompt, options: ObjectiveSection) -> bool:
        """Whether some temporal patch is shown as in the intact view, so that both share one run of the encoder."""
        return False

    def encodes(self, options: ObjectiveSection) -> Encoded:
        return "media"

    def num_draws(self, options: ObjectiveSection) -> int:
        return options.num_shuffles if self.is_random else 1

    def cost(self, options: ObjectiveSection) -> ViewCost:
        return ViewCost(
            name=self.name,
            passes=self.num_draws(options),
            needs=self.needs,
            keeps_rows=self.keeps_rows,
            encodes=self.encodes(options),
        )


def generator_of(view: str, prompt: Prompt, draw: ViewDraw, *, medium: int) -> torch.Generator:
    """A random generator on the host that depends on the view, the seed, the step, the prompt, the medium and the draw
    only."""
    # A cryptographic hash, because Python's own hash of a string differs between processes.
    key = "\x1f".join((str(draw.seed), str(draw.step), prompt.identity, str(medium), str(draw.draw), view))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
