"""Qwen2.5-VL's vision encoder on megatron-core transformer layers, tensor parallel.

    patches -> linear embedding -> window order -> depth x (attention, MLP) -> merger -> original order

Attention stays within windows of ``window_size`` pixels, except in the ``fullatt_block_indexes`` layers, where it
spans a whole frame. The merger joins each square of patches into one visual token of the language model's width.
Equal to Hugging Face's ``Qwen2_5_VisionTransformerPretrainedModel`` and to vLLM's.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from megatron_ktr.config.fp8_rules import NUMBERS_PER_ROW, rows_per_rank
from megatron_ktr.errors import UserError
from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.fp8 import used_recipe, vision_fields
from models.qwen2_5_vl.layer_specs import TransformerImpl
from models.qwen2_5_vl.norm import RMSNorm, parameter_device
from models.qwen2_5_vl.vision_layer_spec import VisionSeqParams, vision_layer_spec
from models.qwen2_5_vl.vision_layout import plan_vision


class VisionEncoder(MegatronModule):
    """Encoder and merger. The first pipeline stage holds all of it, split over the tensor-parallel ranks.

    Every tensor rank gets the same patches and returns the same features. Backward expects the full gradient of the
    features on every tensor rank, as the backward of scattering to a sequence-parallel region provides it. It leaves
    identical gradients of the replicated parameters (``patch_embed``, norms, row-parallel biases) on all tensor ranks.

    Parameters: ``patch_embed.weight``, ``decoder.layers.N.*``, ``merger.{ln_q, linear_fc1, linear_fc2}.*``.
    ``patch_embed.weight`` is the published convolution's weight, flattened in the same order as a patch. QKV rows
    are ordered head by head (q, k, v of head 0, then of head 1, ...), as everywhere in megatron-core.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        transformer_config: TransformerConfig,
        process_groups: ProcessGroupCollection,
        transformer_impl: TransformerImpl = "auto",
        fp8: bool = False,
    ) -> None:
        """
        Args:
            config: the encoder's architecture.
            transformer_config: the language model's configuration; it gives precision, initialisation and
                recomputation.
            process_groups: ``tp``, ``pp`` and ``cp`` must be set.
            transformer_impl: whose linear layers and norms to use; attention and merger are the same in both.
            fp8: run the encoder's layers in FP8 if the language model's layers do.

        Raises:
            UserError: the tensor-parallel size does not divide the number of heads.
        """
        tensor_size = process_groups.tp.size()
        if config.num_heads % tensor_size:
            raise UserError(
                f"the vision encoder has {config.num_heads} attention heads, which {tensor_size} tensor-parallel ranks "
                "cannot share; expected a divisor for --tensor-model-parallel-size"
            )
        block_config = vision_transformer_config(
            config, base=transformer_config, tensor_parallel_size=tensor_size, fp8=fp8
        )
        super().__init__(config=block_config)
        self.vision_config = config
        self.tensor_group = process_groups.tp
        """The ranks that split the weights; this rank alone if every rank holds the whole encoder."""
        self.patch_embed = torch.nn.Linear(
            config.patch_dim,
            config.hidden_size,
            bias=False,
            dtype=block_config.params_dtype,
            device=parameter_device(block_config),
        )
        self.decoder = TransformerBlock(
            block_config, vision_layer_spec(transformer_impl), post_layer_norm=False, pg_collection=process_groups
        )
        self.row_multiple = rows_per_rank(used_recipe(block_config), sequence_parallel=False) if block_config.fp8 else 1
        self.merger = PatchMerger(config, transformer_config=block_config, process_groups=process_groups)

    def forward(self, patches_SD: Tensor | None, grid_thw_M3: Tensor) -> Tensor:
        """Features of all visual tokens, in order of occurrence.

        Args:
            patches_SD: [S, channels * temporal_patch * patch * patch], media concatenated; None without media.
            grid_thw_M3: int64 [M, 3]: patches along time, height and width of each medium.

        Returns:
            [S / merge_unit, out_hidden_size] in the parameters' dtype. Without media the result is empty, but still
            connected to every parameter: backward then fills in zero gradients. Ranks with and without media thus
            run the same collectives, and no data-parallel bucket waits for a gradient that never comes.

        Raises:
            ValueError: patches and grids disagree.
        """
        # Transformer Engine caches a layer's FP8 weight until it is told that a step's first micro-batch begins, and
        # megatron-core's schedules tell it so. The encoder also runs outside the schedules: before them, for rollout
        # engines, and in backward. It would then encode with the last step's weights, so every run refreshes the cache.
        self.set_is_first_microbatch()
        grids = [tuple(grid) for grid in grid_thw_M3.tolist()]
        weight = self.patch_embed.weight
        if not grids:
            merge = self.vision_config.spatial_merge_size
            return self._encode(weight.new_zeros(merge * merge, weight.shape[1]), [(1, merge, merge)])[:0]
        num_patches = sum(num_t * num_h * num_w for num_t, num_h, num_w in grids)
        if patches_SD is None or tuple(patches_SD.shape) != (num_patches, weight.shape[1]):
            got = None if patches_SD is None else list(patches_SD.shape)
            raise ValueError(f"vision patches: expected {[num_patches, weight.shape[1]]} for {grids=}, got {got}")
        return self._encode(patches_SD.to(weight.dtype), grids)

    def _encode(self, patches_SD: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        layout = plan_vision(grids, config=self.vision_config).to(patches_SD.device)
        unit = self.vision_config.merge_unit
        # The embedding acts on each patch alone, so the patches can be put in window order before it, while their
        # rows are still narrow.
        ordered_SD = patches_SD.unflatten(0, (-1, unit))[layout.unit_order].flatten(0, 1)
        hidden_S1D = self.patch_embed(ordered_SD)[:, None].contiguous()
        num_patches = len(hidden_S1D)
        num_padding = -num_patches % self.row_multiple
        if num_padding:
            # FP8 needs a number of rows that is a multiple of its block size. The added rows of zeros attend nothing
            # and are dropped before the merger.
            hidden_S1D = pad(hidden_S1D, (0, 0, 0, 0, 0, num_padding))
        hidden_S1D = self.decoder(hidden_S1D, None, packed_seq_params=VisionSeqParams.from_layout(layout))
        return self.merger(hidden_S1D[:num_patches].squeeze(1))[layout.unit_position]


class PatchMerger(MegatronModule):
    """Norm of each patch, then a GELU MLP over the concatenated patches of each merge unit."""

    def __init__(
        self, config: VisionConfig, *, transformer_config: TransformerConfig, process_groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=transformer_config)
        self.merged_hidden_size = config.merged_hidden_size
        self.ln_q = RMSNorm(transformer_config, config.hidden_size, config.rms_norm_eps)
        init_method = transformer_config.init_method
        assert init_method is not None, "core's configuration fills it in"
        self.linear_fc1 = ColumnParallelLinear(
            config.merged_hidden_size,
            config.merged_hidden_size,
            config=transformer_config,
            init_method=init_method,
            bias=True,
            skip_bias_add=False,
            tp_group=process_groups.tp,
        )
        self.linear_fc2 = RowParallelLinear(
            config.merged_hidden_size,
            config.out_hidden_size,
            config=transformer_config,
            init_method=init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=process_groups.tp,
        )

    def forward(self, hidden_SD: Tensor) -> Tensor:
        """[S, hidden_size] -> [S / merge_unit, out_hidden_size]"""
        merged = self.ln_q(hidden_SD).view(-1, self.merged_hidden_size)
        hidden, _ = self.linear_fc1(merged)
        features, _ = self.linear_fc2(gelu(hidden))
        return features


def vision_transformer_config(
    config: VisionConfig, *, base: TransformerConfig, tensor_parallel_size: int, fp8: bool = False
) -> TransformerConfig:
    """megatron-core's configuration of the encoder: the language model's training options, the encoder's sizes.

    The encoder is neither pipeline, context nor sequence parallel: the first stage holds all of it, and its features
    are replicated. It uses FP8 only on request. Autograd accumulates its gradients; its layers do not
    (``products.fuses_weight_gradients`` says why).
    """
    recomputed_layers = None
    if base.recompute_num_layers is not None:
        recomputed_layers = min(base.recompute_num_layers, config.depth)
        # The option was chosen for the language model's number of layers. Uniform recomputation needs blocks of equal
        # size, so take the largest block size up to the option that divides the encoder's depth.
        while base.recompute_method == "uniform" and config.depth % recomputed_layers:
            recomputed_layers -= 1
    ffn_multiple = NUMBERS_PER_ROW[used_recipe(base)] if fp8 and base.fp8 else 1
    modules = base.recompute_modules or []
    if base.recompute_granularity == "selective":
        # The encoder's MLP is left out: with biases, core's selective recomputation of an MLP never ends
        # (``check_transformer_config``).
        modules = [name for name in modules if name != "mlp"]
    return TransformerConfig(
        num_layers=config.depth,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.padded_intermediate_size(tensor_parallel_size * ffn_multiple),
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_heads,
        kv_channels=config.head_size,
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        activation_func=silu,
        gated_linear_unit=True,
        add_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=base.bias_activation_fusion,
        bias_dropout_fusion=False,
        tensor_model_parallel_size=tensor_parallel_size,
        gradient_accumulation_fusion=False,
        params_dtype=base.params_dtype,
        pipeline_dtype=base.pipeline_dtype,
        fp16=base.fp16,
        bf16=base.bf16,
        init_method_std=base.init_method_std,
        use_cpu_initialization=base.use_cpu_initialization,
        perform_initialization=base.perform_initialization,
        deterministic_mode=base.deterministic_mode,
        recompute_granularity=base.recompute_granularity if modules else None,
        recompute_method=base.recompute_method,
        recompute_num_layers=recomputed_layers,
        recompute_modules=modules,
        **vision_fields(base, is_on=fp8),
    )
