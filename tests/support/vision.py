"""The vision encoder on test ranks, and Hugging Face's encoder as its oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf_modeling

from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from models.qwen2_5_vl.config import Qwen2_5_VLConfig, VisionConfig
from models.qwen2_5_vl.vision import VisionEncoder
from tests.support.tiny import tiny_hf_config, tiny_hf_model

Grids = list[tuple[int, int, int]]


# --- what runs on the ranks ---------------------------------------------------------------------------------


def run_encoder(
    context, *, options: dict[str, Any], grids: Grids, dtype: torch.dtype, tensor: int, recompute: dict | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and local gradients of the encoder with the weights of the tiny Hugging Face model."""
    groups = context.init(ParallelSizes(tensor=tensor))
    config = vision_config(**options)
    encoder = build_encoder(config, groups=groups, dtype=dtype, recompute=recompute)
    weights = dict(hf_visual(options, dtype=dtype).named_parameters())
    shards = megatron_shards(weights, config=config, rank=groups.tensor_rank, tensor_size=tensor)
    encoder.load_state_dict({name: shard.detach() for name, shard in shards.items()}, strict=False)
    features = encoder(random_patches(grids, dtype=torch.float32), torch.tensor(grids))
    weighted_sum(features).backward()
    return features.detach(), {name: p.grad for name, p in encoder.named_parameters()}


def run_without_media(context) -> tuple[tuple[int, ...], dict[str, Tensor | None]]:
    groups = context.init(ParallelSizes(tensor=2))
    encoder = build_encoder(vision_config(), groups=groups, dtype=torch.float32)
    features = encoder(None, torch.empty(0, 3, dtype=torch.int64))
    hidden = torch.ones(5, 64).index_put((torch.empty(0, dtype=torch.int64),), features)
    hidden.sum().backward()
    return tuple(features.shape), {name: p.grad for name, p in encoder.named_parameters()}


def build_with_odd_heads(context) -> str:
    groups = context.init(ParallelSizes(tensor=2))
    config = VisionConfig(depth=1, hidden_size=36, intermediate_size=8, num_heads=3, out_hidden_size=64)
    try:
        build_encoder(config, groups=groups, dtype=torch.float32)
    except UserError as error:
        return str(error)
    return "no error"


def build_encoder(config: VisionConfig, *, groups, dtype: torch.dtype, recompute: dict | None = None) -> VisionEncoder:
    """The encoder beside a language model whose configuration differs from it wherever it can."""
    language = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=4,
        ffn_hidden_size=96,
        add_bias_linear=False,
        add_qkv_bias=True,
        layernorm_epsilon=1e-5,
        tensor_model_parallel_size=groups.sizes.tensor,
        sequence_parallel=groups.sizes.tensor > 1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **(recompute or {}),
    )
    return VisionEncoder(config, transformer_config=language, process_groups=groups.process_groups)


# --- oracle -------------------------------------------------------------------------------------------------


def config_of(options: dict[str, Any]) -> Qwen2_5_VLConfig:
    options = {name: value for name, value in options.items() if name != "seed"}
    return Qwen2_5_VLConfig.from_hf(tiny_hf_config(**options).to_dict())


def vision_config(**options: Any) -> VisionConfig:
    return config_of(options).vision


def hf_visual(options: dict[str, Any], *, dtype: torch.dtype) -> torch.nn.Module:
    visual = tiny_hf_model(num_layers=1, dtype=dtype, **options).model.visual
    # Eager attention takes the softmax in fp32 whatever the dtype.
    visual.config._attn_implementation = "sdpa"
    return visual


def hf_features_and_grads(
    options: dict[str, Any], grids: Grids, *, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    if monkeypatch is not None:
        monkeypatch.setattr(hf_modeling.Qwen2_5_VLRMSNorm, "forward", _norm_fp64)
        monkeypatch.setattr(hf_modeling, "apply_rotary_pos_emb_vision", _rotary_fp64)
    visual = hf_visual(options, dtype=dtype)
    features = visual(random_patches(grids, dtype=dtype), grid_thw=torch.tensor(grids)).pooler_output
    weighted_sum(features).backward()
    return features.detach(), {name: p.grad for name, p in visual.named_parameters()}


def _norm_fp64(self, x: Tensor) -> Tensor:
    return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def _rotary_fp64(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
    return tuple(x * cos + hf_modeling.rotate_half(x) * sin for x in (q, k))


def random_patches(grids: Grids, *, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=generator).to(dtype)


def weighted_sum(features: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return (features * torch.randn(features.shape, generator=generator).to(features.dtype)).sum()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def megatron_shards(hf: dict[str, Tensor], *, config: VisionConfig, rank: int, tensor_size: int) -> dict[str, Tensor]:
    """Weights (or gradients) of Hugging Face's encoder as this rank's; written out here, apart from ``conversion``."""

    def split(tensor: Tensor, axis: int) -> Tensor:
        return tensor.chunk(tensor_size, dim=axis)[rank]

    def pad(tensor: Tensor, axis: int) -> Tensor:
        extra = list(tensor.shape)
        extra[axis] = config.padded_intermediate_size(tensor_size) - config.intermediate_size
        return torch.cat([tensor, tensor.new_zeros(extra)], dim=axis)

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (3, config.num_heads, config.head_size)).transpose(0, 1).flatten(0, 2)

    shards = {
        "patch_embed.weight": hf["patch_embed.proj.weight"].flatten(1),
        "merger.ln_q.weight": hf["merger.ln_q.weight"],
        "merger.linear_fc1.weight": split(hf["merger.mlp.0.weight"], 0),
        "merger.linear_fc1.bias": split(hf["merger.mlp.0.bias"], 0),
        "merger.linear_fc2.weight": split(hf["merger.mlp.2.weight"], 1),
        "merger.linear_fc2.bias": hf["merger.mlp.2.bias"],
    }
    for n in range(config.depth):
        theirs, ours = f"blocks.{n}.", f"decoder.layers.{n}."
        shards[ours + "input_layernorm.weight"] = hf[theirs + "norm1.weight"]
        shards[ours + "pre_mlp_layernorm.weight"] = hf[theirs + "norm2.weight"]
        shards[ours + "self_attention.linear_proj.weight"] = split(hf[theirs + "attn.proj.weight"], 1)
        shards[ours + "self_attention.linear_proj.bias"] = hf[theirs + "attn.proj.bias"]
        shards[ours + "mlp.linear_fc2.weight"] = split(pad(hf[theirs + "mlp.down_proj.weight"], 1), 1)
        shards[ours + "mlp.linear_fc2.bias"] = hf[theirs + "mlp.down_proj.bias"]
        for kind in ("weight", "bias"):
            shards[ours + f"self_attention.linear_qkv.{kind}"] = split(by_head(hf[theirs + f"attn.qkv.{kind}"]), 0)
            gate, up = (split(pad(hf[theirs + f"mlp.{part}_proj.{kind}"], 0), 0) for part in ("gate", "up"))
            shards[ours + f"mlp.linear_fc1.{kind}"] = torch.cat([gate, up])
    return shards
