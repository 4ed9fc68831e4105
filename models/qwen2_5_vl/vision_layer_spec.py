"""The vision encoder's transformer layer in megatron-core's terms, and its core attention.

As in the language model, linear layers and norms are either megatron-core's own or Transformer Engine's. Both use the
same keys in a distributed checkpoint: those of the plain layers, as every checkpoint so far has been written. The
attention is ours in both cases (``ops/segment_attention.py``), and it rotates in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import pad

from megatron_ktr.distributed.platform import current
from megatron_ktr.ops.segment_attention import segment_attention
from megatron_ktr.stack import mlp_submodule
from models.qwen2_5_vl.layer_specs import TransformerImpl, resolve_transformer_impl, te_modules
from models.qwen2_5_vl.norm import RMSNorm
from models.qwen2_5_vl.residual import RESIDUAL_ADDITION
from models.qwen2_5_vl.vision_layout import VisionLayout


@dataclass
class VisionSeqParams(PackedSeqParams):
    """Carries the layout through megatron-core's layers: they pass ``packed_seq_params`` on to the attention."""

    layout: VisionLayout | None = None

    @classmethod
    def from_layout(cls, layout: VisionLayout) -> VisionSeqParams:
        """Makes the parameters; ``thd`` makes core drop the batch axis of q, k and v, and restore it on the output."""
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
        self.rotate = rotate if current().name == "cpu" else _compiled_rotate()

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
        """Returns [S, N * H]; N counts this tensor rank's heads. The mask arguments of core are not used.

        Rows beyond the layout's are padding (FP8): they attend nothing, nobody attends them, their output is zero.
        """
        layout = packed_seq_params.layout
        assert layout is not None, "``from_layout`` made these parameters"
        num_patches = len(layout.cos_SH)
        out_SNH = segment_attention(
            self.rotate(q_SNH[:num_patches], cos_SH=layout.cos_SH, sin_SH=layout.sin_SH),
            self.rotate(k_SNH[:num_patches], cos_SH=layout.cos_SH, sin_SH=layout.sin_SH),
            v_SNH[:num_patches],
            segments=layout.segments(self.layer),
            scale=self.softmax_scale,
        )
        num_padding = len(q_SNH) - num_patches
        return pad(out_SNH.flatten(1), (0, 0, 0, num_padding)) if num_padding else out_SNH.flatten(1)


def rotate(x_SNH: Tensor, *, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` in at least fp32, returned in the dtype of x."""
    wide = x_SNH.to(torch.promote_types(x_SNH.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    rotated = wide * cos_SH[:, None] + torch.cat([-second, first], dim=-1) * sin_SH[:, None]
    return rotated.to(x_SNH.dtype)


@cache
def _compiled_rotate() -> Any:
    """``rotate`` compiled to one kernel instead of eight.

    The number of patches is dynamic, so it is compiled only twice: once with and once without gradient.
    """
    return torch.compile(rotate, dynamic=True)


def vision_layer_spec(impl: TransformerImpl = "auto") -> ModuleSpec:
    """Pre-norm attention and gated MLP; the biases come from ``add_bias_linear`` of the configuration."""
    if resolve_transformer_impl(impl) == "te":
        te = te_modules()
        # Transformer Engine keeps these norms inside the linear layer that follows. They are stored under the plain
        # layers' keys, so that one checkpoint serves both.
        stored_as = {
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }
        return _layer(IdentityOp, te.norm_column_linear, te.row_linear, stored_as=stored_as)
    return _layer(RMSNorm, ColumnParallelLinear, RowParallelLinear, stored_as={})


def _layer(norm: Any, column_linear: Any, row_linear: Any, *, stored_as: dict[str, str]) -> ModuleSpec:
    core_attention: Any = VisionCoreAttention  # core's protocol names arguments that are not used here
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column_linear, core_attention=core_attention, linear_proj=row_linear
                ),
            ),
            self_attn_bda=RESIDUAL_ADDITION,
            pre_mlp_layernorm=norm,
            mlp=mlp_submodule(column_linear, row_linear),
            mlp_bda=RESIDUAL_ADDITION,
            sharded_state_dict_keys_map=stored_as,
        ),
    )
