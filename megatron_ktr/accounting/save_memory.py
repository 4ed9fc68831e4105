"""Estimates the extra memory of one rank for saving a training checkpoint (``run/checkpoint.py``).

    host     what the rank will write, until it is written: 12 per trainable parameter (fp32 main weights, two moments)
             and b per parameter; data x context ranks share the writing
    device   nothing if parameters are 16- or 32-bit numbers; 2 per weight that is kept in FP8, for its 16-bit copy

Units: bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.accounting.layout import Layout, count_parameters, count_product_weights
from megatron_ktr.accounting.saved import FUSED, Kernels
from megatron_ktr.accounting.work import EACH_ONCE, StepSettings
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class SaveMemory:
    """The bytes of one rank, in addition to what training holds."""

    host: float
    device: float


def estimate_save_memory(
    config: Qwen2_5_VLConfig,
    layout: Layout,
    *,
    rank: int,
    settings: StepSettings = EACH_ONCE,
    kernels: Kernels = FUSED,
) -> SaveMemory:
    """The extra memory of pipeline rank ``rank``."""
    parameters = count_parameters(config, layout, rank=rank)
    language, vision = count_product_weights(config, layout, rank=rank)
    written = 12 * parameters.trainable(settings.frozen) + kernels.bytes_per_number * parameters.total
    in_fp8 = (language + vision * settings.has_fp8_vision) * settings.keeps_fp8_weights
    return SaveMemory(host=written / (layout.data * layout.context), device=2.0 * in_fp8)
