"""Computes how many language layers each pipeline chunk holds, even if stages differ.

This is arithmetic only, and the options mean what they mean in Megatron. There are three ways to an uneven split:

    --decoder-first-pipeline-num-layers F      the first stage has F layers, the last one L, and the others share the
    --decoder-last-pipeline-num-layers L       rest evenly; a stage's layers are spread evenly over its chunks
    --account-for-embedding-in-pipeline-split  embedding and head count as one layer each of the first and last chunk
    --account-for-loss-in-pipeline-split
    --account-for-vision-in-pipeline-split V   the vision encoder counts as V layers, taken from the first stage's
                                               chunks, the first chunk (where it runs) first

Example, 28 layers over 4 stages with V = 8: (28 + 8) / 4 = 9 a stage, so 1, 9, 9, 9 layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ktr.config.given import flag
from megatron_ktr.config.sections import ParallelSection
from megatron_ktr.errors import UserError

Split = tuple[tuple[int, ...], ...]
"""The number of layers by stage, and by chunk within the stage. Data passes through the chunks c of all stages before
it reaches any chunk c + 1."""


def split_layers(num_layers: int, *, pipeline: int, virtual: int = 1, options: ParallelSection | None = None) -> Split:
    """The layers of every chunk.

    Raises:
        UserError: the layers cannot be split as the options ask.
    """
    options = options or ParallelSection()
    if options.decoder_first_pipeline_num_layers or options.decoder_last_pipeline_num_layers:
        return _with_given_ends(num_layers, pipeline=pipeline, virtual=virtual, options=options)
    extra_first, extra_last = _counted_beside_layers(options)
    total = num_layers + extra_first + extra_last
    if total % (pipeline * virtual):
        counted = f" + {extra_first + extra_last} counted beside them" if total > num_layers else ""
        raise UserError(
            f"--pipeline-model-parallel-size {pipeline} (with virtual stages: {pipeline * virtual}) must divide the "
            f"{num_layers} layers{counted}; see --account-for-vision-in-pipeline-split and "
            "--decoder-first-pipeline-num-layers for uneven stages"
        )
    chunks = [[total // (pipeline * virtual)] * virtual for _ in range(pipeline)]
    for stage, order, extra in ((0, range(virtual), extra_first), (-1, reversed(range(virtual)), extra_last)):
        for chunk in order:
            taken = min(extra, chunks[stage][chunk])
            chunks[stage][chunk] -= taken
            extra -= taken
        if extra:
            raise UserError(
                f"what counts beside the layers of the {'first' if stage == 0 else 'last'} pipeline stage is more than "
                f"the {total // pipeline} of a stage: lower --account-for-vision-in-pipeline-split, or use fewer stages"
            )
    return tuple(map(tuple, chunks))


def is_even(split: Split) -> bool:
    """Whether all chunks hold equally many layers."""
    return len({count for stage in split for count in stage}) == 1


def chunk_layout(split: Split) -> list[list[str]]:
    """The split as megatron-core's ``pipeline_model_parallel_layout``: the contents of each chunk, in order."""
    pipeline, virtual = len(split), len(split[0])
    layout = [["decoder"] * split[stage][chunk] for chunk in range(virtual) for stage in range(pipeline)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def virtual_stages(num_layers: int, *, options: ParallelSection) -> int | None:
    """The number of chunks of each stage that the options ask for; None without interleaving.

    Raises:
        UserError: the chunks do not make up a stage.
    """
    if options.num_virtual_stages_per_pipeline_rank is not None:
        return options.num_virtual_stages_per_pipeline_rank
    per_chunk = options.num_layers_per_virtual_pipeline_stage
    if not per_chunk:
        return None
    per_stage = (num_layers + sum(_counted_beside_layers(options))) // options.pipeline_model_parallel_size
    if per_stage % per_chunk:
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} must divide the {per_stage} layers of a pipeline "
            "stage"
        )
    return per_stage // per_chunk


def check_recomputation(split: Split, *, options: ParallelSection) -> None:
    """Raises ``UserError`` if layers are recomputed in blocks of N and some chunk is not a whole number of blocks;
    megatron-core 0.16 would then look for layers beyond the last one of the chunk.

    The reference model is split in the same way. The vision encoder has its own blocks (``vision.py``).
    """
    if options.recompute_method != "uniform" or not options.recompute_num_layers:
        return
    size = options.recompute_num_layers
    odd = [count for stage in split for count in stage if count % size]
    if odd:
        one = len(split) == len(split[0]) == 1
        where = "the model has" if one else "a pipeline chunk has"
        raise UserError(
            f"--recompute-num-layers {size} must divide the layers of every pipeline chunk with --recompute-method "
            f"uniform, and {where} {odd[0]}; use {_largest_divisor(split, size)}, or --recompute-method block"
        )


def _largest_divisor(split: Split, limit: int) -> int:
    counts = [count for stage in split for count in stage]
    return next(size for size in range(limit, 0, -1) if not any(count % size for count in counts))


def problems(options: ParallelSection) -> Iterator[str]:
    """The problems of the options that do not depend on the model."""
    ends = [
        f"{flag(name)}"
        for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        if getattr(options, name) is not None
    ]
    counted = [
        f"--account-for-{name}-in-pipeline-split"
        for name in ("embedding", "loss", "vision")
        if getattr(options, f"account_for_{name}_in_pipeline_split")
    ]
    if (ends or counted) and options.pipeline_model_parallel_size == 1:
        yield f"{(ends + counted)[0]} needs --pipeline-model-parallel-size above 1"
    if ends and counted:
        yield f"{ends[0]} says how many layers an end has, {counted[0]} what counts beside them: give one of them"
    if ends and options.num_layers_per_virtual_pipeline_stage is not None:
        yield (
            f"{ends[0]} makes stages unequal: with it, give --num-virtual-stages-per-pipeline-rank in place of "
            "--num-layers-per-virtual-pipeline-stage"
        )
    if None not in (options.num_layers_per_virtual_pipeline_stage, options.num_virtual_stages_per_pipeline_rank):
        yield "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank: give one of them"
    if options.num_virtual_stages_per_pipeline_rank is not None and options.pipeline_model_parallel_size == 1:
        yield "--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size above 1"


def _counted_beside_layers(options: ParallelSection) -> tuple[int, int]:
    """How many layers the parts beside the layers count as, on the first and on the last stage."""
    first = options.account_for_vision_in_pipeline_split + options.account_for_embedding_in_pipeline_split
    return first, int(options.account_for_loss_in_pipeline_split)


def _with_given_ends(num_layers: int, *, pipeline: int, virtual: int, options: ParallelSection) -> Split:
    first, last = options.decoder_first_pipeline_num_layers, options.decoder_last_pipeline_num_layers
    num_middle = pipeline - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    if left < 0 or bool(left) != bool(num_middle) or (num_middle and left % num_middle):
        raise UserError(
            f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last} leave {left} "
            f"of {num_layers} layers to the other {num_middle} of {pipeline} stages: they must share them evenly"
        )
    middle = left // num_middle if num_middle else 0
    stages = [first or middle, *[middle] * (pipeline - 2), last or middle]
    if odd := [count for count in stages if count % virtual]:
        raise UserError(
            f"--num-virtual-stages-per-pipeline-rank {virtual} must divide the layers of every stage, one has {odd[0]}"
        )
    return tuple((count // virtual,) * virtual for count in stages)
