"""Reads a Hugging Face ``config.json`` of Qwen2.5-VL, and refuses what the model does not support.

It reads all three layouts that exist: the published one (text fields at the top level, ``rope_scaling``,
``in_chans``), that of transformers 5 (``text_config``, ``rope_parameters``, ``in_channels``), and that of late
transformers 4, which has both at once (``text_config`` takes precedence).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ktr.errors import UserError
from megatron_ktr.files.bounded import refuse_pipes
from megatron_ktr.files.json_files import read_json_object
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig

LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 2.0**127
MOST_LAYERS = 4096
"""A config.json with greater values is damaged: sizes must fit in 32 bits, and tables have a row for each layer."""


def read_hf_config(source: Path | str | Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """See ``Qwen2_5_VLConfig.from_hf``."""
    raw, where = _load(source)
    if raw.get("model_type") != "qwen2_5_vl":
        raise UserError(
            f"{where}: expected model_type 'qwen2_5_vl', got {raw.get('model_type')!r}; "
            "--model must be a Qwen2.5-VL directory in Hugging Face format"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantised weights cannot be trained; give the unquantised model to --model")
    text = _object(raw, "text_config", where=where) or raw
    vision = _object(raw, "vision_config", where=where)
    if not vision:
        raise UserError(f"{where}: no vision_config; --model must be a complete Qwen2.5-VL")
    config = Qwen2_5_VLConfig(
        text=_text_config(text, where=f"{where}: text"),
        vision=_vision_config(vision, where=f"{where}: vision"),
        image_token_id=_token_id(raw, "image_token_id", default=151655, where=where),
        video_token_id=_token_id(raw, "video_token_id", default=151656, where=where),
        vision_start_token_id=_token_id(raw, "vision_start_token_id", default=151652, where=where),
        vision_end_token_id=_token_id(raw, "vision_end_token_id", default=151653, where=where),
        # Files written before transformers 5 may have this field only inside text_config; Hugging Face reads both.
        tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )
    _validate(config, where=where)
    return config


def _load(source: Path | str | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "config"
    path = Path(source)
    refuse_pipes(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such file; --model must be a directory with a config.json")
    return read_json_object(path), str(path)


def _object(raw: Mapping[str, Any], name: str, *, where: str) -> Mapping[str, Any]:
    """The section ``name`` of config.json; empty if there is none."""
    value = raw.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected an object in {name} of config.json, got {value!r}")
    return value


def _require(raw: Mapping[str, Any], names: tuple[str, ...], *, where: str) -> dict[str, int]:
    missing = [name for name in names if raw.get(name) is None]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)} in config.json")
    wrong = [f"{name}={raw[name]!r}" for name in names if not _is_positive_int(raw[name])]
    if wrong:
        raise UserError(f"{where}: expected positive integers, got {', '.join(wrong)} in config.json")
    return {name: raw[name] for name in names}


def _token_id(raw: Mapping[str, Any], name: str, *, default: int, where: str) -> int:
    value = default if raw.get(name) is None else raw[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: expected an integer, got {name}={value!r} in config.json")
    return value


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST_NUMBER


def _text_config(raw: Mapping[str, Any], *, where: str) -> TextConfig:
    sizes = _require(
        raw,
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        where=where,
    )
    rope = _object(raw, "rope_parameters", where=where) or _object(raw, "rope_scaling", where=where)
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
    assert rms_norm_eps is not None  # a positive number, as was just found
    return TextConfig(
        **sizes,
        num_key_value_heads=raw.get("num_key_value_heads") or sizes["num_attention_heads"],
        rms_norm_eps=float(rms_norm_eps),
        rope_theta=float(rope_theta),
        mrope_section=tuple(section),
        max_position_embeddings=_require(
            {"max_position_embeddings": 128000, **raw}, ("max_position_embeddings",), where=where
        )["max_position_embeddings"],
    )


def _vision_config(raw: Mapping[str, Any], *, where: str) -> VisionConfig:
    sizes = _require(raw, ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"), where=where)
    # An older config.json may leave these out; every transformers release has the same defaults for them.
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
    rope = _object(raw, "rope_parameters", where=where)
    rope_theta = rope.get("rope_theta", 10000.0)
    if not _is_positive_number(rope_theta):
        raise UserError(f"{where}: expected a positive number, got {rope_theta=}")
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(f"{where}: rope type {rope['rope_type']!r} is not supported, expected 'axial'")
    _require_silu(raw, where=where)
    return VisionConfig(
        **sizes,
        **options,
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        rope_theta=float(rope_theta),
    )


def _require_silu(raw: Mapping[str, Any], *, where: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, expected 'silu'")


def _validate(config: Qwen2_5_VLConfig, *, where: str) -> None:
    """Relations between fields that the model relies on."""
    text, vision = config.text, config.vision
    rules = [
        (
            max(text.num_hidden_layers, vision.depth) <= MOST_LAYERS,
            f"num_hidden_layers {text.num_hidden_layers} or vision depth {vision.depth} is more than {MOST_LAYERS}",
        ),
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
