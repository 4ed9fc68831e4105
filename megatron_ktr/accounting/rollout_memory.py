"""What one rank's GPU holds while a colocated engine generates, and how much of it ``--offload-during-rollout`` frees.

    stays      weights; the reference model; cached vision features, which outlive a step where the encoder is frozen;
               what is reserved
    leaves     gradient buffers, 4 bytes a trainable parameter, and optimizer state as in ``memory.py``
    engine     awake: its share of the GPU (``--rollout-memory-share``), weights and key-value cache together

    peak without the option = stays + leaves + engine, with it = stays + engine
    over the bus in a step  = the optimizer state out and in again; gradients are freed and start from zero

Units: bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.accounting.layout import Layout, count_parameters
from megatron_ktr.accounting.memory import state_bytes
from megatron_ktr.accounting.saved import FUSED, Kernels
from megatron_ktr.accounting.work import EACH_ONCE, StepSettings
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class RolloutMemory:
    """Bytes of one rank while its engine is awake."""

    stays: float
    gradients: float
    optimizer: float
    engine: float

    @property
    def peak(self) -> float:
        """Without ``--offload-during-rollout``."""
        return self.peak_with_offload + self.gradients + self.optimizer

    @property
    def peak_with_offload(self) -> float:
        """``optimizer`` then goes over the bus twice a step: out and in again."""
        return self.stays + self.engine


def estimate_rollout_memory(
    config: Qwen2_5_VLConfig,
    layout: Layout,
    *,
    rank: int,
    settings: StepSettings = EACH_ONCE,
    kernels: Kernels = FUSED,
    vision_cache_bytes: float = 1e9,
    engine_bytes: float = 0.0,
    reserved_bytes: float = 0.0,
) -> RolloutMemory:
    """Of pipeline rank ``rank``; ``engine_bytes`` awake."""
    states = state_bytes(count_parameters(config, layout, rank=rank), layout, settings=settings, kernels=kernels)
    features = vision_cache_bytes if rank == 0 and settings.is_vision_frozen else 0.0
    return RolloutMemory(
        stays=states["weights"] + states["reference"] + features + reserved_bytes,
        gradients=states["gradients"],
        optimizer=states["optimizer"],
        engine=engine_bytes,
    )
