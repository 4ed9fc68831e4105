"""Saves and loads the distributed optimizer's state by shard: every rank writes and reads its own; none is gathered.

On each rank, megatron-core's distributed optimizer keeps a range of the flattened elements of a parameter, [start,
stop), cut wherever the buckets of the gradient buffer are cut. A distributed checkpoint, however, stores boxes of
tensors. So a range is split into the few boxes it consists of. For a matrix these are the rest of a row, whole rows,
and the beginning of a row:

    . . . x x      range 3 .. 18 of a 5 x 5 matrix: boxes [0:1, 3:5], [1:3, 0:5] and [3:4, 0:3]
    x x x x x
    x x x x x
    x x x . .

Each box is stored at its position in the tensor of the whole model, as if whole parameters had been saved. So the
stored values do not depend on the layout; only their division into chunks does. Per parameter, saving copies 12 bytes /
data-parallel ranks to the host and nothing on the device. Loading reads into the shard, one stored chunk at a time.

None of megatron-core's three formats (in 0.16 and in 0.19) would do. "fully_sharded_model_space" describes such ranges,
but megatron-core's own ``ShardedTensor`` refuses it. "dp_reshardable" keeps the buffers as they are, so that the layout
could not change. "fully_reshardable" gathers everything on every rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ktr.errors import UserError
from megatron_ktr.files.torch_dist_files import Region, Shape, TorchDistReader

KINDS = ("param", "exp_avg", "exp_avg_sq")
PREFIX = "optimizer.state"


@dataclass(frozen=True)
class Box:
    """A box within a tensor: the index of its first element, and its size along each axis."""

    start: Shape
    shape: Shape


@dataclass(frozen=True)
class Piece:
    """A box of a parameter's shard, and its position in the stored tensor."""

    elements: slice
    """The elements of the flat shard that make up the box; ``view`` is their shape."""
    view: Shape
    inner: Box
    """The part of ``view`` that is stored: all of it, except for padding and for parameters stored in parts."""
    key: str
    offset: Shape
    global_shape: Shape
    is_padded: bool
    """Whether the tensor may have more rows in one layout than in another."""
    replica_id: tuple[int, int, int]

    def of(self, shard: Tensor) -> Tensor:
        """The part of ``shard`` that is stored, as a view with as many axes as the stored tensor."""
        box = shard.detach()[self.elements].view(self.view)
        for axis, (start, length) in enumerate(zip(self.inner.start, self.inner.shape, strict=True)):
            box = box.narrow(axis, start, length)
        return box.reshape((1,) * (len(self.offset) - box.ndim) + tuple(box.shape))


@dataclass(frozen=True)
class Shard:
    """This rank's share of one parameter."""

    parameter: torch.nn.Parameter
    pieces: tuple[Piece, ...]


def locate_shards(part: DistributedOptimizer, model_state: dict[str, Any]) -> list[Shard]:
    """Where this rank's state of ``part`` belongs in the checkpoint. ``model_state`` is the model's sharded state, with
    the parameters themselves as data."""
    stored = {
        id(value.data): value
        for value in nested_values(model_state)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    shards = []
    for ranges in part.gbuf_ranges:
        for bucket_ranges in ranges.values():
            for bucket_range in bucket_ranges:
                for parameter, places in bucket_range["param_map"].items():
                    own = places["param"]
                    pieces = _pieces(stored[id(parameter)], parameter.shape, start=own.start, stop=own.end)
                    shards.append(Shard(parameter, tuple(pieces)))
    return shards


def sharded_tensors(part: DistributedOptimizer, shards: Sequence[Shard]) -> list[ShardedTensor]:
    """The tensors that this rank saves of ``part``; they are views of its state."""
    found = []
    for shard in shards:
        state = part._get_main_param_and_optimizer_states(shard.parameter)
        for kind in KINDS:
            for piece in shard.pieces:
                data = piece.of(state[kind])
                found.append(
                    ShardedTensor(
                        f"{PREFIX}.{kind}.{piece.key}",
                        data,
                        data.dtype,
                        tuple(data.shape),
                        piece.global_shape,
                        piece.offset,
                        axis_fragmentations=None,
                        replica_id=piece.replica_id,
                    )
                )
    return found


def stored_keys(shards: Sequence[Shard]) -> set[str]:
    """The keys of the tensors that ``read_shards`` reads."""
    return {f"{PREFIX}.{kind}.{piece.key}" for shard in shards for piece in shard.pieces for kind in KINDS}


@torch.no_grad()
def read_shards(part: DistributedOptimizer, shards: Sequence[Shard], reader: TorchDistReader) -> None:
    """Fills this rank's state of ``part`` from a checkpoint of any layout, which must have ``stored_keys``. Padding is
    set to zero.

    Raises:
        UserError: the state is that of another model, or damaged.
    """
    regions = []
    for shard in shards:
        state = part._get_main_param_and_optimizer_states(shard.parameter)
        for kind in KINDS:
            found = [
                _stored_part(piece, state[kind], key=f"{PREFIX}.{kind}.{piece.key}", reader=reader)
                for piece in shard.pieces
            ]
            stored = [region for region in found if region is not None]
            if sum(region.target.numel() for region in stored) < state[kind].numel():
                state[kind].detach().zero_()
            regions += stored
    reader.fill(regions)


def _stored_part(piece: Piece, shard: Tensor, *, key: str, reader: TorchDistReader) -> Region | None:
    """The stored part that fills ``piece``; None if the layout that saved had no such rows (they are padding)."""
    size = tuple(reader.tensors[key].size)
    target = piece.of(shard)
    if size != piece.global_shape:
        if not piece.is_padded or size[1:] != piece.global_shape[1:]:
            raise UserError(f"{reader.directory}: tensor {key}: expected shape {piece.global_shape}, got {size}")
        rows = min(target.shape[0], size[0] - piece.offset[0])
        if rows <= 0:
            return None
        target = target[:rows]
    return Region(key, piece.offset, target)


def _pieces(stored: Any, shape: Shape, *, start: int, stop: int) -> Iterator[Piece]:
    """The boxes of elements ``start`` to ``stop`` of a parameter. If the parameter is stored in parts, boxes are cut at
    their borders."""
    parts = list(_stored_parts(stored, tuple(shape)))
    for box in split_range(tuple(shape), start, stop):
        first = _flat(box.start, shape) - start
        for part_box, part in parts:
            inner = _intersection(box, part_box)
            if inner is None:
                continue
            assert isinstance(part.replica_id, tuple), "core numbers copies of a tensor by three axes"
            num_leading = len(part.global_offset) - len(shape)
            own = tuple(a - b for a, b in zip(inner.start, part_box.start, strict=True))
            offset = tuple(a + b for a, b in zip(part.global_offset, (0,) * num_leading + own, strict=True))
            yield Piece(
                elements=slice(first, first + math.prod(box.shape)),
                view=box.shape,
                inner=Box(tuple(a - b for a, b in zip(inner.start, box.start, strict=True)), inner.shape),
                key=part.key,
                offset=offset,
                global_shape=tuple(part.global_shape),
                is_padded=part.allow_shape_mismatch,
                # No other data-parallel rank has this piece.
                replica_id=(part.replica_id[0], part.replica_id[1], 0),
            )


def _stored_parts(stored: Any, shape: Shape) -> Iterator[tuple[Box, ShardedTensor]]:
    """Pairs of a box of the parameter and the tensor that it is stored as. There is one pair, or several if
    megatron-core stores the parameter in parts (gate and up separately; the vision MLP without its padding)."""
    if isinstance(stored, ShardedTensor):
        yield Box((0,) * len(shape), shape), stored
        return
    # megatron-core's factory is run on a tensor without data. The parts it returns are views, and their offset and
    # strides tell which box of the parameter each of them is.
    whole = torch.empty(shape, device="meta")
    for part in nested_values(dataclasses.replace(stored, data=whole).build()):
        size = tuple(part.data.shape)[-len(shape) :]
        strides = part.data.stride()[-len(shape) :]
        is_view = all(n == 1 or a == b for n, a, b in zip(size, strides, whole.stride(), strict=True))
        assert is_view and math.prod(size) == part.data.numel(), f"{part.key} is stored as something else than a part"
        start, rest = [], part.data.storage_offset()
        for stride in whole.stride():
            start.append(rest // stride)
            rest %= stride
        yield Box(tuple(start), size), part


def split_range(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Splits elements ``start`` to ``stop`` of a flattened tensor into contiguous boxes of the tensor, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _within_row(shape, start // row, start % row, stop % row)
        return
    if start % row:
        yield from _within_row(shape, first - 1, start % row, row)
    if last > first:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    if stop % row:
        yield from _within_row(shape, last, 0, stop % row)


def _within_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[Box]:
    for box in split_range(shape[1:], start, stop):
        yield Box((index, *box.start), (1, *box.shape))


def _flat(index: Shape, shape: Shape) -> int:
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def _intersection(box: Box, other: Box) -> Box | None:
    start = tuple(max(a, b) for a, b in zip(box.start, other.start, strict=True))
    stop = (min(a + n, b + m) for a, n, b, m in zip(box.start, box.shape, other.start, other.shape, strict=True))
    shape = tuple(end - first for first, end in zip(start, stop, strict=True))
    return Box(start, shape) if min(shape, default=0) > 0 else None
