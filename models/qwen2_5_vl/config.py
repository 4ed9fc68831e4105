"""Qwen2.5-VL's architecture as frozen dataclasses; field names are Hugging Face's. ``hf_config`` reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TextConfig:
    """The language model: a pre-norm GQA transformer with biases on q, k and v only, SwiGLU and M-RoPE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """How many of the head_size / 2 rotary frequencies follow time, height and width."""
    max_position_embeddings: int = 128000

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder and its merger."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    """Side of an attention window in pixels."""
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    """0-based layers that attend over a whole frame; the others over windows."""
    tokens_per_second: int | float = 4
    """Temporal M-RoPE positions per second of video."""
    in_channels: int = 3
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    """Fixed by the architecture; no ``config.json`` has it."""

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch, in the order channel, frame, row, column."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def merged_hidden_size(self) -> int:
        return self.hidden_size * self.merge_unit

    @property
    def window_side(self) -> int:
        """Side of an attention window in visual tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    def padded_intermediate_size(self, tensor_parallel_size: int) -> int:
        """``intermediate_size`` rounded up to a multiple of the tensor-parallel size (3420 -> 3424 at 8).

        The extra gate, up and down entries are zero, so that they contribute silu(0) * 0 = 0, and their
        gradients are exactly zero too: they stay zero under any optimizer.
        """
        return math.ceil(self.intermediate_size / tensor_parallel_size) * tensor_parallel_size


@dataclass(frozen=True)
class Qwen2_5_VLConfig:
    """Everything the model files need to know; nothing about placement or precision."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, source: Path | str | Mapping[str, Any]) -> Qwen2_5_VLConfig:
        """Reads a model directory, a ``config.json`` or its parsed contents.

        Raises:
            UserError: no such file, not a Qwen2.5-VL, a missing field, or a value this model does not support.
        """
        from models.qwen2_5_vl.hf_config import read_hf_config  # it imports this file

        return read_hf_config(source)

    @property
    def num_parameters(self) -> int:
        """All trainable numbers; a tied embedding counts once."""
        return self.num_text_parameters + self.num_vision_parameters

    @property
    def num_text_parameters(self) -> int:
        text = self.text
        attention_size = text.num_attention_heads * text.head_size
        kv_size = text.num_key_value_heads * text.head_size
        per_layer = (
            text.hidden_size * (attention_size + 2 * kv_size)
            + attention_size
            + 2 * kv_size
            + attention_size * text.hidden_size
            + 3 * text.hidden_size * text.intermediate_size
            + 2 * text.hidden_size
        )
        embeddings = (1 if self.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size
        return embeddings + text.num_hidden_layers * per_layer + text.hidden_size

    @property
    def num_vision_parameters(self) -> int:
        """Encoder and merger, without tensor-parallel padding."""
        vision = self.vision
        width, ffn, merged = vision.hidden_size, vision.intermediate_size, vision.merged_hidden_size
        attention = 4 * width * width + 4 * width
        mlp = 3 * width * ffn + 2 * ffn + width
        merger = width + merged * merged + merged + merged * vision.out_hidden_size + vision.out_hidden_size
        return width * vision.patch_dim + vision.depth * (attention + mlp + 2 * width) + merger
