"""Builds megatron-core's data-parallel wrapper, optimizer and learning-rate schedule.

The scale of gradients: the loss that backward starts from is already divided by the *global* number of responses (or
tokens). Data-parallel ranks must therefore add gradients, not average them. ``calculate_per_token_loss`` in the
transformer configuration makes megatron-core's DDP do exactly that (gradient scaling factor 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from megatron_ktr.config.sections import OptimizerSection, ParallelSection
from megatron_ktr.distributed.checks import (
    check_every_rank_skips,
    check_optimizer_config,
    check_transformer_config,
)
from megatron_ktr.distributed.platform import current
from megatron_ktr.errors import UserError


def freeze_parts(chunks: Sequence[MegatronModule], parts: Sequence[str]) -> None:
    """Freezes parts of the model: ``vision`` (the encoder without its merger), ``merger`` or ``language``."""
    prefixes = {"vision": "vision.", "merger": "vision.merger.", "language": "language."}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            is_merger = name.startswith("vision.merger.")
            for part in parts:
                if part not in prefixes:
                    raise UserError(f"freeze: unknown part {part!r}, expected some of {sorted(prefixes)}")
                if name.startswith(prefixes[part]) and not (part == "vision" and is_merger):
                    parameter.requires_grad_(False)


def wrap_in_ddp(
    chunks: Sequence[MegatronModule],
    *,
    config: TransformerConfig,
    optimizer: OptimizerSection,
    parallel: ParallelSection,
) -> list[DistributedDataParallel]:
    """Wraps the pipeline chunks of one rank in DDP. Parameters that are frozen before this call get no buffers."""
    check_transformer_config(config)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        average_in_collective=False,
        fp8_param_gather=config.fp8_param,
    )
    return [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            # There is no Float16Module in between: parameters already have their dtype, and it would convert the
            # head's input to fp32.
            module=chunk,
            # Later chunks must not be bucketed: their parameter gathers would be launched out of order.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    ddp_chunks: Sequence[DistributedDataParallel],
    *,
    section: OptimizerSection,
    dtype: torch.dtype,
    overlap_param_gather: bool,
) -> MegatronOptimizer:
    """Builds Adam or SGD inside megatron-core's (distributed) mixed-precision optimizer, which keeps fp32 main
    parameters for bf16 weights.

    Vision parameters get their own learning rate if ``vision_lr`` is set. Biases have no weight decay; norms have it
    only with ``weight_decay_norms``.

    Raises:
        UserError: SGD is combined with the distributed optimizer, which megatron-core cannot checkpoint, or
            ``grad_norm_skip_threshold`` is set and a rank has no parameters to update.
    """
    model_config = get_model_config(ddp_chunks[0])
    config = OptimizerConfig(
        optimizer=section.optimizer,
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        sgd_momentum=0.0,
        clip_grad=section.clip_grad,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=section.use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
        fp8_recipe=model_config.fp8_recipe if model_config.fp8 else None,
        **_skips(section),
    )
    check_optimizer_config(config, platform=current())
    no_decay = ParamKey(name="*.bias")
    if not section.weight_decay_norms:
        no_decay = ParamKey(name="*.bias", predicate=ParamPredicate(name="vector", fn=lambda p: p.ndim == 1))
    overrides: dict[ParamKey, Any] = {no_decay: {"wd_mult": 0.0}}
    if section.vision_lr is not None:
        overrides[ParamKey(name="*vision.*")] = {
            "max_lr": section.vision_lr,
            # The vision rate decays in proportion, so that one schedule serves both.
            "min_lr": section.min_lr * section.vision_lr / section.lr,
        }
    chunks: list[Any] = list(ddp_chunks)
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    if section.grad_norm_skip_threshold is not None:
        check_every_rank_skips(optimizer)
    return optimizer


def _skips(section: OptimizerSection) -> dict[str, Any]:
    # megatron-core 0.16 has no such field; there ``config/checks.py`` has already refused the option.
    threshold = section.grad_norm_skip_threshold
    return {} if threshold is None else {"grad_norm_skip_threshold": threshold}


def build_scheduler(optimizer: MegatronOptimizer, *, section: OptimizerSection, length: int) -> OptimizerParamScheduler:
    """A schedule of linear warm-up, then cosine, linear or constant decay, down to ``min_lr``.

    ``length`` is what the run counts for it, in optimizer steps or in samples (``config/schedule.py``). The decay ends
    there, or at ``lr_decay_samples``.
    """
    warmup = (section.lr_warmup_samples or 0) if section.counts_samples else section.lr_warmup_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(section.lr_decay_samples or length, warmup + 1),
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
