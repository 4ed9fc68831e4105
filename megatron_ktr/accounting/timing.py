"""Seconds of a training step, without the rollout, from arithmetic and bytes; and where they go.

A chunk's time for one micro-batch of a pass is

    operations of the chunk / (ranks that share them x peak x efficiency) + bytes / bandwidth of what it sends

Operations: language layers are split evenly, the encoder is the first chunk's, the head the last's. A pass takes what
the pipeline's schedule takes with these times (``pipeline.py``); passes (policy, hidden, each shuffled, reference,
selection) follow one another. Bytes, per micro-batch, of T rows (of this context rank) of b bytes a number:

    tensor    forward and backward each 2 all-reduces of T D a layer (or the equal gather and scatter), 2 (tp - 1) / tp
              times their size; sequence parallelism gathers once more in backward; the encoder likewise, W wide
    context   keys and values of all ranks, gathered a layer: (cp - 1) / cp 2 K T_all; in backward again, and the
              gradients scattered
    pipeline  T / tp D to the next stage, in backward to the previous, for every chunk
    data      once a step: fp32 gradients scattered and weights gathered over data x context ranks; hidden behind the
              backward of the last and the forward of the first micro-batch as far as those last

Only the data part counts on overlap. Tensor groups lie inside a node; a wider group than a node uses the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ktr.accounting.flops import Flops
from megatron_ktr.accounting.layout import Layout, count_parameters
from megatron_ktr.accounting.pipeline import pipeline_seconds
from megatron_ktr.accounting.saved import count_patches
from megatron_ktr.accounting.work import GroupWork, StepSettings
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

LANGUAGE_PARTS = ("prompt", "response", "attention_prompt", "attention_response")


@dataclass(frozen=True)
class Machine:
    """What layouts are timed on. Bandwidths are of one GPU in one direction, as measured rather than as sold."""

    peak_tflops: float = 989.0
    """Of one GPU, dense bf16."""
    efficiency: float = 0.45
    """Share of the peak that the kernels of a busy rank reach."""
    gpus_per_node: int = 8
    link_gb_per_second: float = 350.0
    """Inside a node, 10^9 bytes a second."""
    network_gb_per_second: float = 40.0

    def bandwidth(self, num_ranks: int) -> float:
        """Bytes a second for a group that spans this many consecutive ranks."""
        return 1e9 * (self.link_gb_per_second if num_ranks <= self.gpus_per_node else self.network_gb_per_second)


@dataclass(frozen=True)
class StepTime:
    """Seconds; the parts add up to the total."""

    compute: float
    """Of an average rank."""
    bubble: float
    """An average rank waits for others: fill, drain and unequal chunks."""
    tensor: float
    context: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.tensor + self.context + self.pipeline + self.data

    @property
    def bubble_fraction(self) -> float:
        return self.bubble / self.total


@dataclass(frozen=True)
class _ChunkTime:
    compute: float
    tensor: float
    context: float
    pipeline: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.context + self.pipeline


@dataclass(frozen=True)
class _Pass:
    """One run of one micro-batch through the pipeline."""

    times: int
    """How often the step runs it."""
    operations: Mapping[str, float]
    """By ``vision``, ``language``, ``head``."""
    num_rows: int
    encoded: Sequence[GroupWork]
    """Groups whose media the encoder runs on."""
    has_backward: bool = False


def estimate_time(
    config: Qwen2_5_VLConfig,
    groups: Sequence[GroupWork],
    flops: Flops,
    layout: Layout,
    *,
    num_micro_batches: int,
    settings: StepSettings,
    machine: Machine,
    bytes_per_number: int = 2,
) -> StepTime:
    """A step of ``num_micro_batches`` micro-batches like ``groups`` on each replica; ``flops`` are of one of them."""
    m, b, p = num_micro_batches, bytes_per_number, layout.pipeline
    sums = dict.fromkeys(("compute", "bubble", "tensor", "context", "pipeline"), 0.0)
    first_forward = last_backward = 0.0
    for one in _passes(config, groups, flops, settings):
        chunks = [
            _chunk_time(config, one, layout, chunk=chunk, settings=settings, machine=machine, b=b)
            for chunk in range(layout.num_chunks)
        ]
        # Forward's share of forward, recomputation and backward.
        share = 1 / (3 + (settings.recompute == "full")) if one.has_backward else 1.0
        duration = pipeline_seconds(
            layout,
            num_micro_batches=m,
            forward=[share * chunk.total for chunk in chunks],
            backward=[(1 - share) * chunk.total for chunk in chunks] if one.has_backward else None,
        )
        for part in ("compute", "tensor", "context", "pipeline"):
            sums[part] += one.times * m * sum(getattr(chunk, part) for chunk in chunks) / p
        sums["bubble"] += one.times * max(0.0, duration - m * sum(chunk.total for chunk in chunks) / p)
        if one.has_backward:
            slowest = max(sum(chunk.total for chunk in chunks[rank::p]) for rank in range(p))
            first_forward, last_backward = share * slowest, (1 - share) * slowest
    scatter, gather = _data_seconds(config, layout, settings, machine, b)
    exposed = max(0.0, scatter - last_backward) + max(0.0, gather - first_forward)
    return StepTime(**sums, data=settings.num_updates * exposed)


def _passes(
    config: Qwen2_5_VLConfig, groups: Sequence[GroupWork], flops: Flops, settings: StepSettings
) -> Iterator[_Pass]:
    counts = {
        ("policy_forward", "policy_recompute", "policy_backward"): settings.num_updates,
        ("hidden",): int(settings.has_hidden),
        ("shuffled",): settings.num_shuffles if settings.shuffle_unit else 0,
        ("reference",): int(settings.has_reference),
        ("selection",): int(settings.has_selection),
    }
    for names, times in counts.items():
        if not times:
            continue
        is_text = names == ("hidden",) and not settings.is_hidden_masked
        operations = {
            "vision": flops.of(*names, parts=("vision",)) / times,
            "language": flops.of(*names, parts=LANGUAGE_PARTS) / times,
            "head": flops.of(*names, parts=("head",)) / times,
        }
        yield _Pass(
            times=times,
            operations=operations,
            num_rows=sum(
                (g.text_length if is_text else g.prompt_length(config)) + g.num_response_tokens for g in groups
            ),
            encoded=groups if operations["vision"] else (),
            has_backward="policy_backward" in names,
        )


def _chunk_time(
    config: Qwen2_5_VLConfig,
    one: _Pass,
    layout: Layout,
    *,
    chunk: int,
    settings: StepSettings,
    machine: Machine,
    b: int,
) -> _ChunkTime:
    """One micro-batch on one of all p v chunks, forward and (policy) backward."""
    text, vision, tp, cp = config.text, config.vision, layout.tensor, layout.context
    # Forward's messages; backward sends them again, recomputation and sequence parallelism once more.
    repeated = settings.recompute == "full"
    tensor_rounds = 2 + repeated + 0.5 * layout.sequence_parallel if one.has_backward else 1
    context_rounds = 3 + repeated if one.has_backward else 1
    num_layers = text.num_hidden_layers / layout.num_chunks
    operations = one.operations["language"] / layout.num_chunks / (tp * cp)
    reduced = num_layers * 2 * one.num_rows / cp * text.hidden_size
    gathered_features = 0.0
    if chunk == layout.num_chunks - 1:
        operations += one.operations["head"] / (tp * cp)
    if chunk == 0:
        operations += one.operations["vision"] / (layout.vision_shards * layout.vision_frames_split)
        if layout.vision_shards > 1:
            reduced += 2 * vision.depth * count_patches(one.encoded, layout) * vision.hidden_size
        if layout.vision_frames_split > 1:
            gathered_features = sum(group.num_visual_tokens(vision) for group in one.encoded) * text.hidden_size * b
    kv = 2 * text.num_key_value_heads * text.head_size / tp
    gathered = num_layers * kv * one.num_rows * (cp - 1) / cp * b
    sent = one.num_rows / cp * text.hidden_size * b * (layout.pipeline > 1)
    sent *= (1 + one.has_backward) / (tp if layout.sequence_parallel else 1)
    return _ChunkTime(
        compute=operations / (1e12 * machine.peak_tflops * machine.efficiency),
        tensor=tensor_rounds * reduced * b * 2 * (tp - 1) / tp / machine.bandwidth(tp),
        context=(context_rounds * gathered + gathered_features) / machine.bandwidth(tp * cp),
        pipeline=sent / machine.bandwidth(layout.num_ranks),
    )


def _data_seconds(
    config: Qwen2_5_VLConfig, layout: Layout, settings: StepSettings, machine: Machine, b: int
) -> tuple[float, float]:
    """(scattering gradients, gathering weights) on the stage with the most parameters, as if nothing were hidden."""
    num_replicas = layout.data * layout.context
    most = max(
        count_parameters(config, layout, rank=rank).trainable(settings.frozen) for rank in (0, layout.pipeline - 1)
    )
    volume = most * (num_replicas - 1) / num_replicas
    bandwidth = machine.bandwidth(layout.tensor * num_replicas)
    return 4 * volume / bandwidth, b * volume / bandwidth
