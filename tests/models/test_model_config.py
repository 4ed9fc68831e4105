"""Reading Qwen2.5-VL's config.json in both layouts, refusing what the model does not support, and its sizes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig as HFConfig
from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

from megatron_ktr.errors import UserError
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS
from tests.support.tiny import tiny_hf_config

FLAT_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
"""The published layout."""


def flat_config(size: str) -> dict[str, Any]:
    """``FLAT_3B`` with another published size's numbers."""
    published = PUBLISHED_CONFIGS[size]
    flat = copy.deepcopy(FLAT_3B)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        flat[name] = getattr(published.text, name)
    flat["num_key_value_heads"] = published.text.num_key_value_heads
    flat["tie_word_embeddings"] = published.tie_word_embeddings
    flat["vision_config"]["intermediate_size"] = published.vision.intermediate_size
    flat["vision_config"]["out_hidden_size"] = published.vision.out_hidden_size
    return flat


def test_published_flat_layout_is_read() -> None:
    config = Qwen2_5_VLConfig.from_hf(FLAT_3B)
    assert config == PUBLISHED_CONFIGS["3B"]
    assert (config.text.head_size, config.vision.head_size) == (128, 80)
    assert (config.vision.patch_dim, config.vision.merged_hidden_size) == (1176, 5120)
    assert config.vision.window_side == 4


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "72B"])
def test_flat_and_transformers_5_layouts_agree(size: str, tmp_path) -> None:
    flat = flat_config(size)
    HFConfig(**copy.deepcopy(flat)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in saved and "rope_scaling" not in saved
    assert Qwen2_5_VLConfig.from_hf(tmp_path) == Qwen2_5_VLConfig.from_hf(flat) == PUBLISHED_CONFIGS[size]


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "72B"])
def test_layout_of_late_transformers_4_is_read_from_its_text_config(size: str) -> None:
    """It repeats the text fields at the top level, where a stale value must not count."""
    flat = flat_config(size)
    vision = flat.pop("vision_config") | {"in_channels": 3, "model_type": "qwen2_5_vl"}
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    text = flat | {"model_type": "qwen2_5_vl_text", "rope_scaling": rope, "image_token_id": None}
    raw = flat | {"text_config": text, "vision_config": vision, "hidden_size": 1}
    assert Qwen2_5_VLConfig.from_hf(raw) == PUBLISHED_CONFIGS[size]


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "72B"])
def test_parameter_count_equals_hugging_face(size: str) -> None:
    with torch.device("meta"):
        model = HFModel(HFConfig(**copy.deepcopy(flat_config(size))))
    config = PUBLISHED_CONFIGS[size]
    assert config.num_vision_parameters == sum(p.numel() for p in model.model.visual.parameters())
    # parameters() yields a tied tensor once.
    assert config.num_parameters == sum(p.numel() for p in model.parameters())


def test_tiny_config_is_read_field_by_field() -> None:
    hf = tiny_hf_config(tie_word_embeddings=True, tokens_per_second=3, rope_theta=5000.0)
    config = Qwen2_5_VLConfig.from_hf(hf.to_dict())
    assert config.tie_word_embeddings and config.text.rope_theta == 5000.0 and config.vision.tokens_per_second == 3
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(config.text, name) == getattr(hf.text_config, name)
    assert config.text.mrope_section == tuple(hf.text_config.rope_parameters["mrope_section"])
    assert config.vision.fullatt_block_indexes == (1,)


def test_tying_named_only_inside_text_config_counts() -> None:
    raw = tiny_hf_config().to_dict()
    raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"] = False, True
    assert Qwen2_5_VLConfig.from_hf(raw).tie_word_embeddings
    assert HFConfig(**raw).tie_word_embeddings


def test_padding_of_the_vision_mlp() -> None:
    assert [PUBLISHED_CONFIGS["7B"].vision.padded_intermediate_size(tp) for tp in (1, 2, 4, 8)] == [
        3420,
        3420,
        3420,
        3424,
    ]
    assert PUBLISHED_CONFIGS["72B"].vision.padded_intermediate_size(8) == 3456


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED_CONFIGS["7B"].text.hidden_size = 1


def _with(path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(FLAT_3B)
    *parents, name = path.split(".")
    target = raw
    for parent in parents:
        target = target[parent]
    if value is None:
        del target[name]
    else:
        target[name] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model_type", "qwen2_vl", "expected model_type 'qwen2_5_vl', got 'qwen2_vl'"),
        ("hidden_size", None, "missing hidden_size"),
        ("num_hidden_layers", "36", "num_hidden_layers='36'"),
        ("vision_config", None, "no vision_config"),
        ("vision_config.depth", None, "missing depth"),
        ("vision_config.out_hidden_size", 1024, "out_hidden_size 1024 differs"),
        ("vision_config.fullatt_block_indexes", [32], "fullatt_block_indexes"),
        ("vision_config.window_size", 20, "window_size 20"),
        ("vision_config.num_heads", 7, "num_heads 7"),
        ("rope_scaling", None, "mrope_section"),
        ("rope_scaling.mrope_section", [16, 24, 25], "half the head size"),
        ("rope_scaling.type", "yarn", "rope type 'yarn'"),
        ("num_attention_heads", 15, "num_attention_heads 15"),
        ("num_key_value_heads", 3, "num_key_value_heads 3"),
        ("use_sliding_window", True, "sliding-window"),
        ("hidden_act", "gelu", "hidden_act"),
        ("image_token_id", 151936, "outside the vocabulary"),
        ("quantization_config", {"quant_method": "awq"}, "quantised"),
    ],
)
def test_unsupported_config_is_one_clear_error(path: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Qwen2_5_VLConfig.from_hf(_with(path, value))


def test_missing_and_broken_files_are_user_errors(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Qwen2_5_VLConfig.from_hf(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        Qwen2_5_VLConfig.from_hf(tmp_path)


def test_a_pipe_as_a_model_or_in_its_directory_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "nowhere").symlink_to("absent")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match="tokenizer.json is a pipe"):
            Qwen2_5_VLConfig.from_hf(path)
