"""Architectures of the published Qwen2.5-VL models, for planning without a checkpoint at hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.qwen2_5_vl.config import Qwen2_5_VLConfig, TextConfig, VisionConfig

TOKEN_NAMES = ("image", "video", "vision_start", "vision_end")


def _published(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int = 152064,
    vision_intermediate_size: int = 3420,
    tie_word_embeddings: bool = False,
) -> Qwen2_5_VLConfig:
    """A configuration with the values that all sizes share: the vision encoder except its MLP, token ids, rotary base.

    (All sizes also have attention heads of 128, which follows from the arguments.)
    """
    return Qwen2_5_VLConfig(
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            mrope_section=(16, 24, 24),
            max_position_embeddings=128000,
        ),
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=vision_intermediate_size,
            num_heads=16,
            out_hidden_size=hidden_size,
            tokens_per_second=2,
        ),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=tie_word_embeddings,
    )


PUBLISHED_CONFIGS: dict[str, Qwen2_5_VLConfig] = {
    "3B": _published(
        hidden_size=2048,
        intermediate_size=11008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "7B": _published(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4),
    "32B": _published(
        hidden_size=5120,
        intermediate_size=27648,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        vision_intermediate_size=3456,
    ),
    "72B": _published(
        hidden_size=8192,
        intermediate_size=29568,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        vision_intermediate_size=3456,
    ),
}


def to_hf_config(config: Qwen2_5_VLConfig) -> dict[str, Any]:
    """The contents of a ``config.json`` that ``Qwen2_5_VLConfig.from_hf`` reads as ``config``."""
    text, vision = dataclasses.asdict(config.text), dataclasses.asdict(config.vision)
    sections = text.pop("mrope_section")
    del vision["rope_theta"], vision["rms_norm_eps"]  # fixed by the architecture
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **text,
        "rope_scaling": {"type": "mrope", "mrope_section": list(sections)},
        "vision_config": {**vision, "fullatt_block_indexes": list(vision["fullatt_block_indexes"])},
        "tie_word_embeddings": config.tie_word_embeddings,
        **{f"{name}_token_id": getattr(config, f"{name}_token_id") for name in TOKEN_NAMES},
    }
