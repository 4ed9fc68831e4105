"""The interface of implementations of ``linear_token_statistics``: one shard's statistics, and their gradient.

``token_statistics.py`` does for all implementations what surrounds that: it joins the shards, drops rows without
gradient, reduces the gradient of the hidden rows, and manages Megatron's ``main_grad``. An implementation sees one
shard and never communicates.

Each module ``token_statistics_<name>.py`` has an object ``IMPLEMENTATION`` with the two methods of ``Implementation``.

The statistics of a row, over the columns of a shard without padding, with z = scale hidden . weight and x = z - m, are

    m = max z      s = sum exp(x)      u = sum exp(x) x      t = z[target], 0 if the target lies in another shard

With K other hidden rows of the same tokens there are four more for each, with z' = scale hidden' . weight' and
x' = z' - m'. (weight' is another model's output weight, or the same weight.)

    m' = max z'    s' = sum exp(x')    w = sum exp(x) (x - x')    t' = z'[target], 0 if elsewhere

All of them are sums of shifted numbers, so that neither logits of 1e4 nor equal logits lose digits.
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
"""The statistics per row: m, s, u, t of the intact row, and m', s', w, t' of each other row; N = 4 + 4 K."""


@dataclass(frozen=True)
class OtherRows:
    """Hidden rows of the same tokens, whose next-token distributions q are compared with the intact ones, p."""

    hidden_RD: Tensor
    """[R, D], in the dtype of the intact rows. It gets no gradient."""
    weight_VD: Tensor | None = None
    """The output weight of the model that the rows come from, sharded as the intact rows' weight is; it gets no
    gradient. None: the intact rows' weight."""
    has_kl_gradient: bool = False
    """Whether KL(p || q) has a gradient, which flows into the intact rows and their weight."""


@dataclass(frozen=True)
class HeadOptions:
    """Options of a rank's computations on its shard of the vocabulary; they do not depend on the rows."""

    group: ProcessGroup | None = None
    """The tensor-parallel group; None means that the weight is the whole vocabulary."""
    vocab_size: int | None = None
    """The size of the vocabulary without padding. Weight rows from there on are padding: they are ignored and get zero
    gradient. None: no shard has padding."""
    temperature: float = 1.0
    """The number by which the logits are divided."""
    reduce_hidden_grad: bool = True
    """True: backward sums the gradient of the hidden rows over ``group``. False: it returns this shard's part, for a
    caller that sums the parts itself (the reduce-scatter of sequence parallelism)."""
    accumulate_into_main_grad: bool = False
    """Whether backward adds the weight gradient to the weight's ``main_grad`` (if that is fp32) and sets
    ``grad_added_to_main_grad``. It then returns a meaningless gradient to autograd, or zeros for a tied embedding
    (``main_grad.py``)."""
    impl: TokenStatisticsImpl = "auto"
    """``naive`` makes the shard's full logits, ``chunked`` works in tiles in torch, and ``triton`` uses fused kernels.
    ``auto`` is ``triton`` where that runs, else ``chunked``."""
    row_chunk: int | None = None
    vocab_chunk: int | None = None
    """Tile sizes of ``chunked``; None: chosen to fit ``vocab_tiles.TILE_BUDGET_BYTES``."""


@dataclass(frozen=True)
class ShardPlan:
    """The parameters of one call on one shard that are not tensors."""

    first_id: int
    """The vocabulary id of this shard's first row."""
    num_columns: int
    """The number of this shard's rows without padding; may be 0. Padding is always at the end and is never read."""
    vocab_size: int
    """The size of the whole vocabulary without padding."""
    scale: float
    """1 / temperature."""
    row_chunk: int | None = None
    vocab_chunk: int | None = None
    """Requested tile sizes; None: the implementation chooses. Implementations without tiles ignore both."""


@dataclass(frozen=True)
class LogitGradient:
    """d z = grad 1[target] + exp(x) (offset + slope x), x = z - maximum; one entry for each row with a gradient.

    With ``other`` there is one more term, the gradient of a KL.

    All but ``target`` (int64, ids of the whole vocabulary) are in the accumulation dtype.
    """

    target: Tensor
    grad: Tensor
    maximum: Tensor
    """The maximum logit over the whole vocabulary, not over the shard."""
    offset: Tensor
    slope: Tensor | None
    """None: the entropy's gradient is not needed."""
    other: OtherGradient | None = None
    """None: no KL's gradient is needed."""


@dataclass(frozen=True)
class OtherGradient:
    """What the gradient of KL(p || q) adds to that of the logits: ``exp(x) slope (x - x')``.

    The tensors hold the same rows as ``LogitGradient``'s, and the dtypes are the same.
    """

    hidden_RD: Tensor
    """[rows, D], in the inputs' dtype: the hidden rows from which q is computed again."""
    weight_VD: Tensor | None
    """As ``OtherRows.weight_VD``."""
    maximum: Tensor
    """m' over the whole vocabulary."""
    slope: Tensor


@dataclass(frozen=True)
class GradientSums:
    """The tensors to which backward adds its results in place; None: that gradient is not needed."""

    hidden_RD: Tensor | None
    """[R, D], accumulation dtype, dense: this shard's part of the gradient of the hidden rows."""
    weight_VD: Tensor | None
    """In the shape of the weight shard, dense. It is Megatron's ``main_grad``, whose dtype is fp32 for every dtype of
    the weight, or else zeros in the weight's dtype. An implementation sums over rows in the accumulation dtype, rounds
    once, and leaves padding rows unchanged."""


class Implementation(Protocol):
    """``token_statistics_{naive,chunked,triton}.IMPLEMENTATION``."""

    def forward(
        self, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, plan: ShardPlan, others: Sequence[OtherRows] = ()
    ) -> Tensor:
        """Returns the statistics [N, R], contiguous, in the accumulation dtype.

        These are m, s, u, t, then m', s', w, t' of each of ``others``. A shard that is all padding returns
        m = m' = ``lowest(dtype)`` and zeros for the rest. A target outside the vocabulary makes t (and t') NaN.
        Autograd does not record this method.
        """
        ...

    def backward(
        self, hidden_RD: Tensor, weight_VD: Tensor, gradient: LogitGradient, plan: ShardPlan, sums: GradientSums
    ) -> None:
        """Adds the gradients to ``sums``.

        ``hidden_RD`` and ``gradient`` hold only the rows that have a gradient, possibly none.
        """


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def lowest(dtype: torch.dtype) -> float:
    """A finite number below any real logit, the initial value of a maximum.

    With -inf, the corrections of a first tile and of an all-padding shard would be 0 * inf. It is a quarter of the
    lowest number, so that differences cannot overflow.
    """
    return torch.finfo(dtype).min / 4


def empty_statistics(hidden_RD: Tensor, target_R: Tensor, plan: ShardPlan, *, num_others: int = 0) -> Tensor:
    """The statistics before the first column: the result of ``Implementation.forward`` for an all-padding shard."""
    dtype, size = accumulation_dtype(hidden_RD), NUM_STATISTICS * (1 + num_others)
    statistics_NR = torch.zeros(size, hidden_RD.shape[0], dtype=dtype, device=hidden_RD.device)
    statistics_NR[0::NUM_STATISTICS] = lowest(dtype)
    statistics_NR[3::NUM_STATISTICS].masked_fill_((target_R < 0) | (target_R >= plan.vocab_size), float("nan"))
    return statistics_NR


def locate(target: Tensor, columns: slice, plan: ShardPlan) -> tuple[Tensor, Tensor]:
    """For each target, its column in the tile (or any valid column), and whether the target is in the tile at all."""
    index = target - (plan.first_id + columns.start)
    last = columns.stop - columns.start - 1
    return index.clamp(0, last), (index >= 0) & (index <= last)
