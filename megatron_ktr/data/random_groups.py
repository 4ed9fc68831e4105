"""Groups of random tokens and frames for measurements, and a source that returns the same groups in every step.

Nothing is read, sampled or rewarded. A step on such groups costs as much as one on recorded responses of the same
sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, Rollout, RolloutGroup, VisualInput


@dataclass(frozen=True)
class SyntheticSizes:
    """The sizes of one prompt with one video, and of its responses. The patch sizes are Qwen2.5-VL's.

    Example: 32 frames of 224 x 448 are 16 x 8 x 16 = 2,048 visual tokens.
    """

    num_frames: int
    height: int
    width: int
    """Height and width of a frame in pixels; multiples of 28."""
    text_length: int
    """The number of prompt tokens that are not visual, including the two that enclose the video."""
    response_lengths: tuple[int, ...]
    seconds_per_grid: float = 1.0

    def __post_init__(self) -> None:
        if self.num_frames < 2 or self.num_frames % 2:
            raise UserError(f"frames must be a positive even number, got {self.num_frames}")
        if min(self.height, self.width) < 28 or self.height % 28 or self.width % 28:
            raise UserError(f"height and width must be positive multiples of 28, got {self.height} x {self.width}")
        if self.text_length < 4 or not self.response_lengths or min(self.response_lengths) < 1:
            raise UserError(
                f"expected at least 4 text tokens and responses of at least one token, got {self.text_length} and "
                f"{self.response_lengths}"
            )

    @property
    def num_visual_tokens(self) -> int:
        return self.num_frames // 2 * (self.height // 28) * (self.width // 28)


@dataclass(frozen=True)
class TokenIds:
    """The size of a vocabulary, and the ids of its tokens with a special meaning."""

    vocab_size: int
    vision_start: int
    vision_end: int
    image: int
    video: int

    @classmethod
    def of(cls, config: Any) -> TokenIds:
        """Reads them from a model's configuration (``Qwen2_5_VLConfig``)."""
        names = ("vision_start", "vision_end", "image", "video")
        return cls(config.text.vocab_size, *(getattr(config, f"{name}_token_id") for name in names))


def synthetic_group(sizes: SyntheticSizes, *, tokens: TokenIds, seed: int) -> RolloutGroup:
    """A random group that depends only on its sizes, the vocabulary and ``seed``, so that every process makes the same
    one. Its rewards differ, so that it has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    grid = (sizes.num_frames // 2, sizes.height // 14, sizes.width // 14)
    frames_FCHW = _frames(sizes.num_frames, sizes.height, sizes.width, generator)
    video = VisualInput("video", frames_FCHW, grid, seconds_per_grid=sizes.seconds_per_grid)
    num_before = sizes.text_length // 4
    prompt = (
        *_words(num_before, tokens, generator),
        tokens.vision_start,
        *[tokens.video] * sizes.num_visual_tokens,
        tokens.vision_end,
        *_words(sizes.text_length - num_before - 2, tokens, generator),
    )
    rollouts = tuple(
        Rollout(
            tuple(_words(length, tokens, generator)), rewards={"accuracy": float(i % 2), "format": float(i % 3 == 0)}
        )
        for i, length in enumerate(sizes.response_lengths)
    )
    return RolloutGroup(Prompt(f"synthetic {seed}", prompt, (video,)), rollouts)


class FixedSource:
    """A source that returns this replica's ``groups`` in every step. It takes the place of a ``ReplicaSource``."""

    num_skipped = 0
    counts: Mapping[str, int] = {}
    data_wait_seconds = 0.0
    shuffled_seconds = 0.0
    step_values: Mapping[str, float] = {}
    needs_weights = False
    gather_weights_to: Literal["all", "source"] = "source"
    needs_vision_weights = False
    lag = 0
    pending_step: int | None = None

    def __init__(self, groups: Sequence[RolloutGroup]) -> None:
        self.groups = list(groups)

    def begin(self, num_prompts: int, *, step: int) -> None:
        if num_prompts != len(self.groups):
            raise ValueError(f"step {step} wants {num_prompts} prompts, this source has {len(self.groups)}")

    def finish(self) -> list[RolloutGroup]:
        return self.groups

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Exhausts the iterator. Nothing samples from the weights."""
        for _ in named_tensors:
            pass

    def settle(self) -> None:
        """Nothing is sampled."""

    def close(self) -> None:
        """Nothing to close."""


def _words(number: int, tokens: TokenIds, generator: torch.Generator) -> list[int]:
    """Random tokens without visual placeholders, because the number of placeholders must match the media."""
    drawn = torch.randint(0, tokens.vocab_size - 2, (number,), generator=generator)
    for placeholder in sorted((tokens.image, tokens.video)):
        drawn = drawn + (drawn >= placeholder)
    return drawn.tolist()


def _frames(num_frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random frames with coarse patterns. They differ from frame to frame, so that their order matters."""
    cells = torch.randint(0, 256, (num_frames, 3, height // 14, width // 14), generator=generator)
    pictures = cells.to(torch.uint8).repeat_interleave(14, 2).repeat_interleave(14, 3)
    noise = torch.randint(0, 40, pictures.shape, generator=generator, dtype=torch.uint8)
    return pictures // 2 + noise
