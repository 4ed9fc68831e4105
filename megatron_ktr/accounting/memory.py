"""Peak memory of one rank in a training step, by part.

    weights      parameters of the rank's stage x b
    gradients    trainable parameters x 4: the fp32 buffer that micro-batches and replicas add up in
    optimizer    Adam's two moments, fp32: 8 a trainable parameter; 12 in 16 bits, with the fp32 main parameters;
                 divided by data x context ranks under the distributed optimizer
    reference    parameters x b, where there is a KL term; nothing with adapters, which are switched off for it
    fp8_caches   weights of FP8 products, quantised, which Transformer Engine keeps beside 16-bit parameters: 2 a weight
                 of a policy trained in FP8, 1 of its reference model, 1 of a policy scored in FP8 alone
    activations  what the language layers keep for the micro-batches in flight at the worst moment of the schedule
                 (``saved.py`` counts one layer, ``pipeline.py`` has the schedule)
    vision       what the encoder keeps then, on the first stage only, and the cache of features; for all micro-batches
                 at once if a pass before the update shares the encoder's run that carries the gradient
    head         hidden rows and final norm, on the last stage only; the reference model's hidden rows of all
                 micro-batches, where the KL to it is taken over the whole vocabulary
    working      what else the running backward needs: a recomputed layer, gradients of activations, the head's
                 weight gradient; and the buffer into which sequence parallelism gathers
    saving       what saving a checkpoint needs on the device beyond what a step needs (``save_memory.py``)
    engine       a colocated rollout engine that sleeps, as the caller says (``rollout_memory.py``: awake)
    reserved     what else the caller sets aside: device context, communication buffers, fragmentation

Units: bytes. Inputs are in host memory. The optimizer's temporaries and passes without gradient need less than backward
does, so they are not part of the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_ktr.accounting.layout import Layout, Parameters, count_parameters, count_product_weights
from megatron_ktr.accounting.pipeline import peak_in_flight
from megatron_ktr.accounting.save_memory import estimate_save_memory
from megatron_ktr.accounting.saved import (
    FUSED,
    Kernels,
    count_rows,
    head,
    language_layer,
    reference_rows_bytes,
    vision_pass,
)
from megatron_ktr.accounting.work import EACH_ONCE, GroupWork, StepSettings
from models.qwen2_5_vl.config import Qwen2_5_VLConfig


@dataclass(frozen=True)
class Memory:
    """The peak memory of one rank, by part, in bytes (see the module)."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    vision: float
    head: float
    working: float
    fp8_caches: float = 0.0
    saving: float = 0.0
    engine: float = 0.0
    reserved: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def of_step(self) -> float:
        """The memory that exists only during forward and backward."""
        return self.activations + self.vision + self.head + self.working


@dataclass(frozen=True)
class BytesBeside:
    """Memory on the device that training the model does not account for."""

    vision_cache: float = 1e9
    """The bound of the cache of features for the step's other passes (``--vision-cache-gb``)."""
    engine: float = 0.0
    """The memory of a rollout engine on the same device."""
    reserved: float = 0.0


NOTHING_BESIDE = BytesBeside()


def estimate_memory(
    config: Qwen2_5_VLConfig,
    groups: Sequence[GroupWork],
    layout: Layout,
    *,
    rank: int,
    num_micro_batches: int,
    settings: StepSettings = EACH_ONCE,
    kernels: Kernels = FUSED,
    beside: BytesBeside = NOTHING_BESIDE,
) -> Memory:
    """The peak of pipeline rank ``rank``; ``groups`` are the largest micro-batch."""
    parameters = count_parameters(config, layout, rank=rank)
    chunks = [
        _chunk_bytes(config, groups, layout, rank=rank, chunk=chunk, settings=settings, kernels=kernels)
        for chunk in range(layout.virtual)
    ]

    def peak(*names: str, extra: bool = False) -> float:
        return peak_in_flight(
            layout,
            rank=rank,
            # The schedule is periodic after at most 2 p micro-batches, so 3 p are enough to find the peak.
            num_micro_batches=min(num_micro_batches, 3 * layout.pipeline),
            saved_bytes=[sum(getattr(chunk, name) for name in names) for chunk in chunks],
            extra_bytes=[chunk.extra if extra else 0.0 for chunk in chunks],
            forward_bytes=[chunk.forward if extra else 0.0 for chunk in chunks],
        )

    # There is one peak; attribute it to its parts at that moment, as far as they can be told apart.
    whole = peak("language", "vision", "head", extra=True)
    kept = peak("language", "vision", "head")
    vision = min(peak("vision"), kept)
    head_bytes = min(peak("head"), kept - vision)
    always = 0.0
    if rank == 0:
        run = vision_pass(config, groups, layout, kernels, settings)
        always = min(beside.vision_cache, num_micro_batches * run.features)
        if settings.is_vision_kept_for_update:
            always += num_micro_batches * run.saved
    kept_rows = 0.0
    if layout.is_last_chunk(rank, layout.virtual - 1):
        kept_rows = num_micro_batches * reference_rows_bytes(config, groups, layout, kernels, settings)
    gathers = 0.0
    if layout.sequence_parallel:
        gathers = count_rows(config, groups, layout)[0] * config.text.hidden_size * kernels.bytes_per_number
    working = whole - kept + gathers
    save = estimate_save_memory(config, layout, rank=rank, settings=settings, kernels=kernels)
    return Memory(
        **state_bytes(parameters, layout, settings=settings, kernels=kernels),
        fp8_caches=fp8_cache_bytes(config, layout, rank=rank, settings=settings),
        activations=kept - vision - head_bytes,
        vision=vision + always,
        head=head_bytes + kept_rows,
        working=working,
        saving=max(0.0, save.device - kept - always - kept_rows - working),
        engine=beside.engine,
        reserved=beside.reserved,
    )


def state_bytes(
    parameters: Parameters, layout: Layout, *, settings: StepSettings, kernels: Kernels
) -> dict[str, float]:
    """The memory that exists between steps: weights, gradients, optimizer, reference."""
    b = kernels.bytes_per_number
    trainable = parameters.trainable(settings.frozen)
    shards = layout.data * layout.context if layout.uses_distributed_optimizer else 1
    return {
        "weights": b * parameters.total,
        "gradients": 4.0 * trainable,
        "optimizer": (8 if b == 4 else 12) * trainable / shards,
        # With adapters the reference model is the policy with its adapters off.
        "reference": b * parameters.total * (settings.has_reference and not settings.has_adapters),
    }


def fp8_cache_bytes(config: Qwen2_5_VLConfig, layout: Layout, *, rank: int, settings: StepSettings) -> float:
    """The bytes of Transformer Engine's quantised copies of weights on pipeline rank ``rank``.

    They are right for recipes with one scale per tensor (Hopper) or per block of 128 x 128; mxfp8 needs another 1/32.
    """
    language, vision = count_product_weights(config, layout, rank=rank)
    return float(sum(settings.fp8_bytes) * (language + vision * settings.has_fp8_vision))


@dataclass(frozen=True)
class _ChunkBytes:
    language: float
    vision: float
    head: float
    extra: float
    forward: float = 0.0
    """The most that forward needs before its end."""


def _chunk_bytes(
    config: Qwen2_5_VLConfig,
    groups: Sequence[GroupWork],
    layout: Layout,
    *,
    rank: int,
    chunk: int,
    settings: StepSettings,
    kernels: Kernels,
) -> _ChunkBytes:
    """The bytes that one micro-batch keeps on one chunk, and those that it needs in the chunk's backward."""
    b, hidden = kernels.bytes_per_number, config.text.hidden_size
    rows, own_rows = count_rows(config, groups, layout)
    is_first, is_last = layout.is_first_chunk(rank, chunk), layout.is_last_chunk(rank, chunk)
    num_layers = config.text.num_hidden_layers // layout.num_chunks
    layer = language_layer(config, groups, layout, kernels)
    language = num_layers * layer.saved
    if not is_last:
        language += own_rows * hidden * b  # the pipeline keeps the activation that it sent
    if not is_first and not kernels.norm_keeps_input:
        language += own_rows * hidden * b  # and the one that it received, because the norm kept only an fp32 copy
    extra = layer.again + layer.extra
    vision = forward = 0.0
    if is_first:
        run = vision_pass(config, groups, layout, kernels, settings)
        # The encoder's backward starts when that of the language layers is over and their memory is free.
        extra = max(extra, run.extra - language)
        vision, forward = run.saved, run.forward
        if settings.is_vision_kept_for_update:
            vision, forward = 0.0, 0.0  # the caller counts it for all micro-batches at once
    head_saved = 0.0
    if is_last:
        found = head(config, groups, layout, kernels, settings)
        head_saved = found.saved
        extra = max(extra - found.saved, found.extra)
    return _ChunkBytes(language=language, vision=vision, head=head_saved, extra=extra, forward=forward)
