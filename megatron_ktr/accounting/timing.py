"""Estimates the seconds of a training step, without the rollout, from operations and bytes, and what they are spent on.

The time of a chunk for one micro-batch of a pass, forward and backward separately, is

    operations of the chunk / (ranks that share them x peak x efficiency) + its messages / bandwidth of their links

The operations of the language layers are split evenly over chunks and tensor ranks. Over context ranks they are split
as rows are (responses are not cut, so some ranks may have more). The encoder belongs to the first chunk, the head to
the last. The time of a pass follows from these times and the pipeline's schedule (``pipeline.py``). The passes (policy,
hidden, each shuffled, reference, selection) run one after another.

The messages are those of ``communication.py``. They run one after another, each at the speed of the slowest link on its
way (``links.py``). They are counted under

    tensor    between tensor ranks: layers, encoder, statistics of the head; once per update the norms' gradients
    context   between context ranks: keys and values (and between tensor x context ranks: features)
    pipeline  activations and their gradients
    data      gradients and weights once per update, as far as they take longer than the backward of the last and the
              forward of the first micro-batch, behind which they are hidden

Only the data part assumes overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.accounting.communication import Message, chunk_messages, seconds_of, update_messages
from megatron_ktr.accounting.flops import Flops
from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.links import Group, Machine
from megatron_ktr.accounting.passes import StepPass, step_passes
from megatron_ktr.accounting.pipeline import pipeline_seconds
from megatron_ktr.accounting.rows import share_rows
from megatron_ktr.accounting.work import GroupWork, StepSettings
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

LANGUAGE_PARTS = ("prompt", "response", "attention_prompt", "attention_response")
COUNTED_UNDER: dict[Group, str] = {
    "tensor": "tensor",
    "context": "context",
    "tensor_context": "context",
    "next": "pipeline",
    "previous": "pipeline",
    "embedding": "data",
    "data_context": "data",
}


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step; the parts add up to the total."""

    compute: float
    """The time that an average rank computes."""
    bubble: float
    """The time that an average rank waits for others: fill, drain and unequal chunks."""
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
    """The seconds of one chunk for one direction (forward or backward) of one micro-batch."""

    compute: float
    tensor: float
    context: float
    pipeline: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.context + self.pipeline


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
    """The time of a step of ``num_micro_batches`` micro-batches like ``groups`` on each replica.

    ``flops`` are the operations of one micro-batch.
    """
    m, b, p = num_micro_batches, bytes_per_number, layout.pipeline
    sums = dict.fromkeys(("compute", "bubble", "tensor", "context", "pipeline"), 0.0)
    first_forward = last_backward = 0.0
    for one in step_passes(groups, settings):
        both = _all_chunk_times(config, one, flops, layout, settings=settings, machine=machine, b=b)
        forward, backward = ([side.total for side in sides] for sides in zip(*both, strict=True))
        # Every optimizer step fills and drains the pipeline anew.
        rounds = settings.mini_batches if one.has_backward else 1
        duration = rounds * pipeline_seconds(
            layout, num_micro_batches=-(-m // rounds), forward=forward, backward=backward if one.has_backward else None
        )
        for part in ("compute", "tensor", "context", "pipeline"):
            sums[part] += one.times * m * sum(getattr(side, part) for sides in both for side in sides) / p
        sums["bubble"] += one.times * max(0.0, duration - m * (sum(forward) + sum(backward)) / p)
        if one.has_backward:
            slowest = max(range(p), key=lambda rank: sum(forward[rank::p]) + sum(backward[rank::p]))
            first_forward, last_backward = sum(forward[slowest::p]), sum(backward[slowest::p])
    scatter, gather, inside = _update_seconds(config, layout, settings=settings, machine=machine, b=b)
    num_steps = settings.num_updates * settings.mini_batches
    sums["tensor"] += num_steps * inside
    exposed = max(0.0, scatter - last_backward) + max(0.0, gather - first_forward)
    return StepTime(**sums, data=num_steps * exposed)


def _all_chunk_times(
    config: Qwen2_5_VLConfig,
    one: StepPass,
    flops: Flops,
    layout: Layout,
    *,
    settings: StepSettings,
    machine: Machine,
    b: int,
) -> list[tuple[_ChunkTime, _ChunkTime]]:
    """The times of all chunks, by chunk number.

    If every stage fills whole nodes, all chunks between the first and the last take the same time.
    """
    fills_nodes = layout.num_ranks // layout.pipeline % machine.gpus_per_node == 0
    known: dict[tuple[bool, bool, int], tuple[_ChunkTime, _ChunkTime]] = {}
    found = []
    for number in range(layout.num_chunks):
        kind = (number == 0, number == layout.num_chunks - 1, 0 if fills_nodes else number % layout.pipeline)
        if kind not in known:
            known[kind] = _chunk_times(
                config, one, flops, layout, number=number, settings=settings, machine=machine, b=b
            )
        found.append(known[kind])
    return found


def _chunk_times(
    config: Qwen2_5_VLConfig,
    one: StepPass,
    flops: Flops,
    layout: Layout,
    *,
    number: int,
    settings: StepSettings,
    machine: Machine,
    b: int,
) -> tuple[_ChunkTime, _ChunkTime]:
    """(forward, backward) times of one micro-batch on chunk ``number`` of all p v chunks."""
    traffic = chunk_messages(config, one, layout, number=number, settings=settings, bytes_per_number=b)
    rows = share_rows(config, one.groups, layout).on_context_rank
    ranks: float = layout.tensor * layout.context
    if layout.context > 1:
        ranks = layout.tensor * _num_rows(config, one) / rows
    # Take the stage's first rank: the ranks of a stage differ only in the context ranks' shares of the head.
    rank = number % layout.pipeline * (layout.num_ranks // layout.pipeline)
    forward, backward = (
        _direction(
            messages,
            sum(_operations(flops, name, one.times, layout, number, ranks) for name in names),
            layout,
            rank,
            machine,
        )
        for messages, names in ((traffic.forward, one.flops[:1]), (traffic.backward, one.flops[1:]))
    )
    return forward, backward


def _num_rows(config: Qwen2_5_VLConfig, one: StepPass) -> int:
    return sum(group.prompt_length(config) + group.num_response_tokens for group in one.groups)


def _operations(flops: Flops, name: str, times: float, layout: Layout, number: int, ranks: float) -> float:
    """The operations of the rank with the most rows in one run of the pass.

    ``ranks`` is the number of ranks that share the operations of a language layer.
    """
    operations = flops.of(name, parts=LANGUAGE_PARTS) / layout.num_chunks / ranks
    if number == layout.num_chunks - 1:
        operations += flops.of(name, parts=("head",)) / ranks
    if number == 0:
        operations += flops.of(name, parts=("vision",)) / (layout.vision_shards * layout.vision_frames_split)
    return operations / times


def _direction(
    messages: Sequence[Message], operations: float, layout: Layout, rank: int, machine: Machine
) -> _ChunkTime:
    parts: dict[str, float] = dict.fromkeys(("tensor", "context", "pipeline"), 0.0)
    for message in messages:
        parts[COUNTED_UNDER[message.group]] += seconds_of([message], layout, rank=rank, machine=machine)
    return _ChunkTime(compute=operations / (1e12 * machine.peak_tflops * machine.efficiency), **parts)


def _update_seconds(
    config: Qwen2_5_VLConfig, layout: Layout, *, settings: StepSettings, machine: Machine, b: int
) -> tuple[float, float, float]:
    """The seconds of the slowest stage for (summing gradients, gathering weights, sums over tensor ranks).

    Overlap with computation is not yet subtracted.
    """
    found = []
    for stage in {0, layout.pipeline - 1}:
        messages = update_messages(config, layout, stage=stage, settings=settings, bytes_per_number=b)
        gathers = [m for m in messages if m.part == "data" and m.operation == "all_gather"]
        inside = [m for m in messages if m.group == "tensor"]
        scatters = [m for m in messages if m not in gathers and m not in inside]
        rank = stage * (layout.num_ranks // layout.pipeline)
        found.append(
            tuple(seconds_of(part, layout, rank=rank, machine=machine) for part in (scatters, gathers, inside))
        )
    return max(found, key=sum)
