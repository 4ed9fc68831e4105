"""The modules of a language layer, in the local specification and in the Transformer Engine one.

=====================  ======================================  ==========================================
part                   local (CPU, CUDA without TE)            Transformer Engine
=====================  ======================================  ==========================================
norm before attention  ``RMSNorm``                             fused into linear_qkv (``layer_norm_weight``)
linear_qkv             ``ColumnLinear``                        TELayerNormColumnParallelLinear
core attention         ``PrefixCoreAttention``                 TE attention, bottom-right causal, packed (*)
linear_proj            ``RowLinear``                           TERowParallelLinear
norm before the MLP    ``RMSNorm``                             fused into linear_fc1 (``layer_norm_weight``)
linear_fc1             ``ColumnLinear``                        TELayerNormColumnParallelLinear
linear_fc2             ``RowLinear``                           TERowParallelLinear
final norm             ``RMSNorm``                             TENorm
=====================  ======================================  ==========================================

``products.py`` defines the linear layers of the left column, and the wrapper that lowers the precision of those in the
right column.
(*) ``attention_impl`` chooses the attention. "te" is Transformer Engine's; it is the default of the right column where
Transformer Engine has a fused kernel (``megatron_ktr/ops/te_attention.py``). "torch", "merged" and "varlen" are
``PrefixCoreAttention`` with that implementation, in either column.

Both specifications write the same keys to a distributed checkpoint. Only this file may import Transformer Engine, and
only after a check that it is installed and that the run is not on CPU. ``vision_layer_spec.py`` builds the vision
encoder's layers from the same modules.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import pad

from megatron_ktr.config.words import TRANSFORMER_IMPLS, AttentionImpl, TransformerImpl
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.ops.prefix_attention import attend_nothing
from megatron_ktr.ops.prefix_attention_plan import VarlenCall
from megatron_ktr.ops.te_attention import flash_attn_version, why_not_fused
from megatron_ktr.stack import mlp_submodule
from models.qwen2_5_vl.attention import PrefixCoreAttention, PrefixSeqParams
from models.qwen2_5_vl.norm import RMSNorm
from models.qwen2_5_vl.products import ColumnLinear, RowLinear, lowerable, product_dtype
from models.qwen2_5_vl.residual import RESIDUAL_ADDITION


def resolve_transformer_impl(impl: TransformerImpl) -> Literal["local", "te"]:
    """Resolves "auto": to "te" if Transformer Engine is installed and the platform can run it, otherwise to "local".

    Raises:
        UserError: an unknown name, or "te" where it cannot run.
    """
    if impl not in TRANSFORMER_IMPLS:
        raise UserError(f"transformer_impl must be auto, te or local, got {impl!r} (--transformer-impl)")
    has_te = importlib.util.find_spec("transformer_engine") is not None
    can_run_te = has_te and current().name != "cpu"
    if impl == "te" and not can_run_te:
        missing = "the CPU platform cannot run it" if has_te else "transformer_engine is not installed"
        raise UserError(f"transformer_impl 'te' needs Transformer Engine, but {missing}; use --transformer-impl local")
    return "te" if impl != "local" and can_run_te else "local"


def language_layer_spec(
    impl: TransformerImpl, attention_impl: AttentionImpl = "auto", *, dtype: torch.dtype
) -> ModuleSpec:
    """One layer of the language model: grouped-query attention over a shared prefix, gated MLP.

    Raises:
        UserError: Transformer Engine's attention is asked for in layers without Transformer Engine, or it has no fused
            kernel for ``dtype`` on this device; or varlen is asked for on CPU.
    """
    uses_te = resolve_transformer_impl(impl) == "te"
    if attention_impl == "varlen" and current().name == "cpu":
        raise UserError("--attention-impl varlen runs on CUDA only; use auto, merged or torch")
    if attention_impl == "te" and not uses_te:
        raise UserError("--attention-impl te needs --transformer-impl te; use auto, torch, merged or varlen")
    if uses_te and attention_impl in ("auto", "te"):
        problem = why_not_fused(
            capability=current().compute_capability, is_half=dtype.itemsize == 2, flash_attn=flash_attn_version()
        )
        if problem is None:
            return _te_layer(te_modules().PrefixCoreAttention)
        if attention_impl == "te":
            raise UserError(f"--attention-impl te is Transformer Engine's attention: {problem}; use auto")
    attention = ModuleSpec(module=PrefixCoreAttention, params={"impl": attention_impl})
    return _te_layer(attention) if uses_te else _local_layer(attention)


def language_block_spec(
    config: TransformerConfig,
    *,
    impl: TransformerImpl,
    attention_impl: AttentionImpl = "auto",
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this (virtual) pipeline stage, and the final norm (else core would choose a norm of its own)."""
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    layer = language_layer_spec(impl, attention_impl, dtype=config.params_dtype)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm_class(impl))


def rotates_in_one_kernel(impl: TransformerImpl) -> bool:
    """Whether the rotary embedding of queries and keys is Transformer Engine's kernel rather than core's eight."""
    return resolve_transformer_impl(impl) == "te" and te_modules().rotates


def norm_class(impl: TransformerImpl) -> Any:
    """The class of the norm at the end of the block, the only norm that is never fused into a linear layer."""
    return te_modules().norm if resolve_transformer_impl(impl) == "te" else RMSNorm


def _local_layer(core_attention: Any) -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnLinear,
        core_attention=core_attention,
        linear_proj=RowLinear,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=RESIDUAL_ADDITION,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp_submodule(ColumnLinear, RowLinear),
            mlp_bda=RESIDUAL_ADDITION,
            # TE keeps these norms inside the linear layer that follows. The local layers use TE's keys, so that one
            # checkpoint serves both.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _te_layer(core_attention: Any) -> ModuleSpec:
    te = te_modules()
    column_linear, row_linear = lowerable(te.norm_column_linear), lowerable(te.row_linear)
    attention = SelfAttentionSubmodules(
        linear_qkv=column_linear,
        core_attention=core_attention,
        linear_proj=row_linear,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=RESIDUAL_ADDITION,
            pre_mlp_layernorm=IdentityOp,
            mlp=mlp_submodule(column_linear, row_linear),
            mlp_bda=RESIDUAL_ADDITION,
        ),
    )


def _with_padding_rows(out: Tensor, num_padding: int) -> Tensor:
    """Appends the output of the padding rows, which attend nothing: zeros. ``out`` may have any number of axes."""
    return pad(out, (0, 0) * (out.dim() - 1) + (0, num_padding)) if num_padding else out


def _packed_params(call: VarlenCall) -> PackedSeqParams:
    """The segments of ``call``, in the form in which megatron-core hands them to Transformer Engine."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_kv=call.cu_seqlens_kv,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_kv=call.max_seqlen_kv,
    )


@cache
def te_modules() -> SimpleNamespace:
    """Transformer Engine's modules as megatron-core wraps them; imported here because TE may not be installed."""
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    class TEPrefixCoreAttention(TEDotProductAttention):
        """Shared-prefix attention: keys and values gathered per response, bottom-right causal inside each segment.

        Core's ``AttnMaskType`` has no member for that mask. Core passes only ``mask.name`` on to TE, so an object with
        the right name is enough. This class makes that object itself, because selective recomputation turns the
        caller's mask type back into an enumeration member.
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
            own_dtype = query.dtype
            lower = product_dtype(self.config) or own_dtype
            query, key, value = query.to(lower), key.to(lower), value.to(lower)
            assert packed_seq_params is not None and packed_seq_params.plan is not None, "the language model gives both"
            if packed_seq_params.exchange is not None:
                key, value = packed_seq_params.exchange(key, value)
            plan = packed_seq_params.plan
            if not plan.segments:
                # A context rank may own no segment of a short sequence, and TE's kernels need at least one.
                return attend_nothing(query, key, value).flatten(1).to(own_dtype)
            call, copies = plan.whole_call(query.device), plan.whole_copies(query.device)
            mask: Any = SimpleNamespace(name="padding_causal_bottom_right")
            out = super().forward(
                query[: plan.num_attending],
                copies.take(key),
                copies.take(value),
                None,
                attn_mask_type=mask,
                packed_seq_params=_packed_params(call),
                **kwargs,
            )
            out = out.to(own_dtype)
            return _with_padding_rows(out, plan.num_padding)

    return SimpleNamespace(
        PrefixCoreAttention=TEPrefixCoreAttention,
        norm=TENorm,
        norm_column_linear=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        rotates=True,
    )
