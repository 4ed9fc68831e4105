"""What one training step has to compute, described without tensors: groups of tokens and patches, and which passes.

Units: rows and tokens are counts, grids are patches (time, height, width) before merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ktr.config.words import ShuffleUnit
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

    @property
    def num_response_tokens(self) -> int:
        return sum(self.response_lengths)

    def num_visual_tokens(self, vision: VisionConfig) -> int:
        return num_patches(self.grids) // vision.merge_unit

    def prompt_length(self, config: Qwen2_5_VLConfig) -> int:
        return self.text_length + self.num_visual_tokens(config.vision)

    @classmethod
    def of(cls, group: Any, *, config: Qwen2_5_VLConfig) -> GroupWork:
        """From a ``RolloutGroup``."""
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
    """Which passes a step runs, and how. The defaults do each piece of work once; ``ORIGINAL`` repeats everything."""

    is_policy_trained: bool = True
    """False: the intact pass is a forward alone."""
    has_hidden: bool = True
    shuffle_unit: ShuffleUnit | None = "frame"
    """None: no shuffled pass."""
    num_shuffles: int = 1
    has_reference: bool = True
    has_selection: bool = False
    """One more intact pass without gradient, before the update."""
    num_updates: int = 1
    compares_distributions: bool = False
    """``shift: kl``: hidden rows of all views meet in one pass over the vocabulary; False: each view's log-probs."""
    recompute: Recompute = "none"
    """``full``: every layer's forward again in backward. ``selective``: the core attention's."""
    recompute_vision: bool = False
    """Keep features only, and run a trained encoder again in backward."""
    frozen: frozenset[str] = frozenset()
    """Some of vision (the encoder without its merger), merger, language."""
    has_adapters: bool = False
    """A frozen language model whose activations have gradients nevertheless, for adapters on it."""
    has_vision_once: bool = True
    """Features of the intact view are shared by all passes with the same encoder weights and content; False: every
    pass that shows media runs the encoder."""
    has_shared_prefix: bool = True
    """The prompt's rows once per group; False: once per response (and with them its media)."""
    is_hidden_masked: bool = False
    """The hidden view keeps its visual tokens (and encodes them), masked; False: they are removed."""
    has_head_everywhere: bool = False
    """Logits of every row; False: of the rows that predict response tokens."""
    key_share: float = 1.0
    """Share of the response rows that have a gradient, which is all that the head's backward touches."""
    has_streamed_head: bool = True
    """The head keeps no logits and makes them again in backward."""
    trains_in_fp8: bool = False
    """Products of the language layers; of the reference model, too."""
    scores_in_fp8: bool = False
    """Those of the counterfactual passes alone."""
    keeps_fp8_weights: bool = False
    """The parameters of these products are in FP8 themselves (``--fp8-param-gather``)."""
    has_fp8_vision: bool = False
    """The encoder's products, too."""

    @property
    def is_vision_kept_for_update(self) -> bool:
        """Passes without gradient read features of the intact view before the update does, from the run that carries
        the encoder's gradient: its activations stay until then."""
        reads_before = self.has_selection or self.shuffle_unit == "temporal_patch"
        return self.has_vision_once and reads_before and not self.recompute_vision and not self.is_vision_frozen

    @property
    def fp8_bytes(self) -> tuple[int, int]:
        """(policy, reference): bytes a weight of what Transformer Engine quantises products' weights to and keeps from
        one micro-batch, and one pass, to the next.

        1 for the weight, 1 for its transpose where the pass has a gradient (2.17.1: ``module/layernorm_linear.py``
        asks for both, ``module/base.py:quantize_weight`` makes them, ``_fp8_workspaces`` holds them). A parameter that
        is in FP8 itself is its own; with its transpose it is as large as one in 16 bits, as which it is counted.
        """
        if self.keeps_fp8_weights:
            return 0, 0
        if self.trains_in_fp8:
            # With adapters the reference is the policy.
            return 2 if self.is_policy_trained else 1, int(self.has_reference and not self.has_adapters)
        has_counterfactuals = self.has_hidden or self.shuffle_unit is not None
        return int(self.scores_in_fp8 and has_counterfactuals), 0

    @property
    def is_vision_frozen(self) -> bool:
        """Encoder and merger: only then are the reference model's features the policy's."""
        return {"vision", "merger"} <= self.frozen


EACH_ONCE = StepSettings()
"""Video-KTR with every piece of work done once and nothing recomputed."""

ORIGINAL = StepSettings(
    recompute="full",
    has_vision_once=False,
    has_shared_prefix=False,
    is_hidden_masked=True,
    has_head_everywhere=True,
    has_streamed_head=False,
)
"""The usual implementation on Hugging Face's model: prompt and media repeated for every response, full logits, the
video masked rather than removed, four passes (policy, hidden, shuffled, reference), gradient checkpointing of the
layers."""


def num_patches(grids: Sequence[Grid]) -> int:
    return sum(t * h * w for t, h, w in grids)


def video_grid(num_frames: int, *, tokens_per_frame: int, vision: VisionConfig) -> Grid:
    """The grid of ``num_frames`` frames of ``tokens_per_frame`` squares of 28 x 28 pixels, as square as can be.

    Frames go in pairs: 32 frames of 128 squares -> (16, 16, 32), 16 x 128 = 2048 visual tokens.
    """
    units_h = max(1, int(tokens_per_frame**0.5))
    while tokens_per_frame % units_h:
        units_h -= 1
    merge = vision.spatial_merge_size
    num_t = -(-num_frames // vision.temporal_patch_size)
    return num_t, units_h * merge, tokens_per_frame // units_h * merge
