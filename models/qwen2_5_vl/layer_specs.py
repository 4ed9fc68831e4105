"""Which module plays which part in a language layer: the local specification and the Transformer Engine one.

=====================  ======================================  ==========================================
part                   local (CPU, CUDA without TE)            Transformer Engine
=====================  ======================================  ==========================================
norm before attention  ``RMSNorm``                             fused into linear_qkv (``layer_norm_weight``)
linear_qkv             ColumnParallelLinear                    TELayerNormColumnParallelLinear
core attention         ``PrefixCoreAttention``                 TE attention, bottom-right causal, packed
linear_proj            RowParallelLinear                       TERowParallelLinear
norm before the MLP    ``RMSNorm``                             fused into linear_fc1 (``layer_norm_weight``)
linear_fc1             ColumnParallelLinear                    TELayerNormColumnParallelLinear
linear_fc2             RowParallelLinear                       TERowParallelLinear
final norm             ``RMSNorm``                             TENorm
=====================  ======================================  ==========================================

Both keep the same keys in a distributed checkpoint. Only this file may import Transformer Engine, and only once it
is known to be there: it is importable, and a CPU run never asks for it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from models.qwen2_5_vl.attention import PrefixCoreAttention, PrefixSeqParams
from models.qwen2_5_vl.norm import RMSNorm

TransformerImpl = Literal["auto", "te", "local"]


def resolve_transformer_impl(impl: TransformerImpl) -> Literal["local", "te"]:
    """ "auto" is "te" where Transformer Engine is installed and the platform can run it, otherwise "local".

    Raises:
        UserError: an unknown name, or "te" where it cannot run.
    """
    if impl not in ("auto", "te", "local"):
        raise UserError(f"transformer_impl must be auto, te or local, got {impl!r} (--transformer-impl)")
    has_te = importlib.util.find_spec("transformer_engine") is not None
    can_run_te = has_te and current().name != "cpu"
    if impl == "te" and not can_run_te:
        missing = "the CPU platform cannot run it" if has_te else "transformer_engine is not installed"
        raise UserError(f"transformer_impl 'te' needs Transformer Engine, but {missing}; use --transformer-impl local")
    return "te" if impl != "local" and can_run_te else "local"


def language_layer_spec(impl: TransformerImpl) -> ModuleSpec:
    """One layer of the language model: grouped-query attention over a shared prefix, gated MLP."""
    if resolve_transformer_impl(impl) == "te":
        return _te_layer()
    return _local_layer()


def language_block_spec(
    config: TransformerConfig, *, impl: TransformerImpl, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this (virtual) pipeline stage and the final norm; core would choose its own norm otherwise."""
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[language_layer_spec(impl)] * num_layers, layer_norm=norm_class(impl))


def norm_class(impl: TransformerImpl) -> Any:
    """Norm outside fused layers: of the block's end."""
    return _te_modules().norm if resolve_transformer_impl(impl) == "te" else RMSNorm


def _local_layer() -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PrefixCoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=None,
        k_layernorm=None,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            # TE keeps these norms inside the linear layer that follows; one checkpoint serves both.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _te_layer() -> ModuleSpec:
    te = _te_modules()
    attention = SelfAttentionSubmodules(
        linear_qkv=te.norm_column_linear,
        core_attention=te.PrefixCoreAttention,
        linear_proj=te.row_linear,
        q_layernorm=None,
        k_layernorm=None,
    )
    mlp = MLPSubmodules(linear_fc1=te.norm_column_linear, linear_fc2=te.row_linear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


@cache
def _te_modules() -> SimpleNamespace:
    """Transformer Engine's modules as megatron-core wraps them; defined on demand because they need TE to exist."""
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    class TEPrefixCoreAttention(TEDotProductAttention):
        """Shared-prefix attention: keys and values gathered per response, bottom-right causal inside each segment.

        Core's ``AttnMaskType`` has no name for that mask, and core passes only ``mask.name`` on to TE: a stand-in
        with the right name does. It is put in here, not by the caller, because selective recomputation rebuilds the
        caller's mask type as an enumeration member.
        """

        def forward(  # type: ignore[override]
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: AttnMaskType | None = None,
            attention_bias: Tensor | None = None,
            packed_seq_params: PrefixSeqParams | None = None,
            **kwargs: Any,
        ) -> Tensor:
            plan = packed_seq_params.varlen_plan(query.device)
            segments = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=plan.cu_seqlens_q,
                cu_seqlens_kv=plan.cu_seqlens_kv,
                max_seqlen_q=plan.max_seqlen_q,
                max_seqlen_kv=plan.max_seqlen_kv,
            )
            mask = SimpleNamespace(name="padding_causal_bottom_right")
            return super().forward(
                query,
                key.index_select(0, plan.kv_rows),
                value.index_select(0, plan.kv_rows),
                None,
                attn_mask_type=mask,
                packed_seq_params=segments,
                **kwargs,
            )

    return SimpleNamespace(
        PrefixCoreAttention=TEPrefixCoreAttention,
        norm=TENorm,
        norm_column_linear=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
    )
