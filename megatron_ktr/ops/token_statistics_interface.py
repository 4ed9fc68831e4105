"""What an implementation of ``linear_token_statistics`` computes: one shard's running numbers, and their gradient.

Everything around it is shared (``token_statistics.py``): joining the shards, dropping rows without gradient, reducing
the hidden gradient, Megatron's ``main_grad``. An implementation sees one shard and never communicates.

A module ``token_statistics_<name>.py`` offers itself as ``IMPLEMENTATION``, an object with the two methods of
``Implementation``.

The numbers of a row, over the real columns of a shard, with z = scale hidden . weight and x = z - m:

    m = max z      s = sum exp(x)      u = sum exp(x) x      t = z[target], 0 if the target lies in another shard

With K counterfactual hidden rows, z' each on the same weights, x' = z' - m', four more for each:

    m' = max z'    s' = sum exp(x')    w = sum exp(x) (x - x')    t' = z'[target], 0 if elsewhere

All of them are sums of shifted numbers, so that neither logits of 1e4 nor equal logits cost digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ktr.config.words import TokenStatisticsImpl

NUM_STATISTICS = 4
"""Of the intact rows: m, s, u, t; and of each counterfactual: m', s', w, t'. N = 4 + 4 K numbers a row."""


@dataclass(frozen=True)
class HeadOptions:
    """How a rank computes with its shard of the vocabulary, whichever rows it is given."""

    group: ProcessGroup | None = None
    """Tensor-parallel group; None means that the weight is the whole vocabulary."""
    vocab_size: int | None = None
    """True size; weight rows from there on are padding, count nowhere and get zero gradient. None: every row of every
    shard is real."""
    temperature: float = 1.0
    """Divides the logits."""
    reduce_hidden_grad: bool = True
    """True sums the hidden gradient over ``group``. False leaves this shard's part, for a caller that reduces it itself
    (the reduce-scatter of sequence parallelism)."""
    accumulate_into_main_grad: bool = False
    """Backward adds to the weight's ``main_grad``, where it is fp32, sets ``grad_added_to_main_grad`` and leaves
    autograd a gradient that means nothing, of zeros for a tied embedding (``main_grad.py``)."""
    impl: TokenStatisticsImpl = "auto"
    """``naive`` makes the shard's full logits; ``chunked`` is torch in tiles; ``triton`` fuses them. ``auto`` is
    ``triton`` where it runs, else ``chunked``."""
    row_chunk: int | None = None
    vocab_chunk: int | None = None
    """Tile sizes of ``chunked``; None: by ``vocab_tiles.TILE_BUDGET_BYTES``."""


@dataclass(frozen=True)
class ShardPlan:
    """Everything about one call on one shard that is not a tensor."""

    first_id: int
    """Vocabulary id of this shard's first row."""
    num_columns: int
    """Rows of this shard that are real; its padding, always at the end, is never read. Can be 0."""
    vocab_size: int
    """True size of the whole vocabulary."""
    scale: float
    """1 / temperature."""
    row_chunk: int | None = None
    vocab_chunk: int | None = None
    """Tile size asked for; None leaves it to the implementation. Implementations without tiles ignore both."""


@dataclass(frozen=True)
class LogitGradient:
    """d z = grad 1[target] + exp(x) (offset + slope x), x = z - maximum; one entry for each row with a gradient.

    All but ``target`` (int64, ids of the whole vocabulary) are in the accumulation dtype.
    """

    target: Tensor
    grad: Tensor
    maximum: Tensor
    """Over the whole vocabulary, not over the shard."""
    offset: Tensor
    slope: Tensor | None
    """None: nobody asked for the entropy's gradient."""


@dataclass(frozen=True)
class GradientSums:
    """Where backward adds its results, in place; None: nobody needs it."""

    hidden_RD: Tensor | None
    """[R, D], accumulation dtype, dense: this shard's part of the hidden gradient."""
    weight_VD: Tensor | None
    """Like the weight shard, dense: fp32 whatever the weight's dtype when it is Megatron's ``main_grad``, else zeros in
    the weight's dtype. A sum over rows is formed in the accumulation dtype and rounded once. Padding rows are left
    alone."""


class Implementation(Protocol):
    """``token_statistics_{naive,chunked,triton}.IMPLEMENTATION``."""

    def forward(
        self, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: ShardPlan, others: Sequence[Tensor] = ()
    ) -> Tensor:
        """[N, R]: m, s, u, t, then m', s', w, t' of each of the counterfactual rows ``others`` ([R, D] each);
        accumulation dtype, contiguous.

        A shard without real columns answers m = m' = ``lowest(dtype)`` and zeros. A target outside the vocabulary
        makes t (and t') NaN. No autograd is recorded.
        """
        ...

    def backward(
        self, hidden_RD: Tensor, weight_VD: Tensor, gradient: LogitGradient, plan: ShardPlan, sums: GradientSums
    ) -> None:
        """Adds the gradients to ``sums``. ``hidden_RD`` and ``gradient`` hold the rows with a gradient only, possibly
        none."""


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def lowest(dtype: torch.dtype) -> float:
    """Below any real logit, yet finite: with -inf the corrections of a first tile and of an all-padding shard would be
    0 * inf. A quarter, so that differences cannot overflow."""
    return torch.finfo(dtype).min / 4


def empty_statistics(hidden_RD: Tensor, target_R: Tensor, plan: ShardPlan, *, num_others: int = 0) -> Tensor:
    """What ``Implementation.forward`` answers before it has seen a column."""
    dtype, size = accumulation_dtype(hidden_RD), NUM_STATISTICS * (1 + num_others)
    statistics_NR = torch.zeros(size, hidden_RD.shape[0], dtype=dtype, device=hidden_RD.device)
    statistics_NR[0::NUM_STATISTICS] = lowest(dtype)
    statistics_NR[3::NUM_STATISTICS].masked_fill_((target_R < 0) | (target_R >= plan.vocab_size), float("nan"))
    return statistics_NR


def locate(target: Tensor, columns: slice, plan: ShardPlan) -> tuple[Tensor, Tensor]:
    """(column of each target in the tile, or any valid one; whether the target is in the tile at all)."""
    index = target - (plan.first_id + columns.start)
    last = columns.stop - columns.start - 1
    return index.clamp(0, last), (index >= 0) & (index <= last)
