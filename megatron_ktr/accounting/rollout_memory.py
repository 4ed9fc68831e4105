"""What one rank's GPU holds while a colocated engine generates, and how much of it ``--offload-during-rollout`` frees.

    stays      weights; the reference model; FP8's caches of both; cached vision features, which outlive a step where
               the encoder is frozen; what is reserved
    leaves     gradient buffers, 4 bytes a trainable parameter, and optimizer state as in ``memory.py``
    engine     awake: its share of the GPU (``--rollout-memory-share``), weights and key-value cache together;
               transformers' (``--engine hf``), on the first rank of a replica: a whole model in the policy's precision,
               which stays while the trainer trains, and a batch's keys and values: see ``hf_engine_bytes``

    peak without the option = stays + leaves + engine, with it = stays + engine
    over the bus in a step  = the optimizer state out and in again; gradients are freed and start from zero

Units: bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ktr.accounting.layout import Layout, count_parameters
from megatron_ktr.accounting.memory import fp8_cache_bytes, state_bytes
from megatron_ktr.accounting.saved import FUSED, Kernels
from megatron_ktr.accounting.work import EACH_ONCE, GroupWork, StepSettings
from megatron_ktr.config.sections import HF_BATCH_RESPONSES
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class HFEngineBytes:
    """On the rank that generates for its replica."""

    weights: float
    """Always: it does not sleep."""
    batch: float
    """While it generates."""


def hf_engine_bytes(
    config: Qwen2_5_VLConfig, group: GroupWork, *, num_prompts: int, kernels: Kernels = FUSED
) -> HFEngineBytes:
    """Of ``--engine hf`` for ``num_prompts`` prompts of a step, each as ``group``, which go in batches.

    weights   all parameters x b
    batch     S responses (n prompts x G, at most 256 or one prompt's) of P prompt and R response tokens, the larger of
              decoding  S (P + R) x 2 layers K b             keys and values
              prefill   S P x (2 layers K + 3 F) b           and the inner rows of one MLP
    """
    text, b, samples = config.text, kernels.bytes_per_number, len(group.response_lengths)
    per_batch = max(1, HF_BATCH_RESPONSES // samples)
    rows = min(num_prompts, per_batch) * samples
    prompt, response = group.prompt_length(config), max(group.response_lengths)
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_size * b
    decoding = rows * (prompt + response) * kept
    prefill = rows * prompt * (kept + 3 * text.intermediate_size * b)
    return HFEngineBytes(float(b * count_parameters(config, Layout(), rank=0).total), float(max(decoding, prefill)))


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
    caches = fp8_cache_bytes(config, layout, rank=rank, settings=settings)
    features = vision_cache_bytes if rank == 0 and settings.is_vision_frozen else 0.0
    return RolloutMemory(
        stays=states["weights"] + states["reference"] + caches + features + reserved_bytes,
        gradients=states["gradients"],
        optimizer=states["optimizer"],
        engine=engine_bytes,
    )
