"""The vision encoder's transformer layer in megatron-core's terms, and its core attention.

All linear layers are megatron-core's own, also where the language model runs on Transformer Engine: the encoder
stays in bf16 under FP8 (its MLP of 3420 is no multiple of 16), and its attention batches windows of equal size,
which needs no variable-length kernel. So parameter names do not depend on ``transformer_impl``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_ktr.ops.prefix_attention import segment_attention
from models.qwen2_5_vl.norm import RMSNorm
from models.qwen2_5_vl.vision_layout import VisionLayout


@dataclass
class VisionSeqParams(PackedSeqParams):
    """Carries the layout through megatron-core's layers, which hand their ``packed_seq_params`` to the attention."""

    layout: VisionLayout | None = None

    @classmethod
    def from_layout(cls, layout: VisionLayout) -> VisionSeqParams:
        """``thd`` makes core drop the batch axis of q, k and v, and restore it on the output."""
        return cls(qkv_format="thd", layout=layout)


class VisionCoreAttention(MegatronModule):
    """Two-dimensional rotary embedding, then attention within this layer's segments, in both directions.

    The rotation happens here rather than in core because Hugging Face and vLLM rotate in fp32, whereas core rounds
    sine and cosine to the activations' dtype.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, softmax_scale: float | None = None, **_unused: Any
    ) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1
        self.softmax_scale = softmax_scale

    def forward(
        self,
        q_SNH: Tensor,
        k_SNH: Tensor,
        v_SNH: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: VisionSeqParams,
        **_unused: Any,
    ) -> Tensor:
        """Returns [S, N * H]; N counts this tensor rank's heads. The mask arguments of core are not used."""
        layout = packed_seq_params.layout
        out_SNH = segment_attention(
            rotate(q_SNH, cos_SH=layout.cos_SH, sin_SH=layout.sin_SH),
            rotate(k_SNH, cos_SH=layout.cos_SH, sin_SH=layout.sin_SH),
            v_SNH,
            cu_seqlens=layout.segment_bounds(self.layer),
            scale=self.softmax_scale,
        )
        return out_SNH.flatten(1)


def rotate(x_SNH: Tensor, *, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` in at least fp32, returned in the dtype of x."""
    wide = x_SNH.to(torch.promote_types(x_SNH.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    rotated = wide * cos_SH[:, None] + torch.cat([-second, first], dim=-1) * sin_SH[:, None]
    return rotated.to(x_SNH.dtype)


def vision_layer_spec() -> ModuleSpec:
    """Pre-norm attention and gated MLP; the biases come from ``add_bias_linear`` of the configuration."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=VisionCoreAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
