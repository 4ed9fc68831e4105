"""Lists all messages between the ranks in a step, with their kind, ranks and bytes.

Letters: T rows of this context rank (padded to a multiple of tp under sequence parallelism), b bytes per number,
D hidden size, A and K the widths of all queries and keys; AR all-reduce, AG all-gather, RS reduce-scatter. The messages
per micro-batch and language layer are

    tensor    forward           2 AR of T D b                  sequence parallel: 2 AG + 2 RS of T D b
              backward          2 AR of T D b                  4 AG + 2 RS (the inputs are gathered once more for the
                                                               weights' gradients; 2 AG if the weights are frozen)
              fewer key/value heads than tp                    1 AG of T (A + 2 K) b, in backward 1 RS
    context   forward           1 AG of cp T 2 K / tp b        keys and values of all context ranks
              backward          1 RS of the same, and 1 AG if the attention did not keep what it gathered
    recompute ``full``: all of the layer's forward messages again; ``selective``: those of context again

outside the layers, per micro-batch:

    tensor    first chunk       1 AR of T D b (embedding); sequence parallel, backward: 1 AG
              last chunk        sequence parallel: 1 AG of T D b, backward 1 RS
    head      last chunk        1 AG over tensor ranks of tp 4 V R 4 (four fp32 numbers for each of the R rows predicted
                                on this context rank, of V views); backward without sequence parallelism: 1 AR of the
                                key rows, R key_share D 4
              context           1 AG over context ranks of cp (3 + 2 (V - 1)) R_max 4
    vision    tensor            S patches, W wide: each layer 2 AR of S W b, and the merger 1 AR of E D b (E = S / 4
                                visual tokens); backward each layer 2 AR, merger 1 AR of E 4 W b
              frame             1 AG over tensor x context ranks of n E_max D b (E_max: the largest share of n);
                                backward 1 AR of E D b over context ranks
    pipeline  each chunk        forward to the next: T D b (T / tp D b sequence parallel), backward to the previous one

and once per update, P trainable parameters of the rank (padded as buckets are):

    data      1 RS of 4 P and 1 AG of b P over data x context ranks; without the distributed optimizer 1 AR of 4 P
    tensor    sequence parallel: 1 AR of the norms' gradients, 4 D (2 layers + 1 on the last stage)
    vision    frame: 1 AR over tensor ranks of the encoder's gradients, 4 bytes each
    embedding tied, with a pipeline: 1 AR of 4 V / tp D between first and last stage

Passes without backward (hidden, shuffled, reference, selection) have only the forward messages. Not counted are scalars
(gradient norm, counts), shapes that are sent before activations (24 bytes each), pickled metrics, and TW-GRPO's
divergence.

These counts equal, to the byte, what a rank sends in a world of 256 (``tests/accounting/test_scaling.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ktr.accounting.layout import Layout
from megatron_ktr.accounting.links import Crossed, Group, Machine, Operation, crossed, group_ranks
from megatron_ktr.accounting.parameters import chunk_parameters
from megatron_ktr.accounting.passes import StepPass, step_passes
from megatron_ktr.accounting.rows import Rows, share_rows
from megatron_ktr.accounting.work import EACH_ONCE, GroupWork, StepSettings, num_patches
from models.qwen2_5_vl.config import Qwen2_5_VLConfig

Part = Literal["tensor", "context", "head", "vision", "pipeline", "data", "embedding"]
PARTS: tuple[Part, ...] = ("tensor", "context", "head", "vision", "pipeline", "data", "embedding")


@dataclass(frozen=True)
class Message:
    """``calls`` equal messages of one rank. A ``send`` goes to the group ``next`` or ``previous``."""

    part: Part
    operation: Operation
    group: Group
    num_bytes: float
    """The bytes of one call: the tensor of an all-reduce or a send, the whole result of an all-gather, or the whole
    input of a reduce-scatter."""
    calls: float = 1.0

    def crossed(self, layout: Layout, *, rank: int, gpus_per_node: int) -> Crossed:
        """The bytes that ``rank`` sends for all calls, by link."""
        ranks = group_ranks(layout, rank, self.group)
        return crossed(self.operation, self.calls * self.num_bytes, ranks=ranks, gpus_per_node=gpus_per_node)


@dataclass(frozen=True)
class Traffic:
    """The messages of one chunk for one micro-batch."""

    forward: tuple[Message, ...]
    backward: tuple[Message, ...] = ()


def rank_messages(
    config: Qwen2_5_VLConfig,
    groups: Sequence[GroupWork],
    layout: Layout,
    *,
    rank: int,
    num_micro_batches: int,
    settings: StepSettings = EACH_ONCE,
    bytes_per_number: int = 2,
    regathers_keys: bool = True,
) -> list[Message]:
    """All of world rank ``rank``'s messages in one step of ``num_micro_batches`` micro-batches like ``groups``."""
    stage = rank // (layout.num_ranks // layout.pipeline)
    found: list[Message] = []
    for one in step_passes(groups, settings):
        for number in range(stage, layout.num_chunks, layout.pipeline):
            traffic = chunk_messages(
                config,
                one,
                layout,
                number=number,
                settings=settings,
                bytes_per_number=bytes_per_number,
                context_rank=rank // layout.tensor % layout.context,
                regathers_keys=regathers_keys,
            )
            found += _times(one.times * num_micro_batches, (*traffic.forward, *traffic.backward))
    once = update_messages(config, layout, stage=stage, settings=settings, bytes_per_number=bytes_per_number)
    return [*found, *_times(settings.num_updates * settings.mini_batches, once)]


def chunk_messages(
    config: Qwen2_5_VLConfig,
    one: StepPass,
    layout: Layout,
    *,
    number: int,
    settings: StepSettings,
    bytes_per_number: int = 2,
    context_rank: int = 0,
    regathers_keys: bool = True,
) -> Traffic:
    """The messages of chunk ``number`` of all p v chunks for one micro-batch of a pass.

    ``regathers_keys``: attention keeps only its own rows' keys and values, and gathers the others' again in backward.
    """
    b = bytes_per_number
    rows = share_rows(config, one.groups, layout, context_rank=context_rank)
    is_first, is_last = number == 0, number == layout.num_chunks - 1
    count = config.text.num_hidden_layers / layout.num_chunks
    layer = _layer(config, rows, layout, settings=settings, b=b, regathers_keys=regathers_keys)
    parts = [Traffic(*(tuple(_times(count, side)) for side in (layer.forward, layer.backward)))]
    activation = Message("pipeline", "send", "next", rows.on_tensor_rank * config.text.hidden_size * b)
    if is_first:
        parts += [_embedding(config, rows, layout, b=b), _vision(config, one, layout, settings=settings, b=b)]
    if is_last:
        parts.append(_head(config, one, rows, layout, settings=settings, b=b))
    parts.append(
        Traffic(
            () if is_last else (activation,),
            () if is_first else (replace(activation, group="previous"),),
        )
    )
    backward = (message for part in parts for message in part.backward) if one.has_backward else ()
    return Traffic(_sent((m for part in parts for m in part.forward), layout), _sent(backward, layout))


def _layer(
    config: Qwen2_5_VLConfig, rows: Rows, layout: Layout, *, settings: StepSettings, b: int, regathers_keys: bool
) -> Traffic:
    text, tp = config.text, layout.tensor
    heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, text.head_size
    of_rows = rows.on_context_rank * text.hidden_size * b
    if layout.sequence_parallel:
        forward = [Message("tensor", "all_gather", "tensor", of_rows, 2)]
        forward += [Message("tensor", "reduce_scatter", "tensor", of_rows, 2)]
        gathers = 2 if "language" in settings.frozen else 4
        backward = [Message("tensor", "all_gather", "tensor", of_rows, gathers), forward[1]]
    else:
        forward = [Message("tensor", "all_reduce", "tensor", of_rows, 2)]
        backward = list(forward)
    if kv_heads < tp:
        whole = rows.on_context_rank * (heads + 2 * kv_heads) * size * b
        forward.append(Message("tensor", "all_gather", "tensor", whole))
        backward.append(Message("tensor", "reduce_scatter", "tensor", whole))
    keys = layout.context * rows.on_context_rank * 2 * max(1, kv_heads // tp) * size * b
    gathered = Message("context", "all_gather", "context", keys)
    # Both kinds of recomputation run the attention again in backward, which gathers the keys once more.
    num_gathers = regathers_keys + (settings.recompute != "none")
    backward += [replace(gathered, calls=num_gathers), replace(gathered, operation="reduce_scatter")]
    if settings.recompute == "full":
        backward += forward
    return Traffic((*forward, gathered), tuple(backward))


def _embedding(config: Qwen2_5_VLConfig, rows: Rows, layout: Layout, *, b: int) -> Traffic:
    reduced = Message("tensor", "all_reduce", "tensor", rows.on_context_rank * config.text.hidden_size * b)
    return Traffic((reduced,), (replace(reduced, operation="all_gather"),) if layout.sequence_parallel else ())


def _head(
    config: Qwen2_5_VLConfig, one: StepPass, rows: Rows, layout: Layout, *, settings: StepSettings, b: int
) -> Traffic:
    forward, backward = [], []
    hidden, tp, cp = config.text.hidden_size, layout.tensor, layout.context
    if layout.sequence_parallel:
        gathered = Message("tensor", "all_gather", "tensor", rows.on_context_rank * hidden * b)
        forward.append(gathered)
        backward.append(replace(gathered, operation="reduce_scatter"))
    elif one.num_views:
        backward.append(Message("head", "all_reduce", "tensor", rows.predicted * settings.key_share * hidden * 4))
    if one.num_views:
        forward.append(Message("head", "all_gather", "tensor", tp * 4 * one.num_views * rows.predicted * 4))
        kinds = 3 + 2 * (one.num_views - 1)
        forward.append(Message("head", "all_gather", "context", cp * kinds * rows.most_predicted * 4))
    return Traffic(tuple(forward), tuple(backward))


def _vision(config: Qwen2_5_VLConfig, one: StepPass, layout: Layout, *, settings: StepSettings, b: int) -> Traffic:
    """The messages of the encoder's run. A trained encoder has backward messages only in the pass with gradient."""
    vision, times = config.vision, one.encodings
    if not one.encoded or not times:
        return Traffic(())
    tokens = sum(group.num_visual_tokens(vision) for group in one.encoded)
    features = tokens * vision.out_hidden_size * b
    is_trained = not settings.is_vision_frozen
    if layout.vision_parallel == "frame":
        num_shares = layout.vision_frames_split
        most = most_in_a_share([h * w for g in one.encoded for t, h, w in g.grids for _ in range(t)], num_shares)
        whole = num_shares * most / vision.merge_unit * vision.out_hidden_size * b
        forward = [Message("vision", "all_gather", "tensor_context", whole)]
        backward = [Message("vision", "all_reduce", "context", features)]
        again: list[Message] = []
    else:
        patches = sum(num_patches(group.grids) for group in one.encoded)
        layers = [Message("vision", "all_reduce", "tensor", patches * vision.hidden_size * b, 2 * vision.depth)]
        forward = [*layers, Message("vision", "all_reduce", "tensor", features)]
        is_deep = "vision" not in settings.frozen
        merged = Message("vision", "all_reduce", "tensor", tokens * vision.merged_hidden_size * b)
        backward = [*(layers if is_deep else ()), merged]
        again = layers if is_deep and settings.recompute == "full" else []
    backward += again + (forward if settings.recompute_vision else [])
    return Traffic(tuple(_times(times, forward)), tuple(backward) if is_trained else ())


def most_in_a_share(sizes: Sequence[int], num_shares: int) -> int:
    """The size of the largest of ``num_shares`` consecutive shares; a unit belongs to the share that has its middle."""
    shares, done, total = [0] * num_shares, 0, sum(sizes)
    for size in sizes:
        shares[(2 * done + size) * num_shares // (2 * total)] += size
        done += size
    return max(shares)


def update_messages(
    config: Qwen2_5_VLConfig, layout: Layout, *, stage: int, settings: StepSettings, bytes_per_number: int = 2
) -> list[Message]:
    """The messages of one update, for a rank of pipeline stage ``stage``: gradients, and the updated weights."""
    found: list[Message] = []
    frozen, text = settings.frozen, config.text
    multiple = math.lcm(layout.data * layout.context, 128)
    for number in range(stage, layout.num_chunks, layout.pipeline):
        # In a gradient buffer, parameters start at multiples of 64 numbers, and the end is padded to divide evenly.
        sizes = chunk_parameters(config, layout, number=number).trainable(frozen)
        total = -(-sum(-(-size // 64) * 64 for size in sizes) // multiple) * multiple
        if layout.uses_distributed_optimizer:
            found.append(Message("data", "reduce_scatter", "data_context", 4 * total))
            found.append(Message("data", "all_gather", "data_context", bytes_per_number * total))
        else:
            found.append(Message("data", "all_reduce", "data_context", 4 * sum(sizes)))
    if "language" not in frozen:
        if layout.sequence_parallel:
            num_norms = 2 * text.num_hidden_layers // layout.pipeline + (stage == layout.pipeline - 1)
            found.append(Message("tensor", "all_reduce", "tensor", 4 * num_norms * text.hidden_size))
        if config.tie_word_embeddings and stage in (0, layout.pipeline - 1):
            shard = -(-text.vocab_size // layout.tensor) * text.hidden_size
            found.append(Message("embedding", "all_reduce", "embedding", 4 * shard))
    if stage == 0 and layout.vision_parallel == "frame":
        of_vision = chunk_parameters(config, layout, number=0).trainable(frozen | {"language"})
        found.append(Message("vision", "all_reduce", "tensor", 4 * sum(of_vision)))
    return list(_sent(found, layout))


def seconds_of(messages: Iterable[Message], layout: Layout, *, rank: int, machine: Machine) -> float:
    """The seconds of these messages one after another, each at the speed of the slowest link on its way."""
    return sum(
        message.crossed(layout, rank=rank, gpus_per_node=machine.gpus_per_node).seconds(machine) for message in messages
    )


def _times(count: float, messages: Iterable[Message]) -> Iterator[Message]:
    return (replace(message, calls=count * message.calls) for message in messages)


def _sent(messages: Iterable[Message], layout: Layout) -> tuple[Message, ...]:
    """Only the messages that are really sent: not those in groups of one rank, of empty tensors, or with no calls."""
    sizes: dict[Group, int] = {
        "tensor": layout.tensor,
        "context": layout.context,
        "tensor_context": layout.tensor * layout.context,
        "data_context": layout.data * layout.context,
    }
    return tuple(m for m in messages if sizes.get(m.group, layout.pipeline) > 1 and m.calls and m.num_bytes)
