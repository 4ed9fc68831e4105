"""Tiny random Qwen2.5-VL models in Hugging Face format: the numerical oracle of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig as HFConfig
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

VOCAB_SIZE = 199
"""Prime on purpose: never divisible by a tensor-parallel size, so every test pads the vocabulary."""
VISION_START_ID, VISION_END_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, EOS_ID, PAD_ID = 190, 191, 192, 193, 194, 195
FIRST_SPECIAL_ID = 190


def tiny_hf_config(
    *,
    num_layers: int = 4,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    ffn_size: int = 96,
    tie_word_embeddings: bool = False,
    vocab_size: int = VOCAB_SIZE,
    vision_depth: int = 3,
    vision_hidden_size: int = 32,
    vision_num_heads: int = 4,
    vision_ffn_size: int = 44,
    window_size: int = 56,
    fullatt_block_indexes: tuple[int, ...] = (1,),
    tokens_per_second: int = 2,
    rope_theta: float = 10000.0,
    **text_options: Any,
) -> HFConfig:
    """A complete configuration; head size must be a multiple of 4 for the three M-RoPE sections."""
    head_size = hidden_size // num_heads
    height_section = head_size // 2 * 3 // 8
    section = [head_size // 2 - 2 * height_section, height_section, height_section]
    return HFConfig(
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=ffn_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            tie_word_embeddings=tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta, "mrope_section": section},
            use_sliding_window=False,
            bos_token_id=EOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            **text_options,
        ),
        vision_config=dict(
            depth=vision_depth,
            hidden_size=vision_hidden_size,
            intermediate_size=vision_ffn_size,
            num_heads=vision_num_heads,
            out_hidden_size=hidden_size,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=window_size,
            fullatt_block_indexes=list(fullatt_block_indexes),
            tokens_per_second=tokens_per_second,
        ),
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=VIDEO_TOKEN_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=tie_word_embeddings,
    )


def tiny_hf_model(*, seed: int = 0, std: float = 0.08, dtype: torch.dtype = torch.float32, **options: Any) -> HFModel:
    """A randomly initialised model in evaluation mode. Norm weights and biases are random too (stock
    initialisation makes them ones and zeros, which would hide a mix-up), and large enough for attention to be
    far from uniform."""
    torch.manual_seed(seed)
    config = tiny_hf_config(**options)
    config._attn_implementation = "eager"
    model = HFModel(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype) * std
            is_norm = parameter.ndim == 1 and "norm" in name or name.endswith("ln_q.weight")
            parameter.copy_(1 + noise if is_norm else noise)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def save_tiny_hf(directory: Path | str, **options: Any) -> HFModel:
    """Writes config and weights of ``tiny_hf_model(**options)`` to ``directory`` and returns the model."""
    model = tiny_hf_model(**options)
    model.save_pretrained(directory, safe_serialization=True)
    return model


PARITY_CONFIGS: dict[str, dict[str, Any]] = {
    "untied, one full block": {},
    "tied, gqa 4:1, all window": dict(tie_word_embeddings=True, num_kv_heads=1, fullatt_block_indexes=(), seed=1),
    "tied, mha, window 112": dict(
        tie_word_embeddings=True, num_kv_heads=4, window_size=112, fullatt_block_indexes=(0, 2), seed=2
    ),
    "untied, gqa 8:2, deep vision": dict(
        num_heads=8, num_kv_heads=2, hidden_size=128, vision_depth=4, fullatt_block_indexes=(1, 3), seed=3
    ),
}
"""At least four different shapes. num_kv_heads 1 cannot be split over 2 tensor ranks by weight: megatron-core
requires num_query_groups to be divisible by (or to divide) the tensor-parallel size; tests choose layouts."""
