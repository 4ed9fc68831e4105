"""The options of a training run that lay the model out over ranks; the others are in ``config/sections.py``."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.config.cli import option as _option
from megatron_ktr.config.limits import MOST_GB, MOST_GPUS, MOST_LAYERS
from megatron_ktr.config.words import RecomputeGranularity, RecomputeMethod, RecomputeModule, VisionParallel


@dataclass(frozen=True)
class ParallelSection:
    """How the model is laid out over ranks; data-parallel size = ranks / (tensor x pipeline x context)."""

    tensor_model_parallel_size: int = _option(1, "Ranks that share each layer", low=1, high=MOST_GPUS)
    pipeline_model_parallel_size: int = _option(
        1, "Ranks that share the stack of layers; vision is on the first", low=1, high=MOST_GPUS
    )
    num_layers_per_virtual_pipeline_stage: int | None = _option(
        None, "Layers of one interleaved pipeline chunk; none = one chunk per rank", low=1, high=MOST_LAYERS
    )
    num_virtual_stages_per_pipeline_rank: int | None = _option(
        None,
        "Interleaved pipeline chunks per rank, in place of num_layers_per_virtual_pipeline_stage",
        low=1,
        high=MOST_LAYERS,
    )
    decoder_first_pipeline_num_layers: int | None = _option(
        None, "Language layers of the first pipeline stage; none = as many as the others", low=1, high=MOST_LAYERS
    )
    decoder_last_pipeline_num_layers: int | None = _option(
        None, "Language layers of the last pipeline stage; none = as many as the others", low=1, high=MOST_LAYERS
    )
    account_for_embedding_in_pipeline_split: bool = _option(
        False, "Count the embedding as a layer of the first pipeline stage when layers are split"
    )
    account_for_loss_in_pipeline_split: bool = _option(
        False, "Count the vocabulary head as a layer of the last pipeline stage when layers are split"
    )
    account_for_vision_in_pipeline_split: int = _option(
        0,
        "Count the vision encoder as this many layers of the first pipeline stage when layers are split",
        low=0,
        high=MOST_LAYERS,
    )
    context_parallel_size: int = _option(
        1, "Ranks that share each sequence: prompt chunks and whole responses", low=1, high=MOST_GPUS
    )
    sequence_parallel: bool = _option(False, "Split norms and residuals by tokens over the tensor-parallel ranks")
    overlap_grad_reduce: bool = _option(False, "Reduce gradients during backward")
    overlap_param_gather: bool = _option(False, "Gather updated parameters during the next forward")
    recompute_granularity: RecomputeGranularity | None = _option(
        None, "Recompute activations in backward: whole layers, or recompute_modules of every layer"
    )
    recompute_modules: tuple[RecomputeModule, ...] = _option(
        ("core_attn",),
        "Selective recomputation: core attention, the language model's MLPs, norms before attention and MLP",
    )
    recompute_method: RecomputeMethod | None = _option(
        None,
        "Full recomputation in groups of recompute_num_layers layers (uniform; it divides the layers of every pipeline "
        "chunk), or of that many layers per stage (block)",
    )
    recompute_num_layers: int | None = _option(None, "See recompute_method", low=1, high=MOST_LAYERS)
    mlp_chunks: int = _option(
        1,
        "Run the language model's MLPs on this many parts of the rows, one after another, in every pass "
        "(megatron-core 0.19: mlp_chunks_for_training); 1 = all rows at once",
        low=1,
        high=1_000_000,
    )
    vision_parallel: VisionParallel = _option(
        "tensor",
        "Vision encoder: weights split like the language model's, or whole on every rank and the frames split over "
        "tensor x context ranks, which then exchange features only",
    )
    vision_cache_gb: float = _option(
        1.0,
        "Vision features kept on each device of the first stage, in 10^9 bytes: what one step shows in several passes, "
        "and, while the encoder is frozen, what later epochs show again",
        low=0,
        high=MOST_GB,
    )
    recompute_vision: bool = _option(
        False, "Keep features only, and run the vision encoder again in backward, one micro-batch at a time"
    )
