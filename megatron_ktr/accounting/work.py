"""Describes what one training step has to compute, without tensors: groups of tokens and patches, and the passes.

Units: rows and tokens are counts, grids are patches (time, height, width) before merging.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from megatron_ktr.attribution.views.base import ViewCost
from megatron_ktr.config.objective_section import ObjectiveSection
from megatron_ktr.config.view_registry import load_view
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig

Grid = tuple[int, int, int]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class GroupWork:
    """One prompt and its responses.

    Example: 32 frames of 8 x 16 visual tokens, 200 text tokens, 8 responses of 768 tokens:
    ``GroupWork(text_length=200, response_lengths=(768,) * 8, video_grids=((16, 16, 32),))``.
    """

    text_length: int
    """Prompt tokens that are not visual."""
    response_lengths: tuple[int, ...]
    video_grids: tuple[Grid, ...] = ()
    image_grids: tuple[Grid, ...] = ()

    @property
    def grids(self) -> tuple[Grid, ...]:
        return self.video_grids + self.image_grids

    def has(self, view: ViewCost) -> bool:
        """Whether the view applies to the prompt."""
        return bool(self.video_grids if view.needs == "video" else self.grids)

    def seen_in(self, view: ViewCost) -> GroupWork:
        """The group with the rows that the view has."""
        return self if view.keeps_rows else GroupWork(self.text_length, self.response_lengths)

    def encoded_in(self, view: ViewCost, *, has_vision_once: bool) -> GroupWork:
        """The group with the media that the encoder processes for the view."""
        shown = self.seen_in(view)
        if not has_vision_once or view.encodes == "media":
            return shown
        return dataclasses.replace(shown, image_grids=(), video_grids=shown.video_grids * (view.encodes == "videos"))

    @cached_property
    def num_response_tokens(self) -> int:
        return sum(self.response_lengths)

    @cached_property
    def num_response_pairs(self) -> int:
        """Pairs of two tokens of one response."""
        return sum(length * length for length in self.response_lengths)

    @cached_property
    def _num_patches(self) -> int:
        return num_patches(self.grids)

    def num_visual_tokens(self, vision: VisionConfig) -> int:
        return self._num_patches // vision.merge_unit

    def prompt_length(self, config: Qwen2_5_VLConfig) -> int:
        return self.text_length + self.num_visual_tokens(config.vision)

    @classmethod
    def of(cls, group: Any, *, config: Qwen2_5_VLConfig) -> GroupWork:
        """The work of a ``RolloutGroup``."""
        media = group.prompt.media
        videos = tuple(tuple(medium.grid_thw) for medium in media if medium.kind == "video")
        images = tuple(tuple(medium.grid_thw) for medium in media if medium.kind != "video")
        num_visual = num_patches(videos + images) // config.vision.merge_unit
        return cls(
            text_length=len(group.prompt.token_ids) - num_visual,
            response_lengths=tuple(len(rollout.token_ids) for rollout in group.rollouts),
            video_grids=videos,
            image_grids=images,
        )


@dataclass(frozen=True)
class StepSettings:
    """The passes that a step runs, and how. The defaults do no work twice; ``ORIGINAL`` repeats everything."""

    is_policy_trained: bool = True
    """False: the intact pass is only a forward."""
    views: tuple[ViewCost, ...] = field(default_factory=lambda: view_costs(ObjectiveSection()))
    """The counterfactual views that are scored."""
    noise_passes: float = 0.0
    """Intact passes without gradient that measure the noise of scores, in the mean over steps."""
    has_reference: bool = True
    has_selection: bool = False
    """Whether one more intact pass without gradient runs before the update."""
    num_updates: int = 1
    """How often the rollout is trained on."""
    mini_batches: int = 1
    """The optimizer steps each time; each trains on its own share of the groups."""
    compares_distributions: bool = False
    """True (``shift: kl``): one pass over the vocabulary compares the hidden rows of all views. False: each view's own
    pass computes log-probabilities."""
    compares_reference: bool = False
    """True: the KL to the reference model is taken over the whole vocabulary. The reference's pass ends with its hidden
    rows, which wait for the intact passes; each of those computes the reference's distributions beside its own."""
    has_reference_kl_gradient: bool = False
    """Whether that KL is a term of the loss: the head's backward then recomputes the reference's logits too."""
    recompute: Recompute = "none"
    """``full``: backward runs every layer's forward again. ``selective``: only the core attention's."""
    recompute_vision: bool = False
    """Keep only the features, and run a trained encoder again in backward."""
    frozen: frozenset[str] = frozenset()
    """The frozen parts: any of vision (the encoder without its merger), merger, language."""
    has_adapters: bool = False
    """The language model is frozen, but its activations have gradients, because adapters on it are trained."""
    has_vision_once: bool = True
    """True: all passes with the same encoder weights and content share the features of the intact view. False: every
    pass that shows media runs the encoder."""
    has_shared_prefix: bool = True
    """True: the prompt's rows are computed once per group. False: once per response, together with its media."""
    has_head_everywhere: bool = False
    """True: logits are computed for every row. False: only for the rows that predict response tokens."""
    key_share: float = 1.0
    """The share of response rows that have a gradient; the head's backward computes only these."""
    has_streamed_head: bool = True
    """The head keeps no logits and recomputes them in backward."""
    trains_in_fp8: bool = False
    """The products of the language layers, and of the reference model's, are in FP8."""
    scores_in_fp8: bool = False
    """Only the products of the counterfactual passes are in FP8."""
    keeps_fp8_weights: bool = False
    """The weights of these products are stored in FP8 (``--fp8-param-gather``)."""
    has_fp8_vision: bool = False
    """The encoder's products are in FP8 as well."""

    @property
    def is_vision_kept_for_update(self) -> bool:
        """Whether the encoder's activations are kept from before the update until the update's backward.

        That is so if passes without gradient need features of the intact view before the update: they take them from
        the same run of the encoder that later carries its gradient.
        """
        moves_features = any(view.keeps_rows and view.encodes == "nothing" for view in self.views)
        reads_before = self.has_selection or moves_features
        return self.has_vision_once and reads_before and not self.recompute_vision and not self.is_vision_frozen

    @property
    def fp8_bytes(self) -> tuple[int, int]:
        """(policy, reference): bytes per weight of the quantised copies that Transformer Engine caches.

        It keeps them from one micro-batch, and one pass, to the next: 1 byte for the weight, and 1 for its transpose if
        the pass has a gradient. (In 2.17.1, ``module/layernorm_linear.py`` asks for both,
        ``module/base.py:quantize_weight`` makes them, and ``_fp8_workspaces`` holds them.) A parameter that is itself
        in FP8 needs no copy; with its transpose it is as large as a 16-bit parameter, and it is counted as one.
        """
        if self.keeps_fp8_weights:
            return 0, 0
        if self.trains_in_fp8:
            # With adapters, the reference model is the policy with its adapters off, and needs no copies.
            return 2 if self.is_policy_trained else 1, int(self.has_reference and not self.has_adapters)
        return int(self.scores_in_fp8 and bool(self.views)), 0

    @property
    def is_vision_frozen(self) -> bool:
        """Whether encoder and merger are both frozen; only then can the reference model use the policy's features."""
        return {"vision", "merger"} <= self.frozen


def view_costs(options: ObjectiveSection, names: Iterable[str] | None = None) -> tuple[ViewCost, ...]:
    """What the views called ``names`` cost with these options, or, without names, the views that the options name."""
    chosen = (options.visual_view, options.temporal_view) if names is None else sorted(names)
    return tuple(load_view(name).cost(options) for name in chosen)


EACH_ONCE = StepSettings()
"""Video-KTR with every piece of work done once and nothing recomputed."""

ORIGINAL = StepSettings(
    views=tuple(dataclasses.replace(view, keeps_rows=True, encodes="media") for view in EACH_ONCE.views),
    recompute="full",
    has_vision_once=False,
    has_shared_prefix=False,
    has_head_everywhere=True,
    has_streamed_head=False,
)
"""The usual implementation on Hugging Face's model. It repeats prompt and media for every response, computes full
logits, masks the video rather than removing it, runs four passes (policy, hidden, shuffled, reference), and uses
gradient checkpointing of the layers."""


def num_patches(grids: Sequence[Grid]) -> int:
    return sum(t * h * w for t, h, w in grids)


def video_grid(num_frames: int, *, tokens_per_frame: int, vision: VisionConfig) -> Grid:
    """The grid of ``num_frames`` frames of ``tokens_per_frame`` squares of 28 x 28 pixels, as square as possible.

    Two frames make one temporal patch: 32 frames of 128 squares give (16, 16, 32), or 16 x 128 = 2048 visual tokens.
    """
    units_h = max(1, int(tokens_per_frame**0.5))
    while tokens_per_frame % units_h:
        units_h -= 1
    merge = vision.spatial_merge_size
    num_t = -(-num_frames // vision.temporal_patch_size)
    return num_t, units_h * merge, tokens_per_frame // units_h * merge
