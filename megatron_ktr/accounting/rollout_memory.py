"""Estimates the memory of a GPU while a colocated engine generates, and what ``--offload-during-rollout`` frees of it.

    stays      weights; the reference model; FP8's caches of both; cached vision features, which are kept between steps
               if the encoder is frozen; what is reserved
    leaves     gradient buffers, 4 bytes per trainable parameter, and optimizer state as in ``memory.py``
    engine     vLLM while it is awake: its share of the GPU (``--rollout-memory-share``), for weights and key-value
               cache together. ``--engine hf``, on the first rank of a replica: a whole model in the policy's precision,
               which stays during training too, and the keys and values of a batch (``hf_engine_bytes``)

    The peak is stays + leaves + engine without the option, and stays + engine with it. In each step the option moves
    the optimizer state over the bus to the host and back; gradients are freed and start from zero.

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
    """The bytes of ``--engine hf`` on the rank that generates for its replica."""

    weights: float
    """Held always, because this engine does not sleep."""
    batch: float
    """Held only while it generates."""


def hf_engine_bytes(
    config: Qwen2_5_VLConfig, group: GroupWork, *, num_prompts: int, num_shuffled: int = 0, kernels: Kernels = FUSED
) -> HFEngineBytes:
    """The bytes of ``--engine hf`` for ``num_prompts`` prompts of a step, each like ``group``, which run in batches.
    With ``num_shuffled`` responses to a second prompt of each, a batch may be filled up with these.

    weights   all parameters x b
    batch     for S responses (n prompts x G: at most 256, or those of one prompt) of P prompt and R response tokens,
              the larger of
              decoding  S (P + R) x 2 layers K b             keys and values
              prefill   S P x (2 layers K + 3 F) b           keys and values, and the inner rows of one MLP
    """
    text, b, samples = config.text, kernels.bytes_per_number, len(group.response_lengths)
    per_batch = max(1, HF_BATCH_RESPONSES // samples)
    rows = min(num_prompts, per_batch) * samples
    if num_shuffled:
        rows = min(num_prompts * (samples + num_shuffled), max(HF_BATCH_RESPONSES, samples, num_shuffled))
    prompt, response = group.prompt_length(config), max(group.response_lengths)
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_size * b
    decoding = rows * (prompt + response) * kept
    prefill = rows * prompt * (kept + 3 * text.intermediate_size * b)
    return HFEngineBytes(float(b * count_parameters(config, Layout(), rank=0).total), float(max(decoding, prefill)))


@dataclass(frozen=True)
class RolloutMemory:
    """The bytes of one rank while its engine is awake, by part (see the module)."""

    stays: float
    gradients: float
    optimizer: float
    engine: float

    @property
    def peak(self) -> float:
        """The peak without ``--offload-during-rollout``."""
        return self.peak_with_offload + self.gradients + self.optimizer

    @property
    def peak_with_offload(self) -> float:
        """The peak with ``--offload-during-rollout``; ``optimizer`` then crosses the bus twice per step."""
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
    """The memory of pipeline rank ``rank``; ``engine_bytes`` is the memory of the engine while it is awake."""
    states = state_bytes(count_parameters(config, layout, rank=rank), layout, settings=settings, kernels=kernels)
    caches = fp8_cache_bytes(config, layout, rank=rank, settings=settings)
    features = vision_cache_bytes if rank == 0 and settings.is_vision_frozen else 0.0
    return RolloutMemory(
        stays=states["weights"] + states["reference"] + caches + features + reserved_bytes,
        gradients=states["gradients"],
        optimizer=states["optimizer"],
        engine=engine_bytes,
    )
