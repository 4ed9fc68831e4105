"""Vision features from a cache, so that the encoder runs only once over the same content.

The encoder attends within one temporal patch of a video (a *unit*: two frames, or an image) and never across units.
Hence units are encoded, cached and shared one by one. Features are looked up by content, so the encoder need not run
again for: another pass over the intact view; the reference model, while the encoder is frozen; a video that comes again
in the next epoch, while the encoder is frozen; a shuffled view that moves whole units (``shuffle_unit:
temporal_patch``). Frames that are shuffled one by one make new units, which are encoded once.

    no gradient             features come from the cache; missing units are encoded together
    gradient (trainable)    the encoder runs inside the graph. ``prepare`` may have run it before, so that passes
                            without gradient share that run. With ``recompute`` only the features are kept, and backward
                            runs the encoder again, for one micro-batch at a time
    ``split_over``          ``vision_parallel: frame``: each rank of the group encodes a share of the units with the
                            whole encoder, without communication; one all-gather of features follows. In backward each
                            rank continues from its own units' gradient, so parameter gradients are partial sums;
                            ``policy/vision.py`` adds them up over the tensor ranks once (DDP does it over context
                            ranks)

The size of the cache is bounded in bytes; the least recently used units are dropped first. It is emptied when the
encoder's weights change.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import ProcessGroup

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.ops.main_grad import main_gradient
from megatron_ktr.transfer import send
from megatron_ktr.types import VisualInput

Encoder = Callable[[Tensor | None, Tensor], Tensor]
"""Maps (patches [S, ...], grids int64 [M, 3]) to features [S / merge^2, D]."""


@dataclass(frozen=True)
class VisionUnit:
    """One temporal patch of one medium."""

    key: bytes
    """A digest of kind, size and pixels, by which the cache finds the unit."""
    medium: VisualInput
    """This unit's frames only; the grid is (1, height, width)."""


class VisionPass:
    """Features of media from one encoder, for the ranks of the first pipeline stage.

    Every rank of ``split_over`` (and every tensor rank) must ask for the same media in the same order. Their caches
    then hold the same units, so that all ranks enter the same collectives.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        media: MediaSpec,
        device: torch.device,
        cache_bytes: int,
        is_trainable: bool,
        recompute: bool = False,
        split_over: ProcessGroup | None = None,
        sum_gradient_over: ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            is_trainable: whether any parameter of the encoder has a gradient.
            split_over: the ranks that share the units among them; None: this rank encodes all units.
            sum_gradient_over: the ranks that each hold a part of the features' gradient (context parallel); only with
                ``split_over``.
        """
        self.is_trainable = is_trainable
        self.num_encoded = 0
        """Units that ran through the encoder for the first time since ``take_counts``, over all ranks of the group."""
        self._encoder = encoder
        self._media = media
        self._device = device
        self._cache_bytes = cache_bytes
        self._recompute = recompute
        self._group = split_over if split_over is not None and split_over.size() > 1 else None
        self._gradient_group = sum_gradient_over
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self._cached_bytes = 0
        self._graphs: dict[tuple[bytes, ...], Tensor] = {}
        self._units: dict[int, tuple[VisualInput, list[VisionUnit]]] = {}

    def features(self, media: Sequence[VisualInput]) -> Tensor | None:
        """Features [visual tokens, D] of the media, in order; None without media. They are part of the autograd graph
        if gradients are enabled and the encoder is trained, and have no gradient otherwise."""
        if not media:
            return None
        units = [unit for medium in media for unit in self.units_of(medium)]
        if not (self.is_trainable and torch.is_grad_enabled()):
            return torch.cat(self._cached(units))
        distinct, rows = self._distinct(units)
        if self._recompute:
            known = torch.cat(self._cached(distinct))
            anchor = torch.empty(0, device=self._device, requires_grad=True)
            whole = _Recomputed.apply(anchor, known, partial(self._encode, distinct))
        else:
            whole = self._graphs.pop(tuple(unit.key for unit in distinct), None)
            if whole is None:
                whole = self._encode_for_gradient(distinct)
        return whole if rows is None else whole.index_select(0, rows)

    def prepare(self, media: Sequence[VisualInput]) -> None:
        """Encodes media ahead of time. Call it if passes without gradient will show the media before the pass with
        gradient does: all of them then share this run of the encoder."""
        if not media:
            return
        units = [unit for medium in media for unit in self.units_of(medium)]
        if not self.is_trainable or self._recompute:
            with torch.no_grad():
                self._cached(units)
            return
        distinct, _ = self._distinct(units)
        keys = tuple(unit.key for unit in distinct)
        if keys not in self._graphs:
            with torch.enable_grad():
                self._graphs[keys] = self._encode_for_gradient(distinct)

    def forget(self) -> None:
        """Drops all features. Call it when the encoder's weights have changed."""
        self._cache.clear()
        self._graphs.clear()
        self._cached_bytes = 0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, nothing is known of earlier media and nothing is kept; afterwards the pass is as it was. Features
        depend in their last bits on what is encoded together, so passes beside training must not leave any."""
        kept = self._cache, self._cached_bytes, self._cache_bytes, self._graphs, self._units, self.num_encoded
        self._cache, self._cached_bytes, self._cache_bytes = OrderedDict(), 0, 0
        self._graphs, self._units = {}, {}
        try:
            yield
        finally:
            self._cache, self._cached_bytes, self._cache_bytes, self._graphs, self._units, self.num_encoded = kept

    def take_counts(self) -> int:
        """Returns ``num_encoded`` and sets it to zero. The digests of this step's media are dropped, too."""
        self._units.clear()
        taken, self.num_encoded = self.num_encoded, 0
        return taken

    def units_of(self, medium: VisualInput) -> list[VisionUnit]:
        """The temporal patches of a medium; a last incomplete one repeats the last frame, as preprocessing does."""
        # The views of one step ask for the same media many times. The medium is kept with its answer, so that no other
        # object can get its id.
        known = self._units.get(id(medium.frames_FCHW))
        if known is None:
            known = (medium, self._split(medium))
            self._units[id(medium.frames_FCHW)] = known
        return known[1]

    def _split(self, medium: VisualInput) -> list[VisionUnit]:
        num_t, num_h, num_w = medium.grid_thw
        size = 1 if medium.kind == "image" else self._media.temporal_patch_size
        frames = medium.frames_FCHW
        missing = num_t * size - len(frames)
        if missing:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        units = []
        for part in frames.split(size):
            part = part.contiguous()
            # 128 bits do not collide by accident. A cryptographic hash would be 7 times as slow. It would guard only
            # against media made to collide on purpose, by people who can write the data anyway.
            digest = xxhash.xxh3_128(f"{medium.kind} {tuple(part.shape)} {num_h} {num_w}".encode())
            digest.update(part.numpy().data)
            unit = dataclasses.replace(medium, frames_FCHW=part, grid_thw=(1, num_h, num_w))
            units.append(VisionUnit(digest.digest(), unit))
        return units

    def _distinct(self, units: Sequence[VisionUnit]) -> tuple[list[VisionUnit], Tensor | None]:
        """The units without repetition, and the index of feature rows that restores the given order; the index is None
        if no unit repeats."""
        distinct = list({unit.key: unit for unit in units}.values())
        if len(distinct) == len(units):
            return distinct, None
        start, rows_of = 0, {}
        for unit in distinct:
            length = self._num_tokens(unit)
            rows_of[unit.key] = torch.arange(start, start + length)
            start += length
        return distinct, send(torch.cat([rows_of[unit.key] for unit in units]), self._device)

    def _cached(self, units: Sequence[VisionUnit]) -> list[Tensor]:
        """Features of each unit, without gradient. Units that are not in the cache are encoded in one call."""
        found = {unit.key: self._cache[unit.key] for unit in units if unit.key in self._cache}
        missing = [unit for unit in self._distinct(units)[0] if unit.key not in found]
        if missing:
            with torch.no_grad():
                found |= self._keep(missing, self._encode(missing))
            self.num_encoded += len(missing)
        for unit in units:
            if unit.key in self._cache:
                self._cache.move_to_end(unit.key)
        return [found[unit.key] for unit in units]

    def _encode_for_gradient(self, units: Sequence[VisionUnit]) -> Tensor:
        features = self._encode(units)
        self._keep(units, features.detach())
        self.num_encoded += len(units)
        return features

    def _keep(self, units: Sequence[VisionUnit], features: Tensor) -> dict[bytes, Tensor]:
        """Puts the features of units into the cache and returns them. They are copies: views would keep the features of
        the whole batch in memory."""
        parts = features.split([self._num_tokens(unit) for unit in units])
        kept = {unit.key: part.clone() for unit, part in zip(units, parts, strict=True)}
        for key, part in kept.items():
            if key not in self._cache:
                self._cache[key] = part
                self._cached_bytes += part.nbytes
        while self._cached_bytes > self._cache_bytes and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
        return kept

    def _encode(self, units: Sequence[VisionUnit]) -> Tensor:
        """Features of the units, concatenated in order; every rank of the group gets all of them."""
        if self._group is None:
            return self._run(units)
        sizes = [self._num_tokens(unit) for unit in units]
        bounds = share_units(sizes, num_ranks=self._group.size())
        rank = self._group.rank()
        mine = self._run(units[bounds[rank] : bounds[rank + 1]])
        rows = [sum(sizes[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
        return _GatherFeatures.apply(mine, rows, self._group, self._gradient_group)

    def _run(self, units: Sequence[VisionUnit]) -> Tensor:
        grids = torch.tensor([unit.medium.grid_thw for unit in units], dtype=torch.int64).reshape(-1, 3)
        if not units:
            # More ranks than units: an empty result, still connected to every parameter.
            return self._encoder(None, grids)
        patches = []
        for _, run in itertools.groupby(units, key=lambda unit: (unit.medium.kind, unit.medium.frames_FCHW.shape)):
            # Frames are sent to the device as bytes, not as floats. Units of one size are cut into patches together.
            alike = list(run)
            frames = send(torch.cat([unit.medium.frames_FCHW for unit in alike]), self._device)
            batches = frames.split(1) if alike[0].medium.kind == "image" else (frames,)
            patches += [self._media.patchify(batch, alike[0].medium) for batch in batches]
        return self._encoder(torch.cat(patches), grids)

    def _num_tokens(self, unit: VisionUnit) -> int:
        return self._media.num_visual_tokens(unit.medium)


def share_units(sizes: Sequence[int], *, num_ranks: int) -> list[int]:
    """Splits units into one run of consecutive units per rank, as even in tokens as cutting between units allows.

    ``sizes`` are tokens by unit. Returns the bounds ``[0, .., len(sizes)]`` of the runs: rank r takes the units whose
    middle lies in the r-th of ``num_ranks`` equal parts of all tokens.
    """
    total = sum(sizes)
    bounds, done, index = [0], 0, 0
    for rank in range(1, num_ranks):
        while index < len(sizes) and (done + sizes[index] / 2) * num_ranks < rank * total:
            done += sizes[index]
            index += 1
        bounds.append(index)
    return [*bounds, len(sizes)]


def sum_gradients(parameters: Iterable[torch.nn.Parameter], *, group: ProcessGroup) -> None:
    """Adds up the main gradients of an encoder over ``group``. Every rank of the group holds the whole encoder and has
    run it over a share of the units. Call it after the reduction over data-parallel ranks; every tensor rank then holds
    the same shard of the gradients."""
    gradients = [main_gradient(parameter) for parameter in parameters if parameter.requires_grad]
    if group.size() == 1 or not gradients:
        return
    together = _flatten_dense_tensors(gradients)
    torch.distributed.all_reduce(together, group=group)
    for gradient, total in zip(gradients, _unflatten_dense_tensors(together, gradients), strict=True):
        gradient.copy_(total)


class _Recomputed(torch.autograd.Function):
    """Puts known features into the autograd graph. Backward runs the encoder again, with gradient, and continues
    through it.

    ``anchor`` is an empty tensor that requires a gradient. Autograd calls this function's backward only because one of
    its inputs requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, known: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        ctx.encode = encode
        return known.view_as(known)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        with torch.enable_grad():
            features = ctx.encode()
        torch.autograd.backward(features, grad)
        return None, None, None


class _GatherFeatures(torch.autograd.Function):
    """Gathers [rows of this rank, D] to [all rows, D] on every rank. Backward takes this rank's rows of the gradient.

    Every tensor rank holds the whole gradient. Each context rank holds a part of it (from its own rows of the
    sequence), so backward first sums the gradient over the context ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, mine: Tensor, rows: list[int], group: ProcessGroup, gradient_group: ProcessGroup | None
    ) -> Tensor:
        ctx.rows, ctx.rank, ctx.gradient_group = rows, group.rank(), gradient_group
        most = max(rows)
        padded = mine.new_zeros(most, mine.shape[1])
        padded[: len(mine)] = mine
        gathered = mine.new_empty(len(rows) * most, mine.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
        parts = gathered.split(most)
        return torch.cat([part[:number] for part, number in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradient_group is not None and ctx.gradient_group.size() > 1:
            grad = grad.contiguous()
            torch.distributed.all_reduce(grad, group=ctx.gradient_group)
        start = sum(ctx.rows[: ctx.rank])
        return grad[start : start + ctx.rows[ctx.rank]], None, None, None
