"""Qwen2.5-VL's architecture as frozen dataclasses, read from a Hugging Face ``config.json``.

Two layouts exist and both are read: the published one (text fields at the top level, ``rope_scaling``,
``in_chans``) and the one transformers 5 saves (``text_config``, ``rope_parameters``, ``in_channels``).
Field names are Hugging Face's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError


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
        raw, where = _load(source)
        if raw.get("model_type") != "qwen2_5_vl":
            raise UserError(
                f"{where}: expected model_type 'qwen2_5_vl', got {raw.get('model_type')!r}; "
                "--model must be a Qwen2.5-VL directory in Hugging Face format"
            )
        if raw.get("quantization_config"):
            raise UserError(f"{where}: quantised weights cannot be trained; give the unquantised model to --model")
        text = raw.get("text_config") or raw
        vision = raw.get("vision_config")
        if not vision:
            raise UserError(f"{where}: no vision_config; --model must be a complete Qwen2.5-VL")
        config = cls(
            text=_text_config(text, where=f"{where}: text"),
            vision=_vision_config(vision, where=f"{where}: vision"),
            image_token_id=int(raw.get("image_token_id", 151655)),
            video_token_id=int(raw.get("video_token_id", 151656)),
            vision_start_token_id=int(raw.get("vision_start_token_id", 151652)),
            vision_end_token_id=int(raw.get("vision_end_token_id", 151653)),
            # Saves older than transformers 5 may have it inside text_config only; Hugging Face reads both.
            tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        )
        _validate(config, where=where)
        return config

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


def _load(source: Path | str | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --model must be a directory with a config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw, str(path)


def _require(raw: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> dict[str, int]:
    missing = [name for name in names if raw.get(name) is None]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)} in config.json")
    wrong = [f"{name}={raw[name]!r}" for name in names if not _is_positive_int(raw[name])]
    if wrong:
        raise UserError(f"{where}: expected positive integers, got {', '.join(wrong)} in config.json")
    return {name: raw[name] for name in names}


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _text_config(raw: Mapping[str, Any], *, where: str) -> TextConfig:
    sizes = _require(
        raw,
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        where=where,
    )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise UserError(f"{where}: rope type {rope_type!r} is not supported, expected 'mrope' or 'default'")
    section = rope.get("mrope_section")
    if not isinstance(section, list | tuple) or len(section) != 3 or not all(map(_is_positive_int, section)):
        raise UserError(
            f"{where}: expected mrope_section with three positive integers in rope_scaling or rope_parameters, "
            f"got {section!r}"
        )
    rope_theta = rope.get("rope_theta") or raw.get("rope_theta") or 1000000.0
    rms_norm_eps = raw.get("rms_norm_eps")
    if not _is_positive_number(rope_theta) or not _is_positive_number(rms_norm_eps):
        raise UserError(f"{where}: expected positive numbers, got {rope_theta=} and {rms_norm_eps=}")
    if raw.get("use_sliding_window"):
        raise UserError(f"{where}: sliding-window attention is not supported; set use_sliding_window to false")
    if raw.get("attention_dropout"):
        raise UserError(f"{where}: attention_dropout {raw['attention_dropout']} is not supported, expected 0")
    _require_silu(raw, where=where)
    return TextConfig(
        **sizes,
        num_key_value_heads=raw.get("num_key_value_heads") or sizes["num_attention_heads"],
        rms_norm_eps=float(rms_norm_eps),
        rope_theta=float(rope_theta),
        mrope_section=tuple(section),
        max_position_embeddings=int(raw.get("max_position_embeddings", 128000)),
    )


def _vision_config(raw: Mapping[str, Any], *, where: str) -> VisionConfig:
    sizes = _require(raw, ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"), where=where)
    # What an older config.json leaves out has the same default in every transformers release.
    optional = ("patch_size", "temporal_patch_size", "spatial_merge_size", "window_size")
    sizes |= _require(raw, tuple(name for name in optional if name in raw), where=where)
    options: dict[str, Any] = {}
    if "fullatt_block_indexes" in raw:
        layers = raw["fullatt_block_indexes"]
        if not isinstance(layers, list | tuple):
            raise UserError(f"{where}: expected a list in fullatt_block_indexes, got {layers!r}")
        options["fullatt_block_indexes"] = tuple(layers)
    if "tokens_per_second" in raw:
        options["tokens_per_second"] = raw["tokens_per_second"]
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"{where}: rope type {rope['rope_type']!r} is not supported, expected 'axial'")
    _require_silu(raw, where=where)
    return VisionConfig(
        **sizes,
        **options,
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )


def _require_silu(raw: Mapping[str, Any], *, where: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, expected 'silu'")


def _validate(config: Qwen2_5_VLConfig, *, where: str) -> None:
    """Relations between fields that the model relies on."""
    text, vision = config.text, config.vision
    rules = [
        (
            text.hidden_size % text.num_attention_heads == 0,
            f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {text.num_attention_heads}",
        ),
        (
            _is_positive_int(text.num_key_value_heads) and text.num_attention_heads % text.num_key_value_heads == 0,
            f"num_attention_heads {text.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{text.num_key_value_heads}",
        ),
        (
            2 * sum(text.mrope_section) == text.head_size,
            f"mrope_section {list(text.mrope_section)} must add up to half the head size {text.head_size}",
        ),
        (
            vision.hidden_size % (4 * vision.num_heads) == 0,
            f"vision hidden_size {vision.hidden_size} is not a multiple of 4 * num_heads {vision.num_heads} "
            "(the rotary embedding splits each head in four)",
        ),
        (
            vision.out_hidden_size == text.hidden_size,
            f"vision out_hidden_size {vision.out_hidden_size} differs from the text hidden_size {text.hidden_size}",
        ),
        (
            vision.window_side >= 1,
            f"window_size {vision.window_size} is smaller than one visual token of "
            f"{vision.patch_size * vision.spatial_merge_size} pixels",
        ),
        (
            all(isinstance(i, int) and 0 <= i < vision.depth for i in vision.fullatt_block_indexes),
            f"fullatt_block_indexes {list(vision.fullatt_block_indexes)} must lie in 0..{vision.depth - 1}",
        ),
        (_is_positive_number(vision.tokens_per_second), f"tokens_per_second {vision.tokens_per_second!r}"),
        (_is_positive_int(vision.in_channels), f"vision in_channels {vision.in_channels!r}"),
        (
            all(
                0 <= token < text.vocab_size
                for token in (
                    config.image_token_id,
                    config.video_token_id,
                    config.vision_start_token_id,
                    config.vision_end_token_id,
                )
            ),
            f"a vision token id lies outside the vocabulary of {text.vocab_size}",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(f"{where}: unsupported config.json: {message}")
