"""Qwen2.5-VL's language model in megatron-core's vocabulary: one ``TransformerConfig`` per run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import layers

from megatron_ktr.config.pipeline_split import Split, check_recomputation, chunk_layout, is_even, split_layers
from megatron_ktr.distributed.groups import ParallelSizes, pipeline_comm_settings
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError
from megatron_ktr.stack import no_cuda_graphs
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.fp8 import fp8_settings
from models.qwen2_5_vl.layer_specs import language_layer_spec, resolve_transformer_impl, rotates_in_one_kernel
from models.qwen2_5_vl.products import LanguageConfig

if TYPE_CHECKING:
    from megatron_ktr.config.part_options import ModelOptions


def language_transformer_config(
    model_config: Qwen2_5_VLConfig, *, sizes: ParallelSizes, dtype: torch.dtype, options: ModelOptions | None = None
) -> LanguageConfig:
    """The language model's ``TransformerConfig`` for parallel sizes and a run's options (None: defaults, without DDP).

    Raises:
        UserError: the model's sizes cannot be split in this layout, the model does not support the layout, or a kernel
            that the options ask for is not available here.
    """
    _check_layout(model_config, sizes, dtype=dtype, options=options)
    split = split_layers(
        model_config.text.num_hidden_layers,
        pipeline=sizes.pipeline,
        virtual=_num_chunks(sizes),
        options=options.parallel if options else None,
    )
    if options is not None:
        check_recomputation(split, options=options.parallel)
    try:
        return LanguageConfig(
            **_architecture(model_config),
            **_placement(sizes, split=split, dtype=dtype),
            **pipeline_comm_settings(sizes),
            **_kernels(options),
            **_recompute(options),
            **_mlp_chunks(options),
            **fp8_settings(model_config, sizes=sizes, options=options),
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"megatron-core refuses this model and layout: {error}") from error


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding and output weights: the vocabulary rounded up to a multiple of the tensor-parallel size.

    Padding rows hold zeros, are never looked up, never counted in a softmax and never exported.
    """
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def _architecture(model_config: Qwen2_5_VLConfig) -> dict[str, Any]:
    text = model_config.text
    return dict(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        mrope_section=list(text.mrope_section),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _placement(sizes: ParallelSizes, *, split: Split, dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=_num_chunks(sizes) if _num_chunks(sizes) > 1 else None,
        # Core's other options cover single kinds of uneven stages. This one describes every kind, and core derives the
        # layer offsets from it.
        pipeline_model_parallel_layout=None if is_even(split) else chunk_layout(split),
        # We distribute the rows ourselves before the first layer and gather the keys in the attention, so core's own
        # context parallelism stays off.
        context_parallel_size=1,
        sequence_parallel=sizes.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # The loss that core gets is already divided by the global denominator, so core must only add it up.
        calculate_per_token_loss=True,
    )


def _num_chunks(sizes: ParallelSizes) -> int:
    return sizes.virtual_pipeline or 1


def _kernels(options: ModelOptions | None) -> dict[str, Any]:
    return dict(
        # Core compiles this fusion, which on CPU takes minutes and gains nothing.
        bias_activation_fusion=current().name != "cpu",
        # ``residual.py`` says why.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        # Transformer Engine's kernel rotates a row by the angle at the row's place in its segment. We pass one segment
        # that holds all rows, and one angle per row (``attention.py``), so that M-RoPE is right.
        apply_rope_fusion=rotates_in_one_kernel(options.model.transformer_impl if options else "auto"),
        fuses_weight_gradients=_fuses_weight_gradients(options),
        **no_cuda_graphs(),
    )


def _fuses_weight_gradients(options: ModelOptions | None) -> bool:
    """Whether decoder layers add their weight gradients to the fp32 buffer ``main_grad`` themselves.

    By default they do where a kernel for it exists. The vocabulary head needs no kernel and does so unless the option
    is off. Without a run's options there is no DDP wrapper, and so no such buffer.
    """
    if options is None or options.model.gradient_accumulation_fusion is False:
        return False
    has_kernel = resolve_transformer_impl(options.model.transformer_impl) == "te" or layers._grad_accum_fusion_available
    if options.model.gradient_accumulation_fusion is None:
        return has_kernel and current().name != "cpu"
    if not has_kernel:
        raise UserError(
            "--gradient-accumulation-fusion: the linear layers need Transformer Engine, or APEX's kernel "
            "fused_weight_gradient_mlp_cuda, and neither is here; without the flag the vocabulary head fuses alone"
        )
    return True


def _recompute(options: ModelOptions | None) -> dict[str, Any]:
    if options is None:
        return {}
    parallel = options.parallel
    is_selective = parallel.recompute_granularity == "selective"
    if is_selective and "layernorm" in parallel.recompute_modules and current().name != "cpu":
        # Core needs Transformer Engine to recompute norms, but Transformer Engine's linear layers contain the norms.
        raise UserError(
            "--recompute-modules layernorm: on CUDA there is no norm to recompute, Transformer Engine fuses it into "
            "the linear layer behind it; use core_attn or mlp"
        )
    return dict(
        recompute_modules=list(parallel.recompute_modules),
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
    )


def _mlp_chunks(options: ModelOptions | None) -> dict[str, Any]:
    # megatron-core 0.16 has no such field; ``config/checks.py`` has already refused the option there.
    if options is None or options.parallel.mlp_chunks == 1:
        return {}
    return {"mlp_chunks_for_training": options.parallel.mlp_chunks}


def _check_layout(
    model_config: Qwen2_5_VLConfig, sizes: ParallelSizes, *, dtype: torch.dtype, options: ModelOptions | None
) -> None:
    text = model_config.text
    if text.num_attention_heads % sizes.tensor or text.intermediate_size % sizes.tensor:
        raise UserError(
            f"--tensor-model-parallel-size {sizes.tensor} must divide the {text.num_attention_heads} attention heads "
            f"and the MLP size {text.intermediate_size}"
        )
    if max(text.num_key_value_heads, sizes.tensor) % min(text.num_key_value_heads, sizes.tensor):
        raise UserError(
            f"--tensor-model-parallel-size {sizes.tensor} and the {text.num_key_value_heads} key/value heads: one must "
            "divide the other"
        )
    num_heads = model_config.vision.num_heads
    if (options is None or options.parallel.vision_parallel == "tensor") and num_heads % sizes.tensor:
        raise UserError(
            f"--tensor-model-parallel-size {sizes.tensor} must divide the {num_heads} attention heads of the vision "
            "encoder; or choose --vision-parallel frame, which keeps it whole on every rank"
        )
    if options is not None:
        is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if options.model.token_statistics_impl == "triton" and current().name == "cpu" and not is_interpreted:
            raise UserError("--token-statistics-impl triton runs on CUDA only; use auto, chunked or naive")
        language_layer_spec(options.model.transformer_impl, options.model.attention_impl, dtype=dtype)
